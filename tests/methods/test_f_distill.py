"""The gradient theorem under every f-divergence, what clipped ratios cost, and who gets which gradient."""

import math
from dataclasses import replace

import pytest
import torch
from tests.methods.one_step import (
    ALL_RATIOS,
    F64,
    divergence_at,
    gradients,
    networks,
    normal_grid,
    on_a_grid,
    student,
    teacher,
)
from tests.worlds import DIVERGENCES, close, each_other_object, each_smooth_divergence, gradient
from torch.nn.functional import softplus

import fdiv
from fdiv import JS, KL, TV, Alpha, FDivergence, Generator, Jeffreys, ReverseKL, SquaredHellinger
from fdiv.diffusion.edm import Preconditioning, denoised, heun, karras
from fdiv.methods._method import Adaptive, Method
from fdiv.methods.generate._critic import Critic, Known
from fdiv.methods.generate._ratio import density_ratio, needs_ratio
from fdiv.methods.generate._student import Compared, Turn
from fdiv.methods.generate.f_distill import FDistill
from fdiv.methods.generate.levels import Drawn, Karras, LogNormal, drawn
from fdiv.networks.denoiser import DenoiserNetwork

EXACT = FDistill(
    ReverseKL(), every=1, gan=0.0, weight="score", ratio=ALL_RATIOS, bins=0, normalise=False, critic=Known()
)  # fmt: skip


def rows(method: FDistill, q, p, made, seen: Compared):
    return method.learns(Turn(made, made, None, q, p, None, {}), seen)[0]


# -- the theorem ------------------------------------------------------------------------------------------


def test_every_f_divergence_that_fdiv_exports_is_among_those_tested():
    kinds = {type(d) for d in DIVERGENCES} | {fdiv.Reverse}  # Reverse is the next test's
    exported = {k for k in vars(fdiv).values() if isinstance(k, type) and issubclass(k, FDivergence)}
    assert exported - {FDivergence} <= kinds


@each_smooth_divergence
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_the_weighted_difference_of_scores_is_the_gradient_of_the_divergence(divergence, sigma):
    q, p = student(0.4, 1.1), teacher((0.0, 1.2, 1.0))
    made, seen, weights = on_a_grid(q, p, sigma, points=64)
    found = gradient((weights * rows(replace(EXACT, divergence=divergence), q, p, made, seen)).sum(), q.mean,
                     q.log_scale)  # fmt: skip
    close(found, gradient(divergence_at(divergence, p, q, sigma), q.mean, q.log_scale), 1e-6)


def test_the_theorem_holds_for_a_mixture_and_for_a_reversed_divergence():
    q, p = student(0.2, 1.5), teacher((-1.0, 0.8, 0.3), (1.0, 0.9, 0.7))
    for divergence in (fdiv.Reverse(fdiv.SoftenedKL()), JS(0.5)):
        made, seen, weights = on_a_grid(q, p, 0.7, points=96)
        found = (weights * rows(replace(EXACT, divergence=divergence), q, p, made, seen)).sum()
        expected = divergence_at(divergence, p, q, 0.7)
        close(gradient(found, q.mean, q.log_scale), gradient(expected, q.mean, q.log_scale), 1e-6)


H = {
    ReverseKL(): lambda r: torch.ones_like(r),
    KL(): lambda r: r,
    JS(0.5): lambda r: r / (1 + r) / 4,  # fdiv's JS(0.5) is half of r log r - (1 + r) log((1 + r)/2)
    2 * SquaredHellinger(): lambda r: r.sqrt() / 2,
    Jeffreys(): lambda r: 1 + r,
    fdiv.SoftenedReverseKL(): lambda r: 1 / (1 + r),
    fdiv.Neyman(): lambda r: 2 / r,
    fdiv.Pearson(): lambda r: 2 * r**2,
    Alpha(0.3): lambda r: r**0.3,
    fdiv.Triangular(): lambda r: 8 * r**2 / (1 + r) ** 3,
}


@pytest.mark.parametrize("divergence", H, ids=repr)
def test_weights_have_their_closed_forms_up_to_a_scale(divergence):
    log_ratio = torch.linspace(-6, 6, 25, dtype=F64)
    found, expected = divergence.curvature(log_ratio), H[divergence](log_ratio.exp())
    close(found / found[12], expected / expected[12], 1e-9)


@each_smooth_divergence
def test_weights_are_finite_and_not_negative_at_any_ratio(divergence):
    for dtype, tolerance in ((torch.float32, 1e-4), (F64, 1e-12)):
        h = divergence.curvature(torch.tensor([-50.0, -20.0, 0.0, 20.0, 50.0], dtype=dtype))
        assert h.isfinite().all() and (h >= -tolerance).all() and h[2] > 0


# -- its members ------------------------------------------------------------------------------------------


def noised_samples(seed=0):
    """(networks, samples, what is compared at x) at random."""
    q, p = networks(seed)
    torch.manual_seed(seed)
    made = torch.randn(7, 2, dtype=F64, requires_grad=True)
    level = drawn(LogNormal(), made)
    x = made + level.sigma.unsqueeze(1) * torch.randn_like(made)
    return q, p, made, Compared(x, level, torch.randn_like(made), torch.randn_like(made))


def test_reverse_kl_with_unit_weight_is_diff_instruct():
    q, p, made, seen = noised_samples()
    found = gradient(rows(FDistill.diff_instruct(), q, p, made, seen).sum(), made)
    expected = gradient(((seen.student - seen.teacher) * made).mean(1).sum(), made)
    close(found, expected, 1e-12)


def test_reverse_kl_over_the_distance_is_dmd():
    q, p, made, seen = noised_samples()
    away = (made - seen.teacher).abs().mean(1, keepdim=True).detach()
    goal = (made - (seen.student - seen.teacher) / away).detach()
    for method in (replace(FDistill.dmd(1.0), regression=0.0), replace(FDistill.dmd2(), gan=0.0)):
        found = rows(method, q, p, made, seen)
        expected = (made - goal).square().mean(1) / 2
        close(found, expected, 1e-12)
        close(gradient(found.sum(), made), gradient(expected.sum(), made), 1e-12)


def test_f_distill_is_diff_instruct_with_each_sample_times_its_weight():
    q, p, made, seen = noised_samples()
    log_ratio = torch.randn(7, dtype=F64)

    class Says(Known):
        def log_ratio(self, module, network, p_network):
            return lambda x, sigma, condition: log_ratio

    method = FDistill(Alpha(0.5), gan=0.0, weight="denoiser", bins=0, critic=Says())
    plain = FDistill(ReverseKL(), gan=0.0, weight="denoiser", critic=Says())
    weight = log_ratio.clamp(math.log(0.1), math.log(20)).mul(0.5).exp()
    found = gradient(rows(method, q, p, made, seen).sum(), made).view(7, 2)
    expected = gradient(rows(plain, q, p, made, seen).sum(), made).view(7, 2)
    close(found, expected * (weight / weight.mean()).unsqueeze(1), 1e-12)


def test_a_whole_step_of_diff_instruct_is_that_of_its_two_losses():
    q, p = networks()
    method = FDistill.diff_instruct()
    module = method.beside(q, p)
    inputs, labels = torch.zeros(6, 2, dtype=F64), torch.zeros(6)
    torch.manual_seed(5)
    out = method(inputs=inputs, labels=labels, network=q, p_network=p, module=module, step=0)

    torch.manual_seed(5)
    made = q(torch.randn_like(inputs), 1.0)
    law = torch.distributions.Normal(-1.2, 1.2)

    def level():
        return law.icdf(torch.rand(6, dtype=F64) * (1 - 2**-50) + 2**-51).exp().unsqueeze(1)

    sigma, clean = level(), made.detach()
    noisy = clean + sigma * torch.randn_like(clean)
    error = (module.fake(noisy, sigma.squeeze(1)) - clean).square() * Preconditioning(0.5).weight(sigma)
    sigma = level()
    noisy = (made + sigma * torch.randn_like(made)).detach()
    with torch.no_grad():
        slope = module.fake(noisy, sigma.squeeze(1)) - p(noisy, sigma.squeeze(1))
    expected = error.mean() + (slope * made).mean()
    everything = [w for w in (*q.parameters(), *module.parameters()) if w.requires_grad]
    got = torch.autograd.grad(out.loss, everything, allow_unused=True)
    for a, b in zip(got, torch.autograd.grad(expected, everything, allow_unused=True), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def test_dmd_regresses_to_where_the_teacher_takes_the_same_noise():
    q, p = networks()
    method = replace(FDistill.dmd(0.25), regression_steps=3)
    torch.manual_seed(0)
    noise = torch.randn(5, 2, dtype=F64)
    made = q(noise, 2.5)
    sigmas = karras(3)
    there = heun(p, 80 * noise, sigmas)
    turn = Turn(made, noise, None, q, p, None, {})
    close(method._regression(turn), 0.25 * (made - there).square().mean(1), 1e-12)


# -- a Gaussian that is to be a mixture ---------------------------------------------------------------------


def settled(divergence, ratio, start, modes, steps=300, rate=0.05, count=800):
    """(mean, scale) of a Gaussian after gradient descent, its expectations on a grid of quantiles."""
    q, p = student(*start), teacher(*modes)
    method = replace(EXACT, divergence=divergence, ratio=ratio)
    u = (torch.arange(count, dtype=F64) + 0.5) / count
    z = torch.special.ndtri(u).unsqueeze(1)
    optimizer = torch.optim.Adam(q.parameters(), lr=rate, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    level = Drawn(torch.full((count,), 0.02, dtype=F64), u)
    for _ in range(steps):
        made = q(z, 1.0)
        x = made.detach()
        seen = Compared(x, level, Known().denoiser(None, q)(x, level.sigma), p(x, level.sigma))
        optimizer.zero_grad()
        rows(method, q, p, made, seen).mean().backward()
        optimizer.step()
        schedule.step()
    return q.mean.item(), q.log_scale.exp().item()


TWO = ((-3.0, 0.6, 0.5), (3.0, 0.6, 0.5))
WIDE = {KL(): 3.059, JS(0.5): 3.03, 2 * SquaredHellinger(): 3.00, Jeffreys(): 2.586, ReverseKL(): 2.54}
CLIPPED = {KL(): 2.77, JS(0.5): 2.67, 2 * SquaredHellinger(): 2.62, Jeffreys(): 2.58, ReverseKL(): 2.54}


def test_clipped_ratios_have_another_optimum():
    quick = {"start": (0.05, 2.85), "modes": TWO, "steps": 40, "count": 300}
    mean, scale = settled(JS(0.5), ALL_RATIOS, **quick)
    assert abs(mean) < 0.03 and scale == pytest.approx(WIDE[JS(0.5)], abs=0.03)
    mean, scale = settled(JS(0.5), (0.1, 20.0), **quick)
    assert abs(mean) < 0.03 and scale == pytest.approx(CLIPPED[JS(0.5)], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", WIDE, ids=repr)
def test_a_wide_gaussian_settles_where_its_divergence_is_stationary(divergence):
    mean, scale = settled(divergence, ALL_RATIOS, (0.3, 3.0), TWO)
    assert abs(mean) < 0.03 and scale == pytest.approx(WIDE[divergence], abs=0.03)
    mean, scale = settled(divergence, (0.1, 20.0), (0.3, 3.0), TWO)
    assert abs(mean) < 0.03 and scale == pytest.approx(CLIPPED[divergence], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", WIDE, ids=repr)
def test_no_divergence_finds_a_mode_that_is_never_sampled(divergence):
    assert settled(divergence, (1e-6, 1e6), (2.0, 0.5), TWO) == pytest.approx((3.0, 0.6), abs=0.03)


# -- the ratio ----------------------------------------------------------------------------------------------


def test_only_multiples_of_reverse_kl_need_no_ratio():
    needless = [ReverseKL(), 2 * ReverseKL(), Alpha(0.0), KL().reverse, ReverseKL() + 3 * Alpha(0.0)]
    assert not any(needs_ratio(d) for d in needless)
    assert all(needs_ratio(d) for d in DIVERGENCES if d.is_smooth and d != ReverseKL())


def test_ratios_within_their_bounds_have_mean_one_in_each_bin():
    torch.manual_seed(0)
    log_ratio, rank = 0.5 * torch.randn(400, dtype=F64), torch.rand(400, dtype=F64)
    found, metrics = density_ratio(log_ratio, rank, (0.1, 20.0), 5, 0.0, {})
    place = (rank * 5).long()
    for k in range(5):
        assert found[place == k].exp().mean().item() == pytest.approx(1.0)
    assert metrics["clipped"] == 0
    assert metrics["log_mean_ratio"].item() == pytest.approx(log_ratio.exp().mean().log().item())
    each = [log_ratio[place == k].exp().mean().log().item() for k in range(5)]
    assert metrics["worst_log_mean_ratio"].item() == pytest.approx(max(each, key=abs))
    unchanged, _ = density_ratio(log_ratio, rank, (0.1, 20.0), 0, 0.0, {})
    close(unchanged, log_ratio)


def test_what_the_bounds_hold_back_is_counted_whatever_the_logits():
    log_ratio = torch.tensor([-1e4, -3.0, 0.0, 1.0, 1e4], requires_grad=True)
    found, metrics = density_ratio(log_ratio, torch.full((5,), 0.5), (0.1, 20.0), 0, 0.0, {})
    bounds = torch.tensor([0.1, 20.0]).log()
    close(found.detach(), torch.stack([bounds[0], bounds[0], *log_ratio[2:4].detach(), bounds[1]]), 1e-6)
    assert metrics["clipped"].item() == pytest.approx(0.6)
    assert all(m.isfinite() for m in metrics.values())
    close(gradient(found.sum(), log_ratio), torch.tensor([0.0, 0, 1, 1, 0]))


def test_the_mean_of_a_bin_is_remembered_at_its_rate():
    method = FDistill(KL(), bins=2, bin_rate=0.75)
    state = method.initial_state()
    assert state == {"bin_0": 1.0, "bin_1": 1.0} and isinstance(method, Adaptive)
    log_ratio, rank = torch.tensor([2.0, 4.0], dtype=F64).log(), torch.tensor([0.1, 0.2])
    found, metrics = density_ratio(log_ratio, rank, (0.1, 20.0), 2, 0.75, state)
    state = method.advance(state, {name: m.item() for name, m in metrics.items()}, 0.5)
    assert state == pytest.approx({"bin_0": 0.75 + 0.25 * 3.0, "bin_1": 1.0})
    close(found.exp(), torch.tensor([2.0, 4.0], dtype=F64) / 1.5)
    assert method.advance(state, {}, 0.6) == state  # a step of the critics
    assert FDistill().initial_state() == {}


def test_a_discriminator_learns_the_log_ratio_of_two_gaussians_at_each_level():
    torch.manual_seed(0)
    q, p = networks(coordinates=1)
    critic, levels = Critic(features="own"), Karras(0.3, 2.0)
    module = critic.beside(q, p, discriminates=True).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 200)
    for _ in range(200):
        real, made = (m + s * torch.randn(256, 1, dtype=F64) for m, s in ((0.5, 1.0), (-0.5, 0.7)))
        out, metrics = critic.rows(module, p, real, made, None, levels)
        optimizer.zero_grad()
        out.mean().backward()
        optimizer.step()
        schedule.step()
    x = torch.linspace(-1.5, 1.5, 13, dtype=F64).unsqueeze(1)
    for sigma in (0.4, 1.0):
        level = torch.full((13,), sigma, dtype=F64)
        found = critic.log_ratio(module, q, p)(x, level, None)
        exact = Known().log_ratio(None, student(-0.5, 0.7), teacher((0.5, 1.0, 1.0)))(x, level, None)
        assert (found - exact).abs().max() < 0.25 and exact.abs().max() > 0.9
    assert 0.6 < metrics["discriminator_accuracy"] < 0.9


# -- who gets which gradient --------------------------------------------------------------------------------


def step(method, step=0, seed=0, **sizes):
    """(out, student, teacher, module) after a step and its backward pass."""
    q, p = networks(**sizes)
    module = method.beside(q, p).double()
    for weight in module.parameters():  # the discriminator's last layer starts at 0
        weight.data += 0.1 * torch.randn_like(weight)
    torch.manual_seed(seed)
    inputs = torch.randn(8, 2, dtype=F64)
    labels = torch.randn(8, sizes["context"], dtype=F64) if "context" in sizes else torch.arange(8) % 3
    out = method(inputs=inputs, labels=labels, network=q, p_network=p, module=module, step=step)
    out.loss.backward()
    return out, q, p, module


@pytest.mark.parametrize("features", ["teacher", "own"])
@pytest.mark.parametrize("divergence", [JS(0.5), ReverseKL()], ids=repr)
def test_critics_learn_the_same_whether_or_not_the_student_does(divergence, features):
    method = FDistill(divergence, every=3, gan=0.5, critic=Critic(features=features))
    _, q, p, module = step(method, 1)
    assert all(g is None for g in gradients(q)) and all(g is None for g in gradients(p))
    out, learnt, p, same = step(method, 2)
    assert all(g is not None for g in gradients(learnt)) and all(g is None for g in gradients(p))
    for a, b in zip(gradients(module), gradients(same), strict=True):
        assert a is not None and b is not None and a.abs().sum() > 0
        torch.testing.assert_close(a, b)
    assert out.metrics.keys() >= {"fake_score_loss", "discriminator_accuracy", "gan_loss"}


def test_real_data_reach_the_student_through_the_discriminator_alone():
    def slopes(gan, scale):
        q, p = networks()
        method = FDistill(ReverseKL(), every=1, gan=gan)
        module = method.beside(q, p).double()
        torch.nn.init.ones_(module.discriminator.head[2].weight)
        torch.manual_seed(1)
        inputs = scale * torch.ones(8, 2, dtype=F64)
        method(inputs=inputs, labels=inputs, network=q, p_network=p, module=module, step=0).loss.backward()
        both = (gradients(q), gradients(module.discriminator))
        return [torch.cat([g.flatten() for g in part if g is not None]) for part in both]

    (plain, _), (of_some, critic), (of_others, other) = slopes(1e-9, 1), slopes(0.1, 1), slopes(0.1, 5)
    torch.testing.assert_close(of_some, of_others)
    assert (critic - other).abs().max() > 0.01 and (of_some - plain).abs().max() > 1e-4
    close(slopes(0.4, 1)[0] - plain, 4 * (of_some - plain), 1e-6)


def test_the_gan_term_is_softplus_of_minus_the_logit_of_noised_samples():
    q, p = networks()
    method = FDistill(ReverseKL(), every=1, gan=0.3)
    module = method.beside(q, p).double()
    torch.nn.init.normal_(module.discriminator.head[2].weight)
    made = torch.randn(5, 2, dtype=F64, requires_grad=True)
    level = drawn(LogNormal(), made)
    seen = Compared(made + level.sigma.unsqueeze(1), level, made.detach() + 1, made.detach() - 1)
    turn = Turn(made, made, None, q, p, module, {})
    got, metrics = method.learns(turn, seen)
    without, _ = replace(method, gan=0.0).learns(turn, seen)
    logit = module.discriminator(p, seen.x, level.sigma, None)
    close(got - without, 0.3 * softplus(-logit))
    close(gradient((got - without).sum(), made), gradient(0.3 * softplus(-logit).sum(), made))
    close(metrics["gan_loss"], softplus(-logit).mean().detach())


def test_the_condition_is_told_to_everyone_who_is_asked(monkeypatch):
    told = []
    ask = DenoiserNetwork.features

    def recording(self, x, sigma, condition=None):
        told.append((id(self), condition))
        return ask(self, x, sigma, condition)

    monkeypatch.setattr(DenoiserNetwork, "features", recording)
    for features in ("teacher", "own"):
        told.clear()
        method = FDistill(ReverseKL(), every=1, gan=0.1, critic=Critic(features=features))
        out, q, p, module = step(method, context=3)
        torch.manual_seed(0)
        torch.randn(8, 2, dtype=F64)
        labels = torch.randn(8, 3, dtype=F64)
        assert {i for i, _ in told} >= {id(q), id(p), id(module.fake)}
        if features == "own":
            assert id(module.discriminator.trunk) in {i for i, _ in told}
        assert all(c is not None and torch.equal(c, labels) for _, c in told)
        assert out.loss.isfinite()
        noise = torch.randn(4, 2, dtype=F64)
        torch.testing.assert_close(method.sample(q, noise, labels[:4]), q(2.5 * noise, 2.5, labels[:4]))


def test_in_classes_each_student_sees_its_own_teacher_alone():
    method = FDistill(JS(0.5), every=1, gan=0.0, bins=0, normalise=False)
    q = step(method, classes=4)[1]  # labels 0, 1, 2
    assert q.condition.weight.grad[:3].abs().sum(1).gt(0).all() and q.condition.weight.grad[3].eq(0).all()


# -- batches, evaluation, refusals --------------------------------------------------------------------------


def test_rows_are_counted_over_the_global_batch():
    q, p = networks()
    module = FDistill(ReverseKL(), gan=0.0).beside(q, p)
    losses = []
    for count in (None, 8.0, 16.0):
        torch.manual_seed(0)
        inputs = torch.zeros(8, 2, dtype=F64)
        call = FDistill(ReverseKL(), every=1, gan=0.0)
        given = {"inputs": inputs, "labels": inputs, "network": q, "p_network": p, "module": module}
        losses.append(call(**given, step=0, count=count).loss.item())
    assert losses[0] == losses[1] == pytest.approx(2 * losses[2])
    assert FDistill(ReverseKL()).unit is None and FDistill().unit == "batch"
    assert FDistill(KL(), bins=0, normalise=False).unit is None


def test_it_is_evaluated_without_a_graph():
    q, p = networks()
    method = FDistill(every=1)
    module = method.beside(q, p).double()
    inputs = torch.zeros(8, 2, dtype=F64)
    with torch.no_grad():
        out = method(inputs=inputs, labels=inputs, network=q, p_network=p, module=module, step=0)
    assert out.loss.isfinite() and not out.loss.requires_grad
    assert isinstance(method, Method)


def test_samples_and_ratios_that_are_not_numbers_stop_the_step():
    q, p = networks()
    method = FDistill(every=1)
    module = method.beside(q, p).double()
    inputs = torch.zeros(8, 2, dtype=F64)
    given = {"inputs": inputs, "labels": inputs, "p_network": p, "module": module, "step": 0}
    with torch.no_grad():
        module.discriminator.head[2].bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="8 of 8 log-ratios"):
        method(network=q, **given)
    with torch.no_grad():
        module.discriminator.head[2].bias.fill_(1e4)
    out = method(network=q, **given)
    assert out.loss.isfinite() and out.metrics["clipped"] == 1
    with torch.no_grad():
        q.head.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match="8 of 8 samples of the student are not finite"):
        method(network=q, **given)


def test_a_weight_of_float32_is_finite_at_every_level_of_the_paper():
    q, p = (n.float() for n in networks())
    for weight in ("distance", "denoiser", "score"):
        method = FDistill(KL(), every=1, weight=weight)
        module = method.beside(q, p)
        torch.manual_seed(0)
        inputs = torch.randn(64, 2)
        out = method(inputs=inputs, labels=inputs, network=q, p_network=p, module=module, step=0)
        out.loss.backward()
        assert all(g.isfinite().all() for g in (*gradients(q), *gradients(module)) if g is not None)


def hockey_stick(log_ratio):
    return (log_ratio.exp() - 2.0).clamp(min=0.0)


def kl_with_a_kink(log_ratio):
    return log_ratio.exp() * log_ratio + 0.1 * (log_ratio.exp() - 3.0).clamp(min=0.0)


@pytest.mark.parametrize(
    "divergence", [TV(), KL() + 0.01 * TV(), Generator(hockey_stick), Generator(kl_with_a_kink)], ids=repr
)
def test_a_kink_is_refused_since_no_curvature_tells_of_it(divergence):
    with pytest.raises(ValueError, match="has a kink"):
        FDistill(divergence)


@each_other_object
def test_only_f_divergences_are_taken(other):
    with pytest.raises(TypeError, match="takes an f-divergence"):
        FDistill(other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every"),
        ({"gan": -1.0}, "gan"),
        ({"gan": 0.1, "critic": Known()}, r"write gan=0\.0"),
        ({"sigma_init": 0.0}, "sigma_init"),
        ({"weight": "expansion"}, "one of distance, denoiser, score"),
        ({"ratio": (2.0, 20.0)}, "lower < 1 < upper"),
        ({"bins": -1}, "bins"),
        ({"bin_rate": 1.0}, "bin_rate"),
        ({"bins": 0, "bin_rate": 0.5}, "0 without bins"),
        ({"regression": math.nan}, "regression"),
        ({"regression_steps": 0}, "steps"),
        ({"head_start": -1}, "head_start"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        FDistill(**options)


def test_networks_that_do_not_fit_are_refused():
    q, _ = networks(classes=3)
    _, plain = networks()
    method = FDistill()
    given = {"inputs": torch.zeros(2, 2, dtype=F64), "labels": torch.zeros(2, dtype=torch.int64), "step": 0}
    with pytest.raises(ValueError, match="only the student reads a condition"):
        method(network=q, p_network=plain, module=None, **given)
    exact = teacher((0.0, 1.0, 1.0))
    with pytest.raises(TypeError, match=r"critic=Known\(\)"):
        method.beside(student(0.0, 1.0), exact)
    with pytest.raises(TypeError, match=r"Critic\(features='own'\)"):
        method.beside(networks(coordinates=1)[0], exact)
    with pytest.raises(TypeError, match="the student states none"):
        FDistill(gan=0.0, critic=Known()).beside(q, exact)
    with pytest.raises(TypeError, match="law of sigma"):
        FDistill(levels=Karras)
    with pytest.raises(TypeError, match="Critic"):
        FDistill(critic=Critic)


def test_a_fake_score_starts_as_the_teacher_and_is_trained():
    q, p = networks()
    module = FDistill().beside(q, p)
    x, sigma = torch.randn(3, 2, dtype=F64), torch.ones(3, dtype=F64)
    torch.testing.assert_close(module.fake(x, sigma), p(x, sigma))
    assert all(w.requires_grad for w in module.parameters()) and module.fake is not p
    logit = module.double().discriminator(p, x, sigma, None)
    assert torch.equal(logit, torch.zeros_like(logit))  # a ratio of 1
    assert FDistill(ReverseKL(), gan=0.0).beside(q, p).discriminator is None


def test_the_student_moves_at_the_last_of_each_few_steps():
    method = FDistill(ReverseKL(), every=3, gan=0.0, head_start=6)
    moved = [any(g is not None for g in gradients(step(method, n)[1])) for n in range(12)]
    assert moved == [False] * 8 + [True, False, False, True]


def test_denoised_tells_nothing_where_there_is_no_condition():
    seen = []
    denoised(lambda *args: seen.append(len(args)) or args[0], torch.zeros(2, 1), 1.0)
    assert seen == [2]


def test_expectations_on_the_grid_are_those_of_a_normal_law():
    z, weights = normal_grid(40)
    assert (weights * z**4).sum().item() == pytest.approx(3.0)
