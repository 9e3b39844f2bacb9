"""Cauchy-Schwarz information and conditional divergence: sums written out, closed forms and limits."""

import math

import pytest
import torch
from tests.worlds import close

from fdiv import CauchySchwarz
from fdiv.estimate.cauchy_schwarz import conditional_cs, cs_information, normalised_cs_information


def samples(count=20, width=3, seed=0, dtype=torch.float64):
    """(x [N, 3], y [N, 2]), which depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    y = x[:, :2] * x[:, 1:3] + 0.5 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def kernel(a, b, bandwidth=1.0):
    return math.exp(-((a - b) ** 2).sum().item() / (2 * bandwidth**2))


# -- the sums, entry by entry ---------------------------------------------------------------------------


def test_information_is_the_log_ratio_of_its_three_means():
    x, t = samples(7)
    n = range(7)
    k = [[kernel(x[i], x[j], 0.8) for j in n] for i in n]
    q = [[kernel(t[i], t[j], 1.7) for j in n] for i in n]
    joint = sum(k[i][j] * q[i][j] for i in n for j in n) / 7**2
    margins = sum(map(sum, k)) * sum(map(sum, q)) / 7**4
    between = sum(sum(k[j]) * sum(q[j]) for j in n) / 7**3
    expected = math.log(joint) + math.log(margins) - 2 * math.log(between)
    assert cs_information(x, t, 0.8, 1.7).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weighting", ["row", "both"])
def test_the_conditional_divergence_is_its_three_weighted_sums(weighting):
    x, y = samples(7)
    answer = y.flip(0) / 2
    n = range(7)
    s = [sum(kernel(x[j], x[i], 1.3) for i in n) for j in n]

    def total(a, b):
        return sum(
            kernel(x[j], x[i], 1.3) * kernel(a[j], b[i], 0.6) / (s[j] * s[j if weighting == "row" else i])
            for i in n
            for j in n
        )

    expected = math.log(total(y, y)) + math.log(total(answer, answer)) - 2 * math.log(total(answer, y))
    assert conditional_cs(x, y, answer, 1.3, 0.6, weighting).item() == pytest.approx(expected, abs=1e-12)


# -- information ----------------------------------------------------------------------------------------


def test_information_about_a_fair_bit_far_apart_is_log_two():
    # Two points, each half the time: the joint has 2 cells of 1/2, the product 4 of 1/4. -2 log cos.
    x = torch.tensor([[0.0], [1e3]], dtype=torch.float64).repeat(4, 1)
    assert cs_information(x, x).item() == pytest.approx(math.log(2), abs=1e-12)
    assert cs_information(x, x[:4].repeat_interleave(2, 0)).item() == pytest.approx(0.0, abs=1e-12)


def test_information_between_gaussians_tends_to_its_closed_form():
    # With kernels of width s, densities are smoothed by s / sqrt 2: all integrals are of Gaussians.
    # <joint, joint> = N(0; 2 A), <margins, margins> = N(0; 2 D), <joint, margins> = N(0; A + D), where A is
    # the smoothed covariance and D its diagonal; log of determinants remains.
    correlation, width, count = 0.8, 0.7, 2000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    t = correlation * x + math.sqrt(1 - correlation**2) * noise
    a = torch.tensor([[1.0, correlation], [correlation, 1.0]]) + torch.eye(2) * width**2 / 2
    d = torch.diag(a.diagonal())
    expected = torch.logdet(a + d) - (torch.logdet(2 * a) + torch.logdet(2 * d)) / 2
    assert cs_information(x, t, width, width).item() == pytest.approx(expected.item(), rel=0.05)


def test_information_is_symmetric_and_not_negative():
    for seed in range(20):
        x, t = samples(12, seed=seed)
        forward = cs_information(x, t, 0.7, 1.1)
        close(forward, cs_information(t, x, 1.1, 0.7), 1e-12)
        assert forward >= 0


def test_a_constant_tells_nothing():
    x, _ = samples()
    t = torch.full((20, 4), 3.0, dtype=torch.float64, requires_grad=True)
    for information in (cs_information, normalised_cs_information):
        value = information(x, t)
        assert value.item() == pytest.approx(0.0, abs=1e-12)
        assert torch.autograd.grad(value, t, allow_unused=True)[0].isfinite().all()


def test_information_falls_with_the_scale_of_the_features_and_its_normalised_form_does_not():
    x, t = samples()
    small, smaller = 1e-2 * t, 1e-3 * t
    assert cs_information(x, small) / cs_information(x, smaller) == pytest.approx(100, rel=1e-3)
    assert normalised_cs_information(x, small) == pytest.approx(
        normalised_cs_information(x, smaller).item(), rel=1e-3
    )
    single = normalised_cs_information(x.float(), smaller.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(normalised_cs_information(x, smaller).item(), rel=1e-4)
    assert normalised_cs_information(x, x).item() == pytest.approx(1.0)


# -- conditional divergence -----------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["row", "both"])
def test_right_answers_diverge_by_nothing(weighting):
    x, y = samples()
    assert conditional_cs(x, y, y.clone(), weighting=weighting).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("weighting", ["row", "both"])
def test_inputs_far_apart_are_compared_one_by_one(weighting):
    _, y = samples()
    x = 1e3 * torch.arange(20.0, dtype=torch.float64).unsqueeze(1)
    answer = y.flip(0)
    overlap = (-(y - answer).square().sum(1) / 2).exp().mean()
    close(conditional_cs(x, y, answer, weighting=weighting), -2 * overlap.log(), 1e-12)


@pytest.mark.parametrize("weighting", ["row", "both"])
def test_inputs_that_are_alike_leave_the_divergence_of_the_clouds(weighting):
    _, y = samples()
    x, answer = torch.zeros(20, 3, dtype=torch.float64), y.flip(0) + 0.3
    expected = CauchySchwarz(0.9).between(y, answer)
    close(conditional_cs(x, y, answer, 1.0, 0.9, weighting), expected, 1e-12)


def test_a_wide_kernel_on_answers_prices_half_their_weighted_squared_distances():
    # To first order in 1 / bandwidth^2 the logs are linear: sums of W d^2 / 2, over the sum of W.
    x, y = samples()
    answer, width = y.flip(0), 1e4
    k = (-torch.cdist(x, x).square() / 2).exp()
    w = k / k.sum(1, keepdim=True) / k.sum(1)
    w = w / w.sum()

    def spread(a, b):
        return (w * torch.cdist(a, b).square()).sum() / 2

    expected = (2 * spread(answer, y) - spread(y, y) - spread(answer, answer)) / width**2
    close(conditional_cs(x, y, answer, 1.0, width, "both") * width**2, expected * width**2, 1e-4)


def test_weighted_on_both_sides_it_is_symmetric_and_never_negative():
    for seed in range(40):
        x, y = samples(8, seed=seed)
        answer = samples(8, seed=100 + seed)[1]
        value = conditional_cs(x, y, answer, weighting="both")
        close(value, conditional_cs(x, answer, y, weighting="both"), 1e-12)
        assert value >= 0


def test_weighted_by_rows_it_can_prefer_wrong_answers():
    x = torch.tensor([[0.2], [0.3], [1.6]], dtype=torch.float64)
    y = torch.tensor([[4.0], [2.0], [2.0]], dtype=torch.float64)
    wrong = torch.tensor([[2.0], [4.0], [2.0]], dtype=torch.float64)
    assert conditional_cs(x, y, wrong).item() == pytest.approx(-0.006586, abs=1e-6)
    assert conditional_cs(x, y, wrong, weighting="both").item() == pytest.approx(0.003362, abs=1e-6)


# -- units, ranges, shapes ------------------------------------------------------------------------------


def scaled(function, monkeypatch, factors):
    """`function` with every log Gram matrix shifted by the logarithm of a factor, in turn."""
    from fdiv.estimate import cauchy_schwarz

    gram, left = cauchy_schwarz._log_gram, iter(factors)
    monkeypatch.setattr(cauchy_schwarz, "_log_gram", lambda *a: gram(*a) + math.log(next(left)))
    value = function()
    monkeypatch.undo()
    return value


def test_the_scale_of_a_kernel_cancels(monkeypatch):
    x, y = samples()
    answer = y.flip(0)
    plain = cs_information(x, y)
    close(scaled(lambda: cs_information(x, y), monkeypatch, (3.0, 1e-5)), plain, 1e-12)
    plain = conditional_cs(x, y, answer)
    close(scaled(lambda: conditional_cs(x, y, answer), monkeypatch, (7.0, 1e-4, 1e-4, 1e-4)), plain, 1e-12)


@pytest.mark.parametrize("distance", [1e2, 1e4, 1e8])
def test_far_answers_have_finite_values_and_gradients_in_float32(distance):
    x, y = samples(dtype=torch.float32)
    answer = (y + distance).requires_grad_()
    for weighting in ("row", "both"):
        value = conditional_cs(distance * x, y, answer, weighting=weighting)
        (slope,) = torch.autograd.grad(value, answer)
        assert value.isfinite()
        assert slope.isfinite().all()
        assert slope.sum() > 0
    features = (distance * y).requires_grad_()
    value = cs_information(x, features)
    assert value.isfinite()
    assert torch.autograd.grad(value, features)[0].isfinite().all()


def test_a_far_answer_costs_the_square_of_its_distance():
    # y and answer are both one point: all three Gram matrices are constant. The sum of squared errors of the
    # whole batch, over ln 2, is what a Gram matrix of shape [N] instead of [N, 1] gives.
    x, _ = samples(dtype=torch.float32)
    y, answer = torch.zeros(20, 1), torch.full((20, 1), 300.0)
    assert conditional_cs(x, y, answer).item() == pytest.approx(300.0**2, rel=1e-6)


def test_gradients_are_those_of_finite_differences():
    x, y = samples(6)
    answer = y.flip(0).requires_grad_()
    t = samples(6, seed=3)[1].requires_grad_()
    for weighting in ("row", "both"):
        assert torch.autograd.gradcheck(lambda a, w=weighting: conditional_cs(x, y, a, weighting=w), answer)
    assert torch.autograd.gradcheck(lambda t: cs_information(x, t), t)
    assert torch.autograd.gradcheck(lambda t: normalised_cs_information(x, t), t)


def test_targets_without_a_second_dimension_are_refused_by_name():
    x, y = samples()
    with pytest.raises(ValueError, match=r"\(N, 1\): write y\.unsqueeze\(-1\)"):
        conditional_cs(x, y[:, 0], y[:, :1])
    with pytest.raises(ValueError, match=r"answer\.unsqueeze\(-1\)"):
        conditional_cs(x, y[:, :1], y[:, 0])


def test_samples_that_do_not_belong_together_are_refused():
    x, y = samples()
    with pytest.raises(ValueError, match="row by row"):
        cs_information(x, y[:10])
    with pytest.raises(ValueError, match="differ in shape"):
        conditional_cs(x, y, y[:, :1])
    with pytest.raises(ValueError, match="'row' or 'both'"):
        conditional_cs(x, y, y, weighting="column")
    with pytest.raises(ValueError, match="bandwidth"):
        conditional_cs(x, y, y, 0.0)


def test_images_are_rows_of_their_places():
    x, y = samples(width=4)
    close(cs_information(x.reshape(20, 1, 2, 2), y), cs_information(x, y), 1e-12)
