"""GOLD: distillation between tokenizers, on the stretches of text where both end a token.

The method of TRL's GOLD trainer (experimental, 1.16; there is no paper): "general online logit distillation".

A group is the least stretch of text that is whole tokens on both sides. Its tokens are merged by the chain
rule ("bayesian" in TRL): with y_1 .. y_n the side's tokens in the group,

    q~(v) = q(y_1) q(y_2 | y_1) .. q(y_n-1 | ..) q(v | y_1 .. y_n-1),   of total mass q(y_1 .. y_n-1 | ..)

and q~(y_n) the probability of the group's text. Tokens that both vocabularies write alike are compared by a
divergence, the others by their sorted probabilities:

    L = mean over groups of  w D(p~ on shared, q~ on shared) + w' sum_i |p~(i) - q~(i)| over the others

w is the share of the teacher's vocabulary that is shared, w' = 1 - w, unless `weights` says otherwise. With
`bucket` D sees one more cell, all the mass that is not on a shared token, so that both sides sum to one and D
is a divergence between distributions; without it, D is taken of the bare masses, as TRL does. p is the
teacher.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence, require_f_divergence
from fdiv._math import log1mexp
from fdiv.divergences.js import JS
from fdiv.divergences.sorted import SortedL1
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._alignment import Merged, in_both, merge
from fdiv.sample._sampler import Decoding, Sampler
from fdiv.sample.fixed import Mix


@dataclass(frozen=True)
class GOLD:
    """The mean over aligned groups of a divergence on shared tokens and sorted L1 on the others.

    weights: (of the shared, of the others); None takes the shared fraction of the teacher's vocabulary.
    cross_entropy: the weight of the labels.
    """

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = (
        "log_p",
        "log_q",
        "log_p_label",
        "log_q_label",
        "p_group",
        "q_group",
        "p_shared",
        "q_shared",
        "groups",
    )

    divergence: Divergence = field(default_factory=JS)
    weights: tuple[float, float] | None = None
    bucket: bool = True
    cross_entropy: float = 0.0
    sampler: Sampler = field(default_factory=lambda: Mix(0.5, Decoding(temperature=0.9, top_p=0.95)))

    def __post_init__(self):
        Exact().check(self.divergence)
        if not self.bucket:
            require_f_divergence(self.divergence, "GOLD(bucket=False), whose masses do not sum to one,")
        if not isinstance(self.sampler, Sampler):
            raise TypeError(f"a sampler says who writes, got {self.sampler!r}; write Mix(lmbda) or Offline()")
        if self.weights is not None and not (
            len(self.weights) == 2 and min(self.weights) >= 0 and sum(self.weights) > 0
        ):
            raise ValueError(
                f"weights is (of the shared tokens, of the others), both >= 0 and not both 0, or None; "
                f"got {self.weights!r}"
            )
        if not self.cross_entropy >= 0:
            raise ValueError(f"cross_entropy is a weight >= 0, got {self.cross_entropy!r}")

    def __call__(
        self,
        *,
        log_p: Tensor,
        log_q: Tensor,
        log_p_label: Tensor,
        log_q_label: Tensor,
        p_group: Tensor,
        q_group: Tensor,
        p_shared: Tensor,
        q_shared: Tensor,
        groups: Tensor | float | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """Student's rows log_q [Rs, Vs], log_q_label, q_group [Rs]; teacher's log_p [Rt, Vt] and so on [Rt].

        p_shared, q_shared [K]: the ids of the tokens that both vocabularies write alike, pair by pair.
        Groups ascend over the micro-batch; rows of a group that the other side lacks, or < 0, are left out.
        groups, count: groups on both sides, and student's tokens, of the global batch (default: here).
        """
        if p_shared.shape != q_shared.shape:
            raise ValueError(f"shared tokens come in pairs, got {len(p_shared)} and {len(q_shared)}")
        chosen = in_both(q_group, p_group)
        p = merge(log_p.detach(), log_p_label.detach(), p_group, chosen)
        q = merge(log_q, log_q_label, q_group, chosen)
        p_cells, q_cells = _cells(p, p_shared, self.bucket), _cells(q, q_shared, self.bucket)
        terms = {
            "shared": self.divergence(p_cells, q_cells),
            "others": SortedL1()(_others(p, p_shared), _others(q, q_shared)),
        }
        share = len(p_shared) / log_p.shape[-1]
        weights = self.weights or (share, 1 - share)
        rows = [weight * term for weight, term in zip(weights, terms.values(), strict=True) if weight]
        loss = mean_over_tokens(torch.stack(rows).sum(0), count=groups)
        if self.cross_entropy:
            loss = loss + self.cross_entropy * mean_over_tokens(-log_q_label, count=count)
        return Out(loss, {name: mean_over_tokens(term.detach()) for name, term in terms.items()})


def _cells(merged: Merged, shared: Tensor, bucket: bool) -> Tensor:
    """log-masses of the shared tokens and, with `bucket`, of everything else: [groups, K + 1]."""
    log_before = merged.log_before.unsqueeze(-1)
    cells = log_before + merged.log_last[:, shared]
    if not bucket:
        return cells
    some = log_before < 0  # else the rest is empty, and its logarithm has no gradient
    gone = torch.where(some, log1mexp(torch.where(some, log_before, -1.0)), -torch.inf)
    rest = _log_sum(torch.cat([_others(merged, shared), gone], -1))
    return torch.cat([cells, rest.unsqueeze(-1)], -1)


def _others(merged: Merged, shared: Tensor) -> Tensor:
    """log-masses of the tokens that are not shared, [groups, V - K]."""
    other = torch.ones(merged.log_last.shape[-1], dtype=torch.bool, device=shared.device)
    other[shared] = False
    return merged.log_before.unsqueeze(-1) + merged.log_last[:, other]


def _log_sum(logs: Tensor) -> Tensor:
    """logsumexp over the last dimension, whose gradient is 0 and not nan where all are -inf."""
    empty = (logs == -torch.inf).all(-1, keepdim=True)
    return logs.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
