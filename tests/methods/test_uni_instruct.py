"""The expansion of a divergence over noise, its gradient under every f, and the methods that it contains."""

import math
from dataclasses import replace

import pytest
import torch
from tests.methods.one_step import (
    ALL_RATIOS,
    F64,
    divergence_at,
    gradients,
    line,
    networks,
    on_a_grid,
    student,
    teacher,
)
from tests.worlds import close, each_smooth_divergence, gradient

from fdiv import JS, KL, TV, Jeffreys, Neyman, ReverseKL, SquaredHellinger
from fdiv._math import derivative
from fdiv.diffusion.edm import spread_to
from fdiv.methods._method import Method
from fdiv.methods.generate._critic import Critic, Known
from fdiv.methods.generate._one_step import weights
from fdiv.methods.generate._student import Compared, Turn
from fdiv.methods.generate.levels import Drawn, Karras, LogNormal, drawn, stretch
from fdiv.methods.generate.sid import identity
from fdiv.methods.generate.sim import distance_slope
from fdiv.methods.generate.uni_instruct import UniInstruct, expanded, with_slope

EXACT = UniInstruct(ReverseKL(), gan=0.0, weight="score", ratio=ALL_RATIOS, bins=0, critic=Known())


def fisher(divergence, p, q, sigma):
    """E_q[h |s_q - s_p|^2] at one level by quadrature, differentiable in q."""
    x, step = line()
    log_p, log_q = p.log_prob(x, sigma), q.log_prob(x, sigma)
    level = torch.tensor(sigma, dtype=F64)
    apart = (q.denoise(x, level) - p(x, level)).squeeze(1) / sigma**2
    return (log_q.exp() * divergence.curvature(log_p - log_q) * apart.square()).sum() * step


def rows(method: UniInstruct, q, p, made, seen: Compared):
    return method.learns(Turn(made, made, None, q, p, None, {}), seen)[0]


# -- the theorem ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [KL(), JS(0.5), SquaredHellinger(), Neyman()], ids=repr)
def test_a_divergence_is_the_integral_of_its_weighted_differences_of_scores(divergence):
    # Gaussians again, at every level: known to quadrature without a network.
    q, p = student(0.5, 1.1), teacher((0.0, 1.2, 1.0))
    with torch.no_grad():
        sigmas = torch.logspace(-4, math.log10(200), 120, dtype=F64)
        x, step = torch.linspace(-12, 12, 401, dtype=F64).unsqueeze(1), 0.06
        values = []
        for sigma in sigmas.tolist():
            at = x * max(1.0, sigma)
            log_p, log_q = p.log_prob(at, sigma), q.log_prob(at, sigma)
            apart = (q.denoise(at, sigma) - p(at, sigma)).squeeze(1) / sigma**2
            h = divergence.curvature(log_p - log_q)
            values.append((log_q.exp() * h * apart.square()).sum() * step * max(1.0, sigma))
        integral = torch.trapezoid(torch.stack(values) * sigmas**2, sigmas.log())  # sigma dsigma
        expected = divergence_at(divergence, p, q, 0.0)
    assert integral.item() == pytest.approx(expected.item(), rel=2e-4)


@each_smooth_divergence
@pytest.mark.parametrize("sigma", [0.6, 1.5])
def test_the_loss_has_the_gradient_of_the_weighted_difference_of_scores(divergence, sigma):
    q, p = student(0.3, 1.05), teacher((0.0, 1.15, 1.0))
    made, seen, weight = on_a_grid(q, p, sigma, points=64, through=True)
    found = (weight * rows(replace(EXACT, divergence=divergence), q, p, made, seen)).sum()
    expected = fisher(divergence, p, q, sigma)
    close(gradient(found, q.mean, q.log_scale), gradient(expected, q.mean, q.log_scale), 1e-6)


@pytest.mark.parametrize("divergence", [KL(), JS(0.5), 0.4 * KL() + 0.6 * ReverseKL()], ids=repr)
def test_it_holds_for_a_mixture(divergence):
    q, p = student(0.3, 1.3), teacher((-1.0, 0.8, 0.4), (1.0, 0.9, 0.6))
    made, seen, weight = on_a_grid(q, p, 0.8, points=96, through=True)
    found = (weight * rows(replace(EXACT, divergence=divergence), q, p, made, seen)).sum()
    expected = fisher(divergence, p, q, 0.8)
    close(gradient(found, q.mean, q.log_scale), gradient(expected, q.mean, q.log_scale), 1e-5)


def test_under_the_expansions_weight_all_levels_together_are_the_divergence_itself():
    q, p, divergence = student(0.4, 1.1), teacher((0.0, 1.2, 1.0)), JS(0.5)
    method = replace(EXACT, divergence=divergence, weight="expansion", levels=Karras(1e-3, 100.0))
    total, count = torch.zeros(2, dtype=F64), 40
    for n in range(count):  # the quantiles of the levels, one after another
        rank = torch.tensor([(n + 0.5) / count], dtype=F64)
        sigma = method.levels.quantile(rank).item()
        made, seen, weight = on_a_grid(q, p, sigma, points=32, through=True)
        seen = seen._replace(level=Drawn(seen.level.sigma, rank.expand(len(made))))
        loss = (weight * rows(method, q, p, made, seen)).sum() / count
        total = total + gradient(loss, q.mean, q.log_scale)
    close(total, gradient(divergence_at(divergence, p, q, 0.0), q.mean, q.log_scale), 2e-3)


def test_the_stretch_of_a_law_is_one_over_its_density():
    rank = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=F64)
    close(stretch(LogNormal(-0.5, 0.3), rank), density(rank, -0.5, 0.3).reciprocal(), 1e-9)
    apart = (Karras(0.01, 5.0).quantile(rank + 1e-6) - Karras(0.01, 5.0).quantile(rank - 1e-6)) / 2e-6
    close(stretch(Karras(0.01, 5.0), rank), apart, 1e-8)


def density(rank, mean, std):
    law = torch.distributions.LogNormal(torch.tensor(mean, dtype=F64), std)
    return law.log_prob(law.icdf(rank)).exp()


# -- what it contains -------------------------------------------------------------------------------------


def at_random(seed=0):
    """(made, seen, log r with a gradient) of two small networks, gradients through all of x."""
    q, p = networks(seed)
    module = Critic().beside(q, p, discriminates=True).double()
    torch.manual_seed(seed)
    for weight in module.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    made = torch.randn(9, 2, dtype=F64, requires_grad=True)
    level = drawn(LogNormal(), made)
    x = made + spread_to(level.sigma, made) * torch.randn_like(made)
    seen = Compared(x, level, Critic().denoiser(module, q)(x, level.sigma), p(x, level.sigma))
    found = Critic().log_ratio(module, q, p)(x, level.sigma, None).detach()
    slope = (seen.teacher - seen.student) / spread_to(level.sigma, x) ** 2
    return made, seen, with_slope(found, x, slope)


def same(left, right, made):
    close(left, right, 1e-12)
    close(gradient(left.sum(), made), gradient(right.sum(), made), 1e-10)


def test_with_the_ratio_held_kl_is_sim_times_the_ratio_and_otherwise_it_is_not():
    q, p = networks()
    module = Critic().beside(q, p, discriminates=True).double()
    torch.nn.init.normal_(module.discriminator.head[2].weight)
    made, (x, level, fake, truth), _ = at_random()
    method = UniInstruct(KL(), gan=0.0, weight="denoiser", bins=0, ratio=(1e-9, 1e9), through_ratio=False)
    turn, seen = Turn(made, made, None, q, p, module, {}), Compared(x, level, fake, truth)
    ratio = Critic().log_ratio(module, q, p)(x, level.sigma, None).detach().exp().unsqueeze(1)
    held = gradient((-2 * ratio * (fake - truth) * (fake - made)).mean(1).sum(), made)
    close(gradient(method.learns(turn, seen)[0].sum(), made), held, 1e-9)
    exact = gradient(replace(method, through_ratio=True).learns(turn, seen)[0].sum(), made)
    assert (exact - held).abs().max() > 1e-3 * held.abs().max()


def test_twice_sid_at_one_half_is_reverse_kl():
    made, (_, _, fake, truth), log_ratio = at_random()
    same(expanded(ReverseKL(), log_ratio, made, fake, truth), 2 * identity(0.5, made, fake, truth), made)


def test_forward_kl_is_twice_sid_at_one_with_each_sample_times_its_ratio():
    made, (_, _, fake, truth), log_ratio = at_random()
    ratio = spread_to(log_ratio.exp(), made)
    same(expanded(KL(), log_ratio, made, fake, truth), 2 * ratio * identity(1.0, made, fake, truth), made)


def test_jeffreys_is_a_difference_of_scores_and_one_plus_the_ratio_times_sids_term():
    made, (_, _, fake, truth), log_ratio = at_random()
    ratio, apart = spread_to(log_ratio.exp(), made), fake - truth
    expected = apart.square() - 2 * (1 + ratio) * apart * (fake - made)
    same(expanded(Jeffreys(), log_ratio, made, fake, truth), expected, made)


def test_sim_of_squares_is_twice_sid_at_one():
    made, (_, _, fake, truth), _ = at_random()
    same(-distance_slope(fake - truth, None) * (fake - made), 2 * identity(1.0, made, fake, truth), made)


@each_smooth_divergence
def test_what_stays_where_samples_are_held_is_sid_at_one_times_the_weight(divergence):
    # Of E_q[h |d|^2] the part through s_q alone: -2 h d.(s_q - s_cond), with h and q's samples as they are.
    q, p = student(0.3, 1.05), teacher((0.0, 1.15, 1.0))
    x, step = line()
    log_q = q.log_prob(x, 0.8).detach()
    level = torch.tensor(0.8, dtype=F64)
    h = divergence.curvature(p.log_prob(x, 0.8) - log_q)
    apart = (q.denoise(x, level) - p(x, level)).squeeze(1) / 0.8**2
    frozen = (log_q.exp() * h * apart.square()).sum() * step
    made, seen, weight = on_a_grid(q, p, 0.8, points=64, through=True)
    ratio = Known().log_ratio(None, q, p)(seen.x, seen.level.sigma, None)
    weighted = divergence.curvature(ratio).unsqueeze(1) * 2 * identity(1.0, made, seen.student, seen.teacher)
    loss = (weight.unsqueeze(1) * weighted).sum() / 0.8**4
    close(gradient(loss, q.mean, q.log_scale), gradient(frozen, q.mean, q.log_scale), 1e-6)


def test_a_jeffreys_of_other_shares_is_their_sum():
    made, (_, _, fake, truth), log_ratio = at_random()
    found = expanded(0.4 * KL() + 0.6 * ReverseKL(), log_ratio, made, fake, truth)
    parts = [expanded(d, log_ratio, made, fake, truth) for d in (KL(), ReverseKL())]
    same(found, 0.4 * parts[0] + 0.6 * parts[1], made)


def test_the_gradient_of_the_log_ratio_is_the_difference_of_scores():
    q, p = student(0.3, 1.2), teacher((-1.0, 0.8, 0.4), (1.0, 0.9, 0.6))
    x = torch.linspace(-3, 3, 11, dtype=F64).unsqueeze(1).requires_grad_()
    level = torch.full((11,), 0.7, dtype=F64)
    exact = Known().log_ratio(None, q, p)(x, level, None)
    slope = (p(x, level) - Known().denoiser(None, q)(x, level)) / 0.7**2
    close(gradient(exact.sum(), x), slope.detach().flatten(), 1e-10)
    close(gradient(with_slope(exact.detach(), x, slope).sum(), x), slope.detach().flatten(), 1e-12)


@each_smooth_divergence
def test_what_the_loss_is_weighted_by_is_finite_at_any_ratio(divergence):
    for dtype in (torch.float32, F64):
        log_ratio = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0], dtype=dtype, requires_grad=True)
        tangent = divergence.curvature(log_ratio) - derivative(divergence.curvature, log_ratio)
        assert tangent.isfinite().all() and gradient(tangent.sum(), log_ratio).isfinite().all()


# -- steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["distance", "denoiser", "score", "expansion"])
@pytest.mark.parametrize("divergence", [KL(), ReverseKL(), JS(0.5)], ids=repr)
def test_a_step_trains_student_and_critics_and_nobody_else(divergence, weight):
    q, p = networks()
    method = UniInstruct(divergence, weight=weight)
    assert isinstance(method, Method)
    module = method.beside(q, p).double()
    for part in module.parameters():
        part.data += 0.1 * torch.randn_like(part)
    torch.manual_seed(0)
    inputs = torch.randn(16, 2, dtype=F64)
    out = method(inputs=inputs, labels=inputs, network=q, p_network=p, module=module, step=0)
    out.loss.backward()
    assert all(g is not None and g.isfinite().all() for g in (*gradients(q), *gradients(module)))
    assert all(g is None for g in gradients(p))
    assert ("clipped" in out.metrics) == (divergence != ReverseKL())
    assert not any(m.requires_grad for m in out.metrics.values())
    with torch.no_grad():
        assert method(
            inputs=inputs, labels=inputs, network=q, p_network=p, module=module, step=0
        ).loss.isfinite()


def test_critics_learn_the_same_whether_or_not_the_student_does():
    found = []
    for step in (0, 1):
        q, p = networks()
        method = UniInstruct(JS(0.5), every=2)
        module = method.beside(q, p).double()
        torch.manual_seed(0)
        for weight in module.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        inputs = torch.randn(8, 2, dtype=F64)
        method(inputs=inputs, labels=inputs, network=q, p_network=p, module=module, step=step).loss.backward()
        assert all((g is None) == (step == 0) for g in gradients(q))
        found.append([g for g in gradients(module) if g is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_are_products_of_two_differences():
    made, (_, level, _, truth), _ = at_random()
    scales = [
        weights(how, made, truth, level, Karras(), power=2) for how in ("score", "denoiser", "distance")
    ]
    sigma = spread_to(level.sigma, made)
    close(scales[0], sigma**-4)
    close(scales[1], torch.ones_like(sigma))
    close(scales[2], 1 / (made - truth).detach().abs().mean(1, keepdim=True))
    expansion = weights("expansion", made, truth, level, Karras(), power=2)
    close(expansion, sigma**-3 * stretch(Karras(), level.rank).unsqueeze(1))


def test_the_unit_is_the_batch_where_ratios_are_normalised():
    assert UniInstruct().unit == "batch" and UniInstruct(ReverseKL()).unit is None
    assert UniInstruct(bins=0).unit is None
    assert UniInstruct(bin_rate=0.5, bins=2).initial_state() == {"bin_0": 1.0, "bin_1": 1.0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"divergence": TV()}, "has a kink"),
        ({"weight": "none"}, "distance, denoiser, score, expansion"),
        ({"gan": math.inf}, "gan"),
        ({"critic": Known()}, r"write gan=0\.0"),
        ({"every": True}, "every"),
        ({"ratio": (0.0, 20.0)}, "lower < 1 < upper"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        UniInstruct(**options)
