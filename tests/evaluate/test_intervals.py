import math

import numpy as np
import pytest

from fdiv.evaluate import bootstrap_interval, paired_difference, student_interval


def test_student_interval_of_three_seeds_uses_four_point_three_standard_errors():
    found = student_interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 / math.sqrt(3))


def test_one_seed_has_a_mean_and_no_interval():
    found = student_interval([0.7])
    assert (found.mean, found.half, found.count) == (0.7, None, 1)
    assert not found.excludes(0)


def test_a_diverged_seed_is_not_averaged_away():
    found = student_interval([0.7, math.nan, 0.6])
    assert math.isnan(found.mean) and found.half is None


def test_student_interval_covers_the_truth_nineteen_times_in_twenty():
    random = np.random.default_rng(0)
    hits = [abs((i := student_interval(random.normal(0, 1, 4))).mean) <= i.half for _ in range(2000)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_pairing_removes_what_the_seed_did_to_both():
    left, right = {0: 1.1, 1: 5.11, 2: 9.09}, {0: 1.0, 1: 5.0, 2: 9.0}
    assert paired_difference(left, right).excludes(0)
    apart = {s + 10: v for s, v in right.items()}  # no shared seed: Welch, which sees the spread
    assert not paired_difference(left, apart).excludes(0)


def test_bootstrap_brackets_the_mean_of_the_items():
    value, low, high = bootstrap_interval(np.arange(100.0))
    assert value == 49.5
    assert high - low == pytest.approx(2 * 1.96 * np.std(np.arange(100)) / 10, rel=0.1)
