"""Samples far from u = 1: values and gradients that do not overflow, and the numbers that count them."""

import math
from itertools import product

import pytest
import torch
from tests.worlds import (
    DIVERGENCES,
    LOG_BEHAVIOUR,
    LOG_P,
    close,
    each_divergence,
    gradient,
    six_symbols,
)

import fdiv
from fdiv import MonteCarlo
from fdiv.estimate import _far

SAMPLES = ("q", "p", "behaviour")
ESTIMATORS = (
    *(MonteCarlo(s, g) for s in SAMPLES for g in ("score", "importance")),
    MonteCarlo("q", "potential"),
    MonteCarlo("q", "straight-through"),
)
each_source = pytest.mark.parametrize("estimator", [MonteCarlo(s) for s in SAMPLES], ids=repr)

STEEP = (fdiv.Alpha(4.0), fdiv.Alpha(-3.0), fdiv.ChiKL(0.5).reverse)


def everything(dtype):
    """log p, log q and log behaviour at the edges of what can arrive, every combination of them."""
    ends = (-1.0, -60.0, -1e4, -1e30, -math.inf)
    return (torch.tensor(column, dtype=dtype) for column in zip(*product(ends, repeat=3), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *STEEP], ids=repr)
def test_no_log_probability_makes_value_or_gradient_overflow(divergence, dtype):
    log_p, log_q, log_behaviour = everything(dtype)
    log_q.requires_grad_()
    for estimator in ESTIMATORS:
        tensors = (log_p, log_q, log_behaviour)[: len(estimator.evidence)]
        assert estimator(divergence, *tensors, control=0.5).isfinite().all()
        surrogate = estimator.surrogate(divergence, *tensors)
        assert surrogate.isfinite().all()
        assert torch.autograd.grad(surrogate.sum(), log_q)[0].isfinite().all(), estimator


@each_divergence
def test_inside_the_caps_nothing_is_touched(divergence):
    log_ratio = torch.linspace(-300, 300, 41, dtype=torch.float64)
    nothing = torch.zeros_like(log_ratio)
    assert torch.equal(MonteCarlo()(divergence, log_ratio, nothing), divergence.f(log_ratio))
    of_p = MonteCarlo("p")(divergence, nothing, log_ratio)
    assert torch.equal(of_p, divergence.reverse.f(log_ratio))
    tame = torch.linspace(-300, 300, 41, dtype=torch.float64) / 3
    weighted = MonteCarlo("behaviour")(divergence, tame, nothing, -tame)
    assert torch.equal(weighted, tame.exp() * divergence.f(tame))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_divergence
def test_beyond_a_cap_the_value_is_a_line_that_keeps_value_and_slope(divergence, dtype):
    cap = 38.0 if dtype == torch.float32 else 300.0
    sides = (1.0,) if math.isfinite(divergence.f_at_zero) else (1.0, -1.0)
    for side in sides:
        x = side * torch.tensor([cap, cap + 1.0, cap + 1001.0, cap + 2001.0], dtype=dtype)
        x.requires_grad_()
        value = MonteCarlo()(divergence, x, torch.zeros_like(x))
        at_cap = (side * torch.tensor(cap, dtype=torch.float64)).requires_grad_()
        slope = gradient(divergence.f(at_cap), at_cap).item()
        expected = divergence.f(at_cap.detach()) + side * slope * (x.detach().double().abs() - cap)
        close(value.double(), expected, 1e-6 if dtype == torch.float32 else 1e-13)
        slopes = torch.autograd.grad(value.sum(), x)[0][1:].double()
        close(slopes, torch.full_like(slopes, slope), 1e-6)  # a clamp's would be 0
        assert slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_divergence
def test_an_atom_that_p_lacks_costs_the_limit_of_f_where_there_is_one(divergence, dtype):
    empty = torch.tensor([-math.inf], dtype=dtype)
    value = MonteCarlo()(divergence, empty, torch.full_like(empty, -2.0))
    if math.isfinite(divergence.f_at_zero):
        close(value, torch.full_like(value, divergence.f_at_zero), 1e-6)
    else:
        nearly = MonteCarlo()(divergence, torch.full_like(empty, -9000.0), torch.full_like(empty, -2.0))
        assert nearly < value < math.inf


def test_far_weights_go_on_as_a_line_in_the_value_and_in_both_gradients():
    log_q = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    log_p, log_behaviour = log_q.detach() - 1, -torch.tensor([301.0, 401.0], dtype=torch.float64)
    for mode in ("score", "importance"):
        estimator = MonteCarlo("behaviour", mode)
        value = estimator.surrogate(fdiv.JS(0.1), log_p, log_q, log_behaviour)
        line = 1 + torch.tensor([1.0, 101.0], dtype=torch.float64)
        close(value, math.exp(300) * line * fdiv.JS(0.1).f(log_p), 1e-12)
        assert torch.autograd.grad(value.sum(), log_q)[0].isfinite().all()


def test_a_product_too_large_for_the_dtype_goes_on_as_a_line_in_its_logarithm():
    for dtype, limit in ((torch.float32, 78.0), (torch.float64, 690.0)):
        value = -torch.tensor([1.0, 2.0, 3.0], dtype=dtype).exp()
        log_weight = (limit + torch.tensor([-1.0, 0.0, 997.0], dtype=dtype) - value.abs().log()).clamp(
            max=2e3
        )
        log_weight.requires_grad_()
        product = _far.weighted(log_weight, value)
        line = -torch.tensor([math.exp(-1), 1.0, 998.0], dtype=dtype)
        close(product / math.exp(limit), line, 2e-5 if dtype == torch.float32 else 1e-12)
        slopes = torch.autograd.grad(product.sum(), log_weight)[0] / math.exp(limit)
        close(slopes[2], torch.tensor(-1.0, dtype=dtype), 1e-3)


def test_where_neither_density_has_mass_there_is_nothing_to_pay():
    empty = torch.tensor([-math.inf], requires_grad=True)
    for estimator in ESTIMATORS:
        tensors = (empty.detach(), empty, empty.detach())[: len(estimator.evidence)]
        assert not estimator.surrogate(fdiv.ReverseKL(), *tensors).any()


def test_half_precision_is_subtracted_in_float32():
    log_p, log_q = torch.tensor([-3.0]).bfloat16(), torch.tensor([-3.015625]).bfloat16()
    value = MonteCarlo()(fdiv.ReverseKL(), log_p, log_q)
    assert value.dtype == torch.float32
    close(value, fdiv.ReverseKL().f(log_p.float() - log_q.float()), 1e-7)


# -- what to log ---------------------------------------------------------------------------------------

COUNTS = (torch.arange(6).repeat_interleave(torch.tensor([1, 3, 5, 5, 4, 2])), 20)  # as LOG_BEHAVIOUR


def batch(estimator, log_p, log_q):
    index, _ = COUNTS
    return [t[index] for t in (log_p, log_q, LOG_BEHAVIOUR)[: len(estimator.evidence)]]


@each_source
def test_the_effective_sample_size_of_a_perfect_sample_is_one_over_one_plus_chi_square(estimator):
    """Drawn in proportion from the sampler, here always LOG_BEHAVIOUR."""
    _, other = six_symbols()
    log_p = LOG_BEHAVIOUR if estimator.samples == "p" else LOG_P
    log_q = LOG_BEHAVIOUR if estimator.samples == "q" else other
    target = log_p if estimator.samples == "q" else log_q
    ess = estimator.diagnostics(*batch(estimator, log_p, log_q))["ess"]
    close(ess, (1 / (1 + fdiv.Pearson()(target, LOG_BEHAVIOUR))).detach())
    assert not ess.requires_grad


def test_equal_weights_are_all_effective_and_one_large_one_is_alone():
    same = torch.full((4, 5), -3.0, dtype=torch.float64)
    for estimator in (MonteCarlo(s) for s in SAMPLES):
        tensors = [same] * len(estimator.evidence)
        close(estimator.diagnostics(*tensors)["ess"], torch.tensor(1.0).double())
    alone = same.clone()
    alone[1, 2] = -200.0
    close(
        MonteCarlo("behaviour").diagnostics(same, same, alone)["ess"],
        torch.tensor(1 / 20, dtype=torch.float64),
    )
    half = torch.where(torch.arange(5) < 2, -math.inf, same)
    close(MonteCarlo().diagnostics(half, same)["ess"], torch.tensor(3 / 5, dtype=torch.float64))


def test_what_goes_on_as_a_line_is_counted():
    log_q = torch.full((8,), -1.0, dtype=torch.float64)
    log_p = log_q + torch.tensor([0, 300, 301, -301, math.inf, -math.inf, -299, 1e4], dtype=torch.float64)
    close(MonteCarlo().diagnostics(log_p, log_q)["linearised"], torch.tensor(5 / 8).double())
    assert MonteCarlo().diagnostics(log_p.float(), log_q.float())["linearised"] == 7 / 8
    drawn = log_q - torch.tensor(
        [301.0] + 7 * [-301.0], dtype=torch.float64
    )  # a weight of e^-301 needs no line
    close(
        MonteCarlo("behaviour").diagnostics(log_p, log_q, drawn)["linearised"], torch.tensor(6 / 8).double()
    )


def test_masked_samples_count_in_no_diagnostic():
    log_p, log_q = (t.detach()[:4] for t in (LOG_P, six_symbols()[1]))
    rubbish = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    mask = torch.arange(7) < 4
    plain = MonteCarlo().diagnostics(log_p, log_q)
    for other in (rubbish, rubbish.flip(0)):
        masked = MonteCarlo().diagnostics(torch.cat([log_p, rubbish]), torch.cat([log_q, other]), mask=mask)
        assert {k: v.item() for k, v in masked.items()} == {k: v.item() for k, v in plain.items()}
    none = MonteCarlo().diagnostics(log_p, log_q, mask=mask[4:].new_zeros(4))
    assert none == {"ess": 0, "linearised": 0}
    empty = MonteCarlo().diagnostics(log_p[:0], log_q[:0])
    assert empty == {"ess": 0, "linearised": 0}
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        MonteCarlo().diagnostics(log_p, log_q, mask=torch.ones(4))
    with pytest.raises(ValueError, match="differ in shape"):
        MonteCarlo().diagnostics(log_p, log_q, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_no_log_probability_makes_a_diagnostic_overflow(dtype):
    tensors = list(everything(dtype))
    for estimator in (MonteCarlo(s) for s in SAMPLES):
        for rows in ([slice(None)], range(len(tensors[0]))):
            for row in rows:
                seen = estimator.diagnostics(
                    *(t[row].reshape(-1) for t in tensors[: len(estimator.evidence)])
                )
                assert all(0 <= value <= 1 + 1e-6 for value in seen.values())


def test_off_policy_diagnostics_need_the_behaviour_policy():
    with pytest.raises(TypeError, match="needs log_behaviour"):
        MonteCarlo("behaviour").diagnostics(LOG_P, LOG_P)
