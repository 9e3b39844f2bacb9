from itertools import combinations

import numpy as np
import pytest

from fdiv.evaluate import exact_pass_at_k, pass_at_k


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_k_subsets_that_hold_a_right_answer(samples):
    for correct in range(samples + 1):
        answers = [i < correct for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = [any(s) for s in combinations(answers, k)]
            assert pass_at_k(correct, samples, k) == pytest.approx(np.mean(subsets), abs=1e-12)


def test_pass_at_k_takes_an_array_of_problems_and_does_not_overflow():
    found = pass_at_k(np.array([0, 1, 9_000, 10_000]), 10_000, 5_000)
    assert found == pytest.approx([0, 0.5, 1, 1])


def test_the_sampled_estimate_is_unbiased_for_the_exact_value():
    p, samples, k = 0.3, 6, 3
    correct = np.random.default_rng(0).binomial(samples, p, 20_000)
    error = pass_at_k(correct, samples, k).std() / np.sqrt(correct.size)
    assert abs(pass_at_k(correct, samples, k).mean() - exact_pass_at_k(p, k)) < 4 * error


def test_exact_pass_at_k_averages_over_prompts_and_keeps_the_ends_exact():
    assert exact_pass_at_k([0.0, 1.0, 0.5], 2) == pytest.approx((0 + 1 + 0.75) / 3)
    assert exact_pass_at_k([0.5], [1, 2, 3]) == pytest.approx([0.5, 0.75, 0.875])


def test_too_few_samples_are_refused_with_what_to_do_instead():
    with pytest.raises(ValueError, match=r"k is 5 but .* 4 samples; allowed .*; draw more"):
        pass_at_k([1, 2], [9, 4], 5)
    with pytest.raises(ValueError, match="count of right answers"):
        pass_at_k(5, 4, 1)
