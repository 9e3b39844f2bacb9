"""Alignment of two tokenisations by their byte ends, and the merging of a group by the chain rule."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.worlds import close, random_rows

from fdiv.methods.distill._alignment import LEFT_OVER, align, by_index, in_both, merge


@st.composite
def two_splits(draw):
    """Byte ends of two tokenisations of one text, some tokens of which may write nothing."""
    length = draw(st.integers(1, 12))
    split = st.lists(st.integers(1, length), max_size=12).map(sorted)
    return [*draw(split), length], [*draw(split), length]


@given(two_splits())
def test_groups_close_exactly_at_common_ends_and_cover_the_text(splits):
    groups = align(*splits)
    ends = [
        {group: max(e for e, g in zip(split, of, strict=True) if g == group) for group in of if group >= 0}
        for split, of in zip(splits, groups, strict=True)
    ]
    assert ends[0] == ends[1]
    assert set(ends[0].values()) == set(splits[0]) & set(splits[1])


@given(two_splits())
def test_groups_are_counted_from_0_and_every_token_but_empty_ones_at_the_end_is_in_one(splits):
    for split, group in zip(splits, align(*splits), strict=True):
        inside = [g for g in group if g != LEFT_OVER]
        assert inside == sorted(inside) and set(inside) == set(range(max(inside) + 1))
        assert group[: len(inside)] == inside
        assert all(end == split[-1] for end in split[len(inside) :])


@given(two_splits())
def test_it_does_not_matter_which_side_is_which(splits):
    assert align(*splits) == align(*reversed(splits))[::-1]


@given(two_splits())
def test_a_tokenisation_and_itself_have_one_token_a_group(splits):
    own = list(range(len(splits[0])))
    assert align(splits[0], splits[0]) == (own, own)


@pytest.mark.parametrize(
    ("q_ends", "p_ends", "q_group", "p_group"),
    [
        ([3, 7, 11], [2, 3, 5, 7, 8, 11], [0, 1, 2], [0, 0, 1, 1, 2, 2]),
        ([2, 5, 6], [3, 5, 6], [0, 0, 1], [0, 0, 1]),  # crossing before 5
        ([0, 3, 5], [3, 5], [0, 0, 1], [0, 1]),  # an empty token belongs to what follows
        ([3, 3], [1, 3, 3], [0, 1], [0, 0, 1]),  # and two ends of text are a group
        ([3, 3], [3], [0, -1], [0]),  # unless one side has none
        ([2, 5], [2, 3], [0, -1], [0, -1]),  # cut off: the rest has no common end
        ([], [1], [], [-1]),
    ],
)
def test_worked_alignments(q_ends, p_ends, q_group, p_group):
    assert align(q_ends, p_ends) == (q_group, p_group)


def test_ends_that_descend_are_refused():
    with pytest.raises(ValueError, match=r"one after another.*\[2, 1\]"):
        align([2, 1], [2])


# -- merging, on all sequences of three tokens from three --------------------------------------------------

LOGITS = torch.randn(13, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def rows_of(tokens):
    """log-probabilities after each prefix of `tokens`, [3, 3], and of the tokens themselves."""
    prefixes = torch.tensor([0, 1 + tokens[0], 4 + 3 * tokens[0] + tokens[1]])
    rows = LOGITS.log_softmax(-1)[prefixes]
    return rows, rows[range(3), list(tokens)]


@pytest.mark.parametrize("tokens", [(0, 1, 2), (2, 2, 0)])
@pytest.mark.parametrize("group", [[0, 1, 2], [0, 0, 1], [0, 1, 1], [0, 0, 0]])
def test_a_group_has_the_exact_probability_of_its_text_and_its_mass_is_that_of_the_tokens_before(
    tokens, group
):
    """By enumeration: the probability that a sequence goes on as the group does."""
    rows, labels = rows_of(tokens)
    group = torch.tensor(group)
    merged = merge(rows, labels, group, torch.ones(int(group.max()) + 1, dtype=torch.bool))

    def probability(start, end):
        """Of tokens[start:end] after tokens[:start]."""
        total = {True: 0.0, False: 0.0}
        for other in product(range(3), repeat=3):
            if other[:start] == tokens[:start]:
                total[other[start:end] == tokens[start:end]] += float(rows_of(other)[1].sum().exp())
        return total[True] / sum(total.values())

    for g in range(len(merged.log_last)):
        places = (group == g).nonzero().squeeze(-1).tolist()
        start, end = places[0], places[-1] + 1
        chain = (merged.log_before[g] + merged.log_last[g]).exp()
        assert chain[tokens[end - 1]].item() == pytest.approx(probability(start, end), abs=1e-14)
        assert chain.sum().item() == pytest.approx(probability(start, end - 1), abs=1e-14)


def test_only_groups_on_both_sides_are_merged_and_in_their_order():
    rows = random_rows(6, 4)
    labels = rows[:, 1]
    q_group = torch.tensor([0, 0, 1, 2, 3, -1])
    chosen = in_both(q_group, torch.tensor([0, 2, 2, 3, -1, 4]))
    assert chosen.tolist() == [True, False, True, True, False]
    merged = merge(rows, labels, q_group, chosen)
    assert torch.equal(merged.log_last, rows[[1, 3, 4]])
    close(merged.log_before, torch.stack([labels[0], labels[0] * 0, labels[0] * 0]), 1e-15)


def test_groups_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match=r"q_group must ascend.*Paired\.flat"):
        in_both(torch.tensor([0, 1, 0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="a row a token: got 2 distributions, 3 labels, 2 groups"):
        merge(random_rows(2, 3), torch.zeros(3), torch.tensor([0, 1]), torch.tensor([True, True]))


def test_pairs_by_index_end_with_the_shorter_side_of_each_sequence():
    q_rows, p_rows = by_index(torch.tensor([0, 0, 0, 1, 3, 3]), torch.tensor([0, 0, 1, 1, 2, 3, 3]))
    assert q_rows.tolist() == [0, 1, 3, 4, 5]
    assert p_rows.tolist() == [0, 1, 2, 5, 6]
    empty = torch.empty(0, dtype=torch.long)
    assert [len(rows) for rows in by_index(empty, empty)] == [0, 0]
