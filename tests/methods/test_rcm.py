"""Consistency: a tangent that vanishes at the flow map; its DMD term; samples in one step and in several."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.methods.one_step import F64, gradients, networks
from tests.worlds import close, gradient

from fdiv import ReverseKL
from fdiv.diffusion.edm import spread_to
from fdiv.methods._method import Method
from fdiv.methods.generate._critic import Critic
from fdiv.methods.generate._student import Compared, Turn
from fdiv.methods.generate.f_distill import FDistill
from fdiv.methods.generate.levels import Karras, LogLogistic, LogNormal, drawn
from fdiv.methods.generate.rcm import RCM, raw, tangent_of

TIMES = torch.tensor([1e-3, 0.1, 0.7, 1.2, 1.5, 1.57, math.pi / 2 - 1e-6], dtype=F64)


def gaussian(scale, sigma_data):
    """(denoiser of N(0, scale^2), its flow map as a network(x, sigma)) in the convention of EDM."""

    def denoiser(x, sigma):
        sigma = spread_to(sigma, x)
        return scale**2 * x / (scale**2 + sigma**2)

    def flow(x, sigma):
        return x * scale / (scale**2 + spread_to(sigma, x) ** 2).sqrt()

    return denoiser, flow


@pytest.mark.parametrize(("scale", "sigma_data"), [(0.7, 1.0), (1.3, 1.0), (0.4, 0.5)])
def test_the_tangent_vanishes_at_the_flow_map_of_a_gaussian(scale, sigma_data):
    denoiser, flow = gaussian(scale, sigma_data)
    torch.manual_seed(0)
    x = torch.randn(len(TIMES), 3, dtype=F64)
    slope = sigma_data * raw(denoiser, sigma_data)(x, TIMES)
    cos, sin = TIMES.cos().unsqueeze(1), TIMES.sin().unsqueeze(1)
    # Of sigma_data noise, the process has variance s^2 cos^2 + sigma_data^2 sin^2.
    variance = scale**2 * cos**2 + sigma_data**2 * sin**2
    close(slope, sin * cos * (sigma_data**2 - scale**2) * x / variance, 1e-9)
    _, tangent = tangent_of(raw(flow, sigma_data), x, TIMES, slope, 1.0, sigma_data)
    assert tangent.abs().max() < 1e-11
    other = gaussian(1.5 * scale, sigma_data)[1]
    assert tangent_of(raw(other, sigma_data), x, TIMES, slope, 1.0, sigma_data)[1].abs().max() > 0.05


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
def test_the_tangent_is_its_formula_with_the_derivative_along_the_teachers_path(rho):
    q, p = networks()
    torch.manual_seed(0)
    x, t = torch.randn(6, 2, dtype=F64), torch.rand(6, dtype=F64) * 1.3 + 0.1
    student, h = raw(q, 0.5), 1e-5
    slope = 0.5 * raw(p, 0.5)(x, t)
    here, tangent = tangent_of(student, x, t, slope, rho, 0.5)
    with torch.no_grad():
        ahead, behind = student(x + h * slope, t + h), student(x - h * slope, t - h)
        cos, sin = t.cos().unsqueeze(1), t.sin().unsqueeze(1)
        change = (ahead - behind) / (2 * h)
        expected = -cos * (1 - rho**2 * sin**2).sqrt() * (0.5 * here - slope)
        expected = expected - rho * cos * sin * (x + 0.5 * change)
    close(tangent, expected, 1e-7)
    assert here.requires_grad and not tangent.requires_grad
    # At rho = 1 it is cos t times the change of f = cos t x - sin t sigma_data F, the student's prediction.
    if rho == 1.0:

        def f(x, t):
            return t.cos().unsqueeze(1) * x - t.sin().unsqueeze(1) * 0.5 * student(x, t)

        close(tangent, cos * (f(x + h * slope, t + h) - f(x - h * slope, t - h)).detach() / (2 * h), 1e-6)


def test_wrapped_in_trigonometry_a_denoiser_is_itself():
    q, _ = networks()
    x, t = torch.randn(5, 2, dtype=F64), torch.rand(5, dtype=F64) + 0.2
    cos, sin = t.cos().unsqueeze(1), t.sin().unsqueeze(1)
    found = cos * x - sin * 0.5 * raw(q, 0.5)(x, t)
    close(found, q(x / cos, 0.5 * t.tan()))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tangents_do_not_blow_up_where_all_is_noise(dtype):
    q, p = (n.to(dtype) for n in networks())
    t = torch.tensor([1e-3, 1.0, 1.5, 1.57, 1.5705], dtype=dtype)
    x = 0.5 * torch.randn(5, 2, dtype=dtype)
    with torch.no_grad():
        slope = 0.5 * raw(p, 0.5)(x, t)
    _, tangent = tangent_of(raw(q, 0.5), x, t, slope, 1.0, 0.5)
    assert tangent.isfinite().all() and tangent.abs().max() < 50


def test_the_consistency_loss_moves_f_by_the_tangent_over_its_softened_norm():
    q, p = networks()
    torch.manual_seed(2)
    inputs = torch.randn(7, 2, dtype=F64)
    method = RCM(dmd=0.0)
    rows, metrics = method._consistency(inputs, q, p, None, 0.5)
    torch.manual_seed(2)
    torch.randn(7, 2, dtype=F64)
    sigma = drawn(method.levels, inputs).sigma
    t = (sigma / 0.5).atan()
    cos, sin = t.cos().unsqueeze(1), t.sin().unsqueeze(1)
    x = cos * inputs + sin * 0.5 * torch.randn_like(inputs)
    with torch.no_grad():
        slope = 0.5 * raw(p, 0.5)(x, t)
    here, tangent = tangent_of(raw(q, 0.5), x, t, slope, 0.5, 0.5)
    norm = tangent.norm(dim=1, keepdim=True)
    step = tangent / (norm + 0.1)
    close(rows, step.square().sum(1))
    expected = gradient(-2 * (step * here).sum(), *q.parameters())
    close(gradient(rows.sum(), *q.parameters()), expected, 1e-9)
    assert metrics["tangent_norm"].item() == pytest.approx(norm.mean().item())


def test_its_dmd_term_is_twice_that_of_f_distill_summed_over_coordinates():
    q, p = networks()
    method = RCM(dmd_levels=LogNormal())
    module = method.beside(q, p).double()
    for weight in module.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    made = torch.randn(5, 2, dtype=F64, requires_grad=True)
    torch.manual_seed(1)
    found = method._dmd(made, q, p, module, None)
    torch.manual_seed(1)
    level = drawn(LogNormal(), made)
    x = (made + level.sigma.unsqueeze(1) * torch.randn_like(made)).detach()
    seen = Compared(x, level, Critic().denoiser(module, q)(x, level.sigma), p(x, level.sigma))
    other = FDistill(ReverseKL(), gan=0.0).learns(Turn(made, made, None, q, p, module, {}), seen)[0]
    close(found, 4 * other)
    close(gradient(found.sum(), made), gradient(4 * other.sum(), made))


def step(method, n, inputs=None):
    q, p = networks()
    module = method.beside(q, p).double()
    torch.manual_seed(0)
    inputs = torch.randn(8, 2, dtype=F64) if inputs is None else inputs
    out = method(inputs=inputs, labels=inputs, network=q, p_network=p, module=module, step=n)
    out.loss.backward()
    assert all(g is None for g in gradients(p))
    return out, gradients(q), gradients(module)


def test_the_student_warms_up_by_consistency_alone_and_then_waits_for_its_critic():
    method = RCM(warmup=3, every=2)
    assert isinstance(method, Method) and method.divergence == ReverseKL()
    moved = [any(g is not None for g in step(method, n)[1]) for n in range(8)]
    assert moved == [True, True, True, True, False, True, False, True]
    for n in (0, 3, 4):
        out, _, critics = step(method, n)
        assert all(g is not None and g.isfinite().all() for g in critics)
        assert ("tangent_norm" in out.metrics) == (n != 4) and "fake_score_loss" in out.metrics


def test_without_dmd_it_is_scm_and_nothing_is_trained_beside_the_student():
    method = RCM(dmd=0.0, warmup=2)
    for n in range(5):
        out, student, critics = step(method, n)
        assert all(g is not None and g.isfinite().all() for g in student) and not critics
        assert out.metrics.keys() == {"tangent_norm"}


def test_consistency_alone_keeps_a_student_that_is_the_flow_map():
    denoiser, flow = gaussian(0.7, 0.5)
    inputs = 0.7 * torch.randn(64, 2, dtype=F64)
    rows, metrics = RCM(dmd=0.0)._consistency(inputs, flow, denoiser, None, 1.0)
    assert rows.max() < 1e-18 and metrics["tangent_norm"] < 1e-9


def test_samples_are_a_function_of_the_noise_in_as_many_steps_as_there_are_times():
    asked = []

    def network(x, sigma):
        asked.append(sigma[0].item())
        return 0.5 * x / spread_to(sigma, x)

    noise = torch.randn(4, 2, dtype=F64)
    one = replace(RCM(), times=()).sample(network, noise)
    assert asked == [80.0]
    close(one, 0.5 * noise)
    asked.clear()
    torch.manual_seed(1)
    first = RCM().sample(network, noise)
    assert asked == pytest.approx([80.0, *(0.5 * math.tan(t) for t in (1.3, 1.0, 0.6))])
    torch.manual_seed(2)
    assert torch.equal(RCM().sample(network, noise), first) and not torch.equal(first, one)
    assert not torch.equal(RCM().sample(network, -noise), first)


def test_the_flow_map_samples_its_gaussian_in_any_number_of_steps():
    _, flow = gaussian(0.7, 0.5)
    torch.manual_seed(0)
    noise = torch.randn(20_000, 1, dtype=F64)
    for times in ((), (1.0,), (1.3, 1.0, 0.6)):
        made = replace(RCM(), times=times).sample(flow, noise)
        assert made.std().item() == pytest.approx(0.7, abs=0.02)


def test_the_student_is_simulated_in_one_to_all_its_steps_and_the_last_has_the_gradient():
    calls = []

    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, x, sigma):
            calls.append((torch.is_grad_enabled(), sigma))
            return self.scale * x / spread_to(sigma, x)

    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        calls.clear()
        made = RCM()._simulated(Counted(), torch.zeros(5, 2, dtype=F64), None)
        assert made.requires_grad and [enabled for enabled, _ in calls] == [False] * (len(calls) - 1) + [True]
        levels = [sigma for _, sigma in calls]
        assert all((b <= a).all() for a, b in pairwise(levels))
        seen.add(len(calls))
    assert seen == {1, 2, 3, 4}


def test_laws_of_levels_are_those_of_the_code_in_units_of_sigma_data():
    u = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    shifted = 5 * u / (1 + 4 * u)  # the time of a flow, whose sigma is time / (1 - time)
    close(LogLogistic(2.5).quantile(u), 0.5 * shifted / (1 - shifted))
    law = torch.distributions.Normal(torch.tensor(-1.5, dtype=F64), 1.6)
    close(LogNormal(-1.5, 1.6).quantile(u), law.icdf(u).exp(), 1e-9)
    close(Karras(most=24.4).quantile(u), Karras().quantile(0.8 * u), 2e-3)
    close(Karras(0.1, 10.0).quantile(torch.tensor([0.0, 1.0], dtype=F64)), torch.tensor([0.1, 10], dtype=F64))


def test_drawn_levels_follow_their_law_and_are_never_0():
    torch.manual_seed(0)
    for law in (Karras(), LogNormal(), LogLogistic()):
        level = drawn(law, torch.zeros(4000, 1))
        assert level.sigma.dtype == torch.float32 and (level.sigma > 0).all() and level.sigma.isfinite().all()
        assert level.rank.mean().item() == pytest.approx(0.5, abs=0.02)
        close(law.quantile(level.rank).float(), level.sigma)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"consistency": 0.0, "dmd": 0.0}, "trains nothing"),
        ({"consistency": -1.0}, "consistency"),
        ({"times": (0.6, 1.0)}, "times"),
        ({"times": (1.6,)}, "times"),
        ({"warmup": -1}, "head_start"),
        ({"sigma_data": 0.0}, "sigma_data"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RCM(**options)


@pytest.mark.parametrize(
    "make",
    [lambda: Karras(1.0, 0.5), lambda: LogNormal(0.0, 0.0), lambda: LogLogistic(-1.0)],
)
def test_laws_of_no_noise_are_refused(make):
    with pytest.raises(ValueError, match="takes"):
        make()
