from itertools import combinations, product

import numpy as np
import pytest

from fdiv.evaluate import coverage_at_k, distinct_n, effective_number, rarefied_coverage


def test_distinct_n_counts_over_all_sequences_together():
    assert distinct_n([["a", "b", "a"], ["a", "b"]], 2) == pytest.approx(2 / 3)
    assert distinct_n([[1, 1, 1, 1]], 1) == 0.25
    assert distinct_n([[1]], 2) == 0


def test_effective_number_of_a_uniform_choice_is_its_size():
    assert effective_number(np.ones(7)) == pytest.approx(7)
    assert effective_number([[1, 0, 0], [0.5, 0.5, 0]]) == pytest.approx([1, 2])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_coverage_is_the_enumerated_mean_number_of_distinct_valid_answers(k):
    q = [0.5, 0.3, 0.05]
    every = [*q, 1 - sum(q)]  # the last is every invalid answer together
    expected = sum(
        np.prod([every[i] for i in draw]) * len(set(draw) - {3}) for draw in product(range(4), repeat=k)
    )
    assert coverage_at_k(q, k) == pytest.approx(expected)


def test_coverage_of_a_certain_answer_is_one():
    assert coverage_at_k([1.0, 0.0], 10) == 1


def test_rarefied_coverage_is_the_mean_over_all_subsets_of_the_draws():
    draws = ["a", "a", "a", "b", "c", None]  # None: an invalid answer
    subsets = [len(set(s) - {None}) for s in combinations(draws, 3)]
    assert rarefied_coverage([3, 1, 1], 3, samples=6) == pytest.approx(np.mean(subsets))
