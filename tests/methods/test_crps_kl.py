"""CRPS: definition, gradient, closed forms. CRPS + KL: reductions, and a spread that is learnt."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from tests.worlds import close, gradient
from torch.distributions import Normal, kl_divergence

import fdiv
from fdiv import KL, Alpha, Energy, Jeffreys, Renyi, ReverseKL
from fdiv.estimate.closed_forms import log_power_moment
from fdiv.methods._method import Method
from fdiv.methods.forecast.crps import crps, gaussian_crps
from fdiv.methods.forecast.crps_kl import CRPSKL, between_gaussians, latitude_weights
from fdiv.networks.latent import Latent

F64 = torch.float64


def members(count=9, seed=0):
    """(ensemble [count, 4, 3] with two equal members, y [4, 3])."""
    generator = torch.Generator().manual_seed(seed)
    ensemble = torch.randn(count, 4, 3, generator=generator, dtype=F64)
    if count > 1:
        ensemble[1] = ensemble[0]
    return ensemble, torch.randn(4, 3, generator=generator, dtype=F64)


def pairwise(ensemble, y, fair):
    count = len(ensemble)
    apart = (ensemble.unsqueeze(0) - ensemble.unsqueeze(1)).abs().sum((0, 1))
    pairs = count * (count - 1 if fair else count)
    return (ensemble - y).abs().mean(0) - (apart / (2 * pairs) if pairs else 0)


# -- the score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_sorted_form_is_the_sum_over_pairs(fair, count):
    ensemble, y = members(count)
    close(crps(ensemble, y, fair), pairwise(ensemble, y, fair), 1e-12)


def test_it_is_the_integral_of_the_squared_distance_of_distribution_functions():
    ensemble, y = torch.tensor([-1.0, 0.5, 0.5, 2.0], dtype=F64), torch.tensor(0.75, dtype=F64)
    grid = torch.linspace(-3, 4, 700_001, dtype=F64)
    below = (ensemble.unsqueeze(1) <= grid).double().mean(0)
    integral = torch.trapezoid((below - (grid >= y).double()).square(), grid)
    assert crps(ensemble, y).item() == pytest.approx(integral.item(), abs=1e-5)


def test_twice_the_score_is_the_energy_distance_to_a_point():
    ensemble, y = members()
    for row, column in product(range(4), range(3)):
        points = ensemble[:, row, column].unsqueeze(-1)
        expected = Energy().between(points, y[row, column].reshape(1, 1))
        close(2 * crps(ensemble, y)[row, column], expected, 1e-12)


@pytest.mark.parametrize("fair", [False, True])
def test_the_gradient_counts_members_above_and_below(fair):
    ensemble, y = members()
    ensemble.requires_grad_()
    (slope,) = torch.autograd.grad(crps(ensemble, y, fair).sum(), ensemble)
    x = ensemble.detach()
    apart = (x.unsqueeze(1) - x.unsqueeze(0)).sign().sum(1)
    close(slope, ((x - y).sign() - apart / (8 if fair else 9)) / 9, 1e-12)


def test_the_fair_score_of_any_number_of_members_has_the_mean_of_infinitely_many():
    # Every ensemble of M draws from three points, each with its probability.
    points, p = torch.tensor([-1.0, 0.3, 2.0], dtype=F64), torch.tensor([0.5, 0.2, 0.3], dtype=F64)
    y = torch.tensor(0.8, dtype=F64)
    apart = (points.unsqueeze(0) - points.unsqueeze(1)).abs()
    exact = p @ (points - y).abs() - p @ apart @ p / 2
    for count in (2, 3, 4):
        draws = torch.tensor(list(product(range(3), repeat=count)))
        chance, ensembles = p[draws].prod(1), points[draws].T
        truth = y.expand(len(draws))
        close(chance @ crps(ensembles, truth, fair=True), exact, 1e-12)
        biased = exact + p @ apart @ p / (2 * count)
        close(chance @ crps(ensembles, truth), biased, 1e-12)


def test_quantiles_of_a_gaussian_have_its_score():
    levels = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    for mean, scale, y in ((0.0, 1.0, 0.0), (1.0, 0.5, -1.0), (-2.0, 3.0, 4.0)):
        forecast = Normal(torch.tensor(mean, dtype=F64), scale)
        y = torch.tensor(y, dtype=F64)
        expected = gaussian_crps(forecast.mean, forecast.stddev, y)
        assert crps(forecast.icdf(levels), y).item() == pytest.approx(expected.item(), rel=1e-4)
    # At the mean: (sqrt 2 - 1) / sqrt pi.
    zero = torch.zeros((), dtype=F64)
    close(
        gaussian_crps(zero, zero + 1, zero), torch.tensor((math.sqrt(2) - 1) / math.sqrt(math.pi), dtype=F64)
    )


def test_a_gaussian_score_is_proper():
    levels = (torch.arange(2000, dtype=F64) + 0.5) / 2000
    y = Normal(torch.tensor(0.7, dtype=F64), 1.3).icdf(levels)
    mean, scale = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.7, 1.3))
    loss = gaussian_crps(mean, scale, y).mean()
    assert gradient(loss, mean, scale).abs().max() < 1e-3
    assert loss < gaussian_crps(mean + 0.3, scale, y).mean()
    assert loss < gaussian_crps(mean, 0.7 * scale, y).mean()


def test_far_values_lose_no_digits_and_half_precision_is_computed_in_single():
    ensemble, y = members()
    far = crps((ensemble + 1e6).float(), (y + 1e6).float())
    near = crps((ensemble + 1e6).float().double() - 1e6, (y + 1e6).float().double() - 1e6)
    close(far.double(), near, 1e-5)
    assert crps(ensemble.half(), y.half()).dtype == torch.float32
    assert crps(1e30 * ensemble.float(), y.float()).isfinite().all()


def test_an_ensemble_has_members_first():
    ensemble, y = members()
    with pytest.raises(ValueError, match=r"\[members, \.\.\.\]"):
        crps(ensemble.movedim(0, -1), y)
    with pytest.raises(ValueError, match="members"):
        crps(ensemble[:0], y)


def test_latitudes_weigh_by_their_cosine_with_mean_one():
    weights = latitude_weights((-60.0, 0.0, 60.0))
    assert weights == pytest.approx((0.75, 1.5, 0.75))
    for wrong in ((), (91.0,), (90.0, -90.0)):
        with pytest.raises(ValueError, match="degrees"):
            latitude_weights(wrong)


# -- between Gaussians ----------------------------------------------------------------------------------


def gaussians():
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(4, 3, 2, generator=generator, dtype=F64)
    return Normal(draw[0], draw[1].exp()), Normal(draw[2], draw[3].exp())


def test_the_divergence_is_the_papers_sum_of_logarithms_and_squares():
    p, q = gaussians()
    ratio = (p.scale.square() + (p.loc - q.loc).square()) / q.scale.square()
    expected = ((q.scale.square() / p.scale.square()).log() + ratio - 1).sum(-1) / 2
    close(between_gaussians(KL(), p, q), expected, 1e-12)
    close(between_gaussians(ReverseKL(), p, q), between_gaussians(KL(), q, p), 1e-12)
    close(between_gaussians(Jeffreys(), p, q), expected + between_gaussians(KL(), q, p), 1e-12)
    close(between_gaussians(2.0 * KL() + 0.5 * Jeffreys(), p, q),
          2 * expected + 0.5 * between_gaussians(Jeffreys(), p, q), 1e-12)  # fmt: skip


@pytest.mark.parametrize("divergence", [Alpha(0.3), Renyi(0.3), KL(), ReverseKL(), Jeffreys()], ids=repr)
def test_in_one_dimension_they_are_the_divergences_on_a_grid(divergence):
    p, q = Normal(torch.tensor([0.2], dtype=F64), 0.8), Normal(torch.tensor([-0.5], dtype=F64), 1.1)
    grid = torch.linspace(-12, 12, 40_001, dtype=F64)
    log_p, log_q = (d.log_prob(grid) + math.log(grid[1] - grid[0]) for d in (p, q))
    close(between_gaussians(divergence, p, q), divergence(log_p, log_q), 1e-6)


def test_powers_multiply_over_coordinates():
    p, q = gaussians()
    moment = log_power_moment(p, q, 0.3).sum(-1)
    close(between_gaussians(Renyi(0.3), p, q), moment / -0.7, 1e-12)
    close(between_gaussians(Alpha(0.3), p, q), moment.expm1() / (0.3 * -0.7), 1e-12)


@pytest.mark.parametrize("other", [fdiv.JS(0.5), fdiv.TV(), Alpha(1.5), Renyi(2.0), Energy(), "KL"], ids=repr)
def test_divergences_that_have_no_finite_closed_form_are_refused(other):
    with pytest.raises(TypeError, match="between Gaussians"):
        CRPSKL(divergence=other)


# -- the method -----------------------------------------------------------------------------------------


def world(outputs=3, dtype=F64):
    torch.manual_seed(0)
    network = Latent(width=6, layers=1, latent=2).build(torch.Size([5]), outputs).to(dtype)
    return network, torch.randn(7, 5, dtype=dtype), torch.randn(7, outputs, dtype=dtype)


def run(method, network, inputs, targets, progress=1.0, count=7):
    torch.manual_seed(3)
    return method(inputs=inputs, targets=targets, network=network, progress=progress, count=count)


def test_it_is_a_method():
    assert isinstance(CRPSKL(), Method)
    assert CRPSKL.consumes == "examples"


def test_the_loss_is_the_score_of_posterior_draws_plus_the_weighted_divergence():
    network, inputs, targets = world()
    out = run(CRPSKL(weight=0.3, members=5), network, inputs, targets)
    torch.manual_seed(3)
    posterior, prior = network.posterior(inputs, targets), network.prior(inputs)
    ensemble = network.decode(inputs, posterior.rsample((5,)))
    scores = pairwise(ensemble, targets, True).mean()
    apart = kl_divergence(posterior, prior).sum(-1).mean()
    close(out.loss, scores + 0.3 * apart, 1e-12)
    weights = list(network.parameters())
    close(gradient(out.loss, *weights), gradient(scores + 0.3 * apart, *weights), 1e-10)
    close(out.metrics["crps"], scores.detach())
    close(out.metrics["divergence"], apart.detach())


def test_one_member_is_the_absolute_error_of_a_variational_autoencoder():
    network, inputs, targets = world()
    for fair in (True, False):
        out = run(CRPSKL(members=1, weight=0.0, fair=fair), network, inputs, targets)
        torch.manual_seed(3)
        once = network.decode(inputs, network.posterior(inputs, targets).rsample((1,)))[0]
        close(out.loss, (once - targets).abs().mean(), 1e-12)
        assert out.metrics["spread"] == 0


def test_the_weight_grows_linearly_over_the_warm_up():
    network, inputs, targets = world()
    method = CRPSKL(weight=0.4, warmup=0.5)
    start, half, end, later = (run(method, network, inputs, targets, at).loss for at in (0.0, 0.25, 0.5, 0.9))
    close(half - start, (end - start) / 2, 1e-10)
    close(end, later, 1e-12)
    close(start, run(replace(method, weight=0.0), network, inputs, targets).loss, 1e-12)
    close(run(replace(method, warmup=0.0), network, inputs, targets, 0.0).loss, end, 1e-12)


def test_row_weights_count_relative_to_their_mean():
    network, inputs, targets = world()
    plain = CRPSKL(weight=0.0, members=3)
    close(
        run(replace(plain, row_weights=(2.0, 2.0, 2.0)), network, inputs, targets).loss,
        run(plain, network, inputs, targets).loss,
        1e-12,
    )
    first = run(replace(plain, row_weights=(1.0, 0.0, 0.0)), network, inputs, targets).loss
    torch.manual_seed(3)
    ensemble = network.decode(inputs, network.posterior(inputs, targets).rsample((3,)))
    close(first, crps(ensemble, targets, True)[:, 0].mean(), 1e-12)
    with pytest.raises(ValueError, match="2 numbers for 3 outputs"):
        run(replace(plain, row_weights=(1.0, 2.0)), network, inputs, targets)


def test_draws_of_the_prior_train_no_posterior():
    network, inputs, targets = world()
    out = run(CRPSKL(draws="prior", weight=0.0), network, inputs, targets)
    names, weights = zip(*network.named_parameters(), strict=True)
    slopes = torch.autograd.grad(out.loss, weights, allow_unused=True)
    untrained = {name.split(".")[0] for name, slope in zip(names, slopes, strict=True) if slope is None}
    assert untrained == {"of_posterior"}
    with pytest.raises(ValueError, match="write weight=0"):
        CRPSKL(draws="prior", weight=0.1)


def test_the_rows_of_micro_batches_add_up_to_the_batch():
    network, inputs, targets = world()
    method = CRPSKL(members=1, weight=0.5)
    for p in network.posterior(inputs, targets), network.prior(inputs):
        assert (p.scale > 0).all()
    parts = [run(method, network, inputs[i], targets[i]) for i in (slice(0, 3), slice(3, 7))]
    apart = sum(kl_divergence(network.posterior(inputs[i], targets[i]), network.prior(inputs[i])).sum()
                for i in (slice(0, 3), slice(3, 7)))  # fmt: skip
    scores = sum(part.metrics["crps"] * n for part, n in zip(parts, (3, 4), strict=True))
    close(sum(part.loss for part in parts), (scores + 0.5 * apart) / 7, 1e-12)


def test_far_targets_and_no_rows_have_finite_losses_and_gradients():
    network, inputs, targets = world(dtype=torch.float32)
    weights = list(network.parameters())
    for scale in (1e4, 1e-4):
        loss = run(CRPSKL(), network, scale * inputs, scale * targets).loss
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        assert loss.isfinite()
        assert all(slope is None or slope.isfinite().all() for slope in slopes)
    nothing = run(CRPSKL(), network, inputs[:0], targets[:0], count=0)
    assert nothing.loss.item() == 0
    assert all(
        slope is None or not slope.any()
        for slope in torch.autograd.grad(nothing.loss, weights, allow_unused=True)
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"weight": -0.1}, "weight"),
        ({"warmup": 1.5}, "warmup"),
        ({"members": 0}, "members"),
        ({"members": 2.5}, "members"),
        ({"row_weights": (0.0, 0.0)}, "row_weights"),
        ({"row_weights": (1.0, -1.0)}, "row_weights"),
        ({"draws": "both"}, "draws"),
    ],
)
def test_bad_values_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        CRPSKL(**wrong)


def test_scored_ensembles_learn_the_noise_and_single_draws_do_not():
    # y = x + e, e = +-1 by a coin: a calibrated ensemble has spread 1, the best median any in between.
    torch.manual_seed(0)
    inputs = torch.rand(256, 1)
    targets = inputs + 2 * torch.randint(0, 2, (256, 1)) - 1
    spread = {}
    for name, method in {
        "crps": CRPSKL(draws="prior", weight=0.0),
        "single": CRPSKL(draws="prior", weight=0.0, members=1),
    }.items():
        torch.manual_seed(1)
        network = Latent(width=16, layers=1, latent=2).build(torch.Size([1]), 1)
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        for _ in range(300):
            optimizer.zero_grad()
            method(inputs=inputs, targets=targets, network=network, progress=1.0).loss.backward()
            optimizer.step()
        spread[name] = network.ensemble(inputs, 64).std(0).mean().item()
    assert 0.7 < spread["crps"] < 1.3
    assert spread["single"] < 0.5


# -- the network ----------------------------------------------------------------------------------------


def test_the_network_predicts_at_the_priors_mean_and_decodes_any_number_of_draws():
    network, inputs, targets = world()
    prior = network.prior(inputs)
    assert prior.mean.shape == network.posterior(inputs, targets).mean.shape == (7, 2)
    close(network(inputs), network.decode(inputs, prior.mean), 1e-12)
    assert [stage.shape for stage in network.stages(inputs)] == [(7, 6), (7, 6)]
    close(network.head(network.features(inputs)), network(inputs), 1e-12)
    assert network.decode(inputs, prior.sample((2, 4))).shape == (2, 4, 7, 3)
    assert network.ensemble(inputs, 11).shape == (11, 7, 3)
    with pytest.raises(ValueError, match="at least 1"):
        Latent(latent=0)
