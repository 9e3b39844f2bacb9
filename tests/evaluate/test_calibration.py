import numpy as np
import pytest

from fdiv.evaluate import brier, ece_null, expected_calibration_error, reliability


def test_ece_is_zero_where_every_bin_is_right_as_often_as_it_says():
    confidence = np.repeat([0.25, 0.75], 8)
    correct = np.tile([0, 0, 0, 1, 1, 1, 1, 0], 2)
    correct[:8], correct[8:] = [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(0, abs=1e-12)


def test_ece_of_a_model_that_overstates_by_a_fifth_is_a_fifth():
    assert expected_calibration_error([0.9] * 10, [1] * 7 + [0] * 3) == pytest.approx(0.2)


def test_ece_takes_expected_correctness_and_weights():
    confidence, expected, weight = [0.2, 0.8], [0.1, 0.5], [3, 1]
    found = expected_calibration_error(confidence, expected, bins=2, weight=weight)
    assert found == pytest.approx(0.75 * 0.1 + 0.25 * 0.3)


def test_bins_are_open_on_the_left_and_closed_on_the_right():
    points = reliability([0.0, 0.5, 0.5 + 1e-9, 1.0], [0, 0, 1, 1], bins=2)
    assert [p["accuracy"] for p in points] == [0, 1]
    assert [p["weight"] for p in points] == [0.5, 0.5]


def test_reliability_leaves_empty_bins_out_and_gives_the_ece_back():
    random = np.random.default_rng(0)
    confidence = random.random(200) * 0.5
    correct = random.random(200) < 0.5
    points = reliability(confidence, correct)
    ece = sum(p["weight"] * abs(p["confidence"] - p["accuracy"]) for p in points)
    assert len(points) == 8
    assert ece == pytest.approx(expected_calibration_error(confidence, correct))


def test_the_null_bias_is_positive_shrinks_with_data_and_matches_a_calibrated_model():
    random = np.random.default_rng(1)
    few, many = random.random(60), random.random(6000)
    assert ece_null(few, resamples=50) > 2 * ece_null(many, resamples=50) > 0
    measured = [expected_calibration_error(few, random.random(60) < few) for _ in range(200)]
    assert ece_null(few, resamples=200) == pytest.approx(np.mean(measured), rel=0.1)


def test_the_null_of_sampled_answers_draws_them_by_their_weight():
    # all mass on one confidence: the null is the mean distance of a binomial mean from it
    found = ece_null([0.5, 0.9], weight=[1, 0], count=25, resamples=2000)
    draws = np.random.default_rng(5).binomial(25, 0.5, 100_000) / 25
    assert found == pytest.approx(np.abs(draws - 0.5).mean(), rel=0.05)


def test_brier_is_the_weighted_mean_square():
    assert brier([0.8, 0.3], [1, 0], weight=[1, 3]) == pytest.approx((0.04 + 3 * 0.09) / 4)


def test_logits_are_refused():
    with pytest.raises(ValueError, match="not logits"):
        expected_calibration_error([3.0], [1])
