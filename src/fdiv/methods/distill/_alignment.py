"""Two tokenisations of one text, brought together where both end a token.

The student's rows are q's, the teacher's p's. A group is the least stretch of text that is whole tokens on
both sides; the tokens after the last common end are left over.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._math import in_working_precision

LEFT_OVER = -1  # the group of tokens that are compared with nothing


class Alignment(NamedTuple):
    """The group of each token, [tokens] each, counted from 0 and LEFT_OVER after the last common end."""

    q_group: list[int]
    p_group: list[int]


def align(q_ends: Sequence[int], p_ends: Sequence[int]) -> Alignment:
    """Groups from the byte of one text at which each token of either side ends, never descending.

    A token that writes nothing (it ends where the one before it does) belongs to the group that follows, or
    is a group with another such token.
    """
    for ends in (q_ends, p_ends):
        if any(later < sooner for sooner, later in pairwise(ends)):
            raise ValueError(f"tokens end one after another, got the byte ends {list(ends)}")
    q_group, p_group = [LEFT_OVER] * len(q_ends), [LEFT_OVER] * len(p_ends)
    group = i = j = q_start = p_start = 0
    while i < len(q_ends) and j < len(p_ends):
        q_end, p_end = q_ends[i], p_ends[j]
        i, j = i + (q_end <= p_end), j + (p_end <= q_end)  # the side that ends first goes on
        if q_end == p_end:
            q_group[q_start:i], p_group[p_start:j] = [group] * (i - q_start), [group] * (j - p_start)
            q_start, p_start, group = i, j, group + 1
    return Alignment(q_group, p_group)


def in_both(q_group: Tensor, p_group: Tensor) -> Tensor:
    """Whether each group has tokens on both sides, [groups] bool; groups [Rs] and [Rt] ascend row by row."""
    for name, group in (("q_group", q_group), ("p_group", p_group)):
        if bool((group[group >= 0].diff() < 0).any()):
            raise ValueError(
                f"{name} must ascend row by row, so that no group crosses sequences; number the groups of a "
                "micro-batch as Paired.flat() does"
            )
    groups = max([int(g.max()) + 1 for g in (q_group, p_group) if g.numel()], default=0)
    q_has, p_has = (g[g >= 0].bincount(minlength=max(groups, 0)) > 0 for g in (q_group, p_group))
    return q_has & p_has


class Merged(NamedTuple):
    """Of each group: the distribution at its last token [groups, vocab], and log P(the tokens before it)."""

    log_last: Tensor
    log_before: Tensor  # [groups], 0 where there are none


def merge(log_rows: Tensor, log_label: Tensor, group: Tensor, chosen: Tensor) -> Merged:
    """The chosen groups of one side, by the chain rule: [R, vocab], [R], [R] and [groups] bool.

    log_before + log_last at the last token is the log-probability of the group's own text.
    """
    if not len(log_rows) == len(log_label) == len(group):
        raise ValueError(
            f"a row a token: got {len(log_rows)} distributions, {len(log_label)} labels, {len(group)} groups"
        )
    rows = (group >= 0).nonzero().squeeze(-1)
    rows = rows[chosen[group[rows]]]
    group = group[rows]
    last = torch.ones_like(group, dtype=torch.bool)
    last[:-1] = group[1:] != group[:-1]
    log_last, log_label = in_working_precision(log_rows[rows[last]], log_label[rows[~last]])
    place = (chosen.cumsum(0) - 1)[group[~last]]  # among the chosen groups
    return Merged(log_last, log_label.new_zeros(len(log_last)).index_add(0, place, log_label))


def by_index(q_sequence: Tensor, p_sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the k-th token of each sequence on either side, for k up to the shorter one's length.

    q_sequence [Rs], p_sequence [Rt]: the number of each row's sequence, ascending.
    """
    sequences = max([int(s.max()) + 1 for s in (q_sequence, p_sequence) if s.numel()], default=0)
    lengths = [s.bincount(minlength=sequences) for s in (q_sequence, p_sequence)]
    shorter = torch.minimum(*lengths)
    rows = []
    for sequence, length in zip((q_sequence, p_sequence), lengths, strict=True):
        starts = length.cumsum(0) - length
        place = torch.arange(len(sequence), device=sequence.device) - starts[sequence]
        rows.append((place < shorter[sequence]).nonzero().squeeze(-1))
    return rows[0], rows[1]
