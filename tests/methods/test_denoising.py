"""Denoising: EDM's loss and sampler, and PFGM++'s."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fdiv.diffusion.edm import Preconditioning, heun, karras
from fdiv.diffusion.mixture import Mixture
from fdiv.diffusion.pfgm import posterior_mean, rescaled
from fdiv.methods.generate.denoising import Denoising
from fdiv.methods.generate.levels import Karras, LogNormal
from fdiv.networks.denoiser import Denoiser

F64 = torch.float64
DATA = Mixture(((-1.0, 0.0), (1.0, 0.5)), (0.2, 0.4), (0.4, 0.6))
NONE = torch.zeros(0, dtype=torch.int64)


def loss(method, network, inputs, labels=NONE, **options):
    torch.manual_seed(0)
    return method(inputs=inputs, labels=labels, network=network, **options).loss


def inputs(count=64):
    return DATA.sample(count, torch.Generator().manual_seed(7))  # not the seed of the noise


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def network(**fields):
    torch.manual_seed(0)
    return Denoiser(width=32, blocks=1, **fields).build(torch.Size([2]), 2)


def test_the_loss_is_the_weighted_square_at_the_drawn_levels_and_noise():
    seen = []

    def recording(x, sigma):
        seen.append((x, sigma))
        return 0.9 * x

    x0 = inputs()
    found = loss(Denoising(sigma_data=0.7), recording, x0)
    ((x, sigma),) = seen
    assert not torch.allclose(x, x0)
    weight = (sigma**2 + 0.49) / (0.7 * sigma) ** 2
    torch.testing.assert_close(found, (weight * (0.9 * x - x0).square().mean(1)).mean())


def test_levels_are_log_normal_and_noise_has_their_scale():
    seen = []
    x0 = torch.zeros(20_000, 2)
    loss(Denoising(), lambda x, sigma: seen.append((x, sigma)) or x, x0)
    ((x, sigma),) = seen
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.03)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.03)
    assert (x / sigma.unsqueeze(-1)).std().item() == pytest.approx(1, abs=0.02)


def test_a_network_that_says_nothing_yet_has_the_loss_one_of_its_scaled_targets():
    # Data N(0, s^2): D = skip x leaves out times a target of variance 1, and the weight is 1 / out^2.
    scaling, x0 = Preconditioning(0.5), 0.5 * normal(50_000, 2)
    found = loss(Denoising(), lambda x, sigma: scaling.skip(sigma).unsqueeze(-1) * x, x0)
    assert found.item() == pytest.approx(1, abs=0.02)
    assert loss(Denoising(), network(), x0).item() == pytest.approx(found.item())


def test_no_denoiser_has_a_lower_loss_than_the_posterior_mean():
    x0, method = inputs(20_000), Denoising()
    best = loss(method, DATA.denoise, x0).item()
    for factor in (0.97, 1.03):
        assert loss(method, lambda x, sigma, f=factor: f * DATA.denoise(x, sigma), x0).item() > best
    assert loss(method, lambda x, sigma: DATA.denoise(x, 1.1 * sigma), x0).item() > best


def test_of_a_finite_set_under_heavier_tails_the_best_denoiser_is_pfgms_own():
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.3, -0.8]])
    x0 = points[torch.arange(30_000) % 3]
    method = Denoising(dims=3, levels=LogNormal(-0.5, 0.5))
    own = loss(method, lambda x, sigma: posterior_mean(x, points, sigma, 3), x0).item()
    edms = loss(method, lambda x, sigma: posterior_mean(x, points, sigma, math.inf), x0).item()
    assert own < 0.99 * edms
    gaussian = dataclasses.replace(method, dims=math.inf)
    own = loss(gaussian, lambda x, sigma: posterior_mean(x, points, sigma, math.inf), x0).item()
    assert own < 0.99 * loss(gaussian, lambda x, sigma: posterior_mean(x, points, sigma, 3), x0).item()


def test_very_many_dimensions_are_edm():
    x0 = inputs()
    edm = loss(Denoising(), DATA.denoise, x0)
    torch.testing.assert_close(loss(Denoising(dims=1e8), DATA.denoise, x0), edm, rtol=1e-4, atol=0)
    assert abs(loss(Denoising(dims=4), DATA.denoise, x0) - edm) > 1e-3


def test_a_mean_over_the_global_batch_is_that_of_its_parts():
    x0 = inputs(10)
    torch.testing.assert_close(
        loss(Denoising(), DATA.denoise, x0, count=20), loss(Denoising(), DATA.denoise, x0) / 2
    )


@pytest.mark.parametrize(("fields", "labels"), [
    ({"classes": 3}, torch.tensor([0, 1, 2, 0])), ({"context": 2}, torch.ones(4, 2)), ({}, NONE)
])  # fmt: skip
def test_labels_reach_a_conditional_network_alone(fields, labels):
    model = network(**fields)
    found = loss(Denoising(), model, inputs(4), labels)
    grads = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    assert bool(found.isfinite())
    assert all(g is None or bool(g.isfinite().all()) for g in grads)
    assert hasattr(model, "condition") == bool(fields)


# -- sampling ---------------------------------------------------------------------------------------------


def test_samples_are_heuns_from_the_largest_level():
    noise, method = normal(8, 2), Denoising(steps=9, least=0.01, most=20.0, rho=5.0)
    expected = heun(DATA.denoise, 20 * noise, karras(9, 0.01, 20.0, 5.0))
    torch.testing.assert_close(method.sample(DATA.denoise, noise), expected, rtol=0, atol=0)


def test_samples_of_the_exact_denoiser_have_the_datas_moments():
    found = Denoising(steps=32).sample(DATA.denoise, normal(5000, 2))
    torch.testing.assert_close(found.mean(0), torch.tensor([0.2, 0.3]), rtol=0, atol=0.05)
    second = torch.tensor([1 + 0.4 * 0.04 + 0.6 * 0.16, 0.6 * 0.25 + 0.4 * 0.04 + 0.6 * 0.16])
    torch.testing.assert_close(found.square().mean(0), second, rtol=0.07, atol=0)


@pytest.mark.parametrize("dims", [2.0, 64.0])
def test_pfgms_samples_of_the_exact_denoiser_are_the_data_in_their_shares(dims):
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    x = torch.cat([points[:1]] * 3 + [points[1:]])  # three quarters and one

    def denoiser(at, sigma):
        return posterior_mean(at, x, sigma, dims)

    found = Denoising(dims=dims, steps=32).sample(denoiser, normal(2000, 2))
    distance = torch.cdist(found, points)
    assert distance.amin(1).max() < 0.05
    assert (distance.argmin(1) == 0).double().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("dims", [math.inf, 8.0])
def test_a_sample_is_a_function_of_its_own_noise(dims):
    noise, method = normal(6, 2), Denoising(dims=dims, steps=4)
    whole = method.sample(DATA.denoise, noise)
    torch.manual_seed(5)
    torch.testing.assert_close(method.sample(DATA.denoise, noise[2:4]), whole[2:4])
    assert whole.dtype == torch.float32
    start = rescaled(noise, dims)
    assert torch.allclose(start, noise) == (dims == math.inf)


def test_a_condition_is_handed_on():
    model = network(classes=3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.1)
    method, noise = Denoising(steps=3), normal(4, 2)
    ones, twos = (method.sample(model, noise, torch.full((4,), c)) for c in (1, 2))
    assert not torch.allclose(ones, twos)
    with pytest.raises(ValueError, match="condition"):
        method.sample(model, noise)


def test_it_learns_a_mixture():
    torch.manual_seed(0)
    model, method = Denoiser(width=64, blocks=1, sigma_data=0.9).build(torch.Size([2]), 2), Denoising(0.9)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    x0 = DATA.sample(4096, torch.Generator().manual_seed(3))
    for step in range(150):
        batch = x0[(step * 128) % 4096 :][:128]
        optimiser.zero_grad()
        method(inputs=batch, labels=NONE, network=model).loss.backward()
        optimiser.step()
    x, sigma = DATA.sample(2000, torch.Generator().manual_seed(4), 0.5), torch.full((2000,), 0.5)
    with torch.no_grad():
        learnt = (model(x, sigma) - DATA.denoise(x, sigma)).square().mean()
        untrained = (x * Preconditioning(0.9).skip(sigma)[0] - DATA.denoise(x, sigma)).square().mean()
    assert learnt < untrained / 4


# -- what may go wrong -----------------------------------------------------------------------------------


def test_an_empty_batch_is_worth_nothing():
    model = network()
    found = loss(Denoising(), model, torch.zeros(0, 2))
    assert found.item() == 0
    found.backward()


@pytest.mark.parametrize("dims", [math.inf, 1.0])
def test_large_and_equal_inputs_stay_finite(dims):
    model = network()
    for x0 in (torch.full((4, 2), 1e4), torch.zeros(4, 2), torch.tensor([[1e4, -1e4]])):
        found = loss(Denoising(dims=dims), model, x0)
        assert bool(found.isfinite())
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(found, list(model.parameters())))


def test_inputs_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="1 of 2 squared errors"):
        loss(Denoising(), DATA.denoise, torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))


def test_whole_numbers_are_no_inputs():
    with pytest.raises(TypeError, match=r"x\.float"):
        loss(Denoising(), nn.Identity(), torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"sigma_data": 0.0}, ValueError, "sigma_data"),
        ({"dims": 0}, ValueError, "dims"),
        ({"levels": 0.5}, TypeError, "LogNormal"),
        ({"steps": 0}, ValueError, "steps"),
        ({"least": 90.0}, ValueError, "least < most"),
        ({"rho": 0.0}, ValueError, "rho"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, error, said):
    with pytest.raises(error, match=said):
        Denoising(**fields)


def test_the_repr_is_the_recipe():
    method = Denoising(0.75, Karras(0.02, 20.0), dims=128.0)
    assert eval(repr(method), {"Denoising": Denoising, "Karras": Karras, "inf": math.inf}) == method
