"""Networks of generators: EDM's scaling, what a condition is, and two laws in closed form."""

import math

import pytest
import torch

from fdiv.adapters.classifier import Classifier
from fdiv.diffusion.edm import Preconditioning, heun, karras
from fdiv.diffusion.mixture import Mixture
from fdiv.feeds.reading import shapes_of
from fdiv.networks.all import Affine, ClosedForm, Denoiser

IMAGE, POINT = torch.Size([1, 4, 4]), torch.Size([2])
LAW = Mixture(((-1.0, 0.0), (2.0, 1.0)), (0.5, 0.3), (0.25, 0.75))


def built(spec, shape, seed=0):
    return Classifier.fresh(spec, shape, shape.numel(), seed).model


def stirred(spec, shape):
    """A network none of whose weights is 0."""
    network = built(spec, shape)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return network


def x_of(shape, rows=5):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [IMAGE, POINT], ids=str)
def test_an_untrained_denoiser_believes_in_a_gaussian_of_its_deviation(shape):
    x, sigma = x_of(shape), torch.tensor([0.1, 0.5, 1.0, 3.0, 50.0])
    scale = 0.7**2 / (sigma**2 + 0.7**2)
    expected = scale.reshape(-1, *[1] * len(shape)) * x
    torch.testing.assert_close(built(Denoiser(sigma_data=0.7), shape)(x, sigma), expected)


def test_the_head_reads_the_features_in_the_scaling_of_edm():
    network, x, scaling = stirred(Denoiser(16, 3, 0.7), IMAGE), x_of(IMAGE), Preconditioning(0.7)
    sigma = torch.tensor([0.1, 0.5, 1.0, 3.0, 50.0])
    at = sigma.reshape(-1, 1, 1, 1)
    inner = network.head(network.features(x, sigma)).reshape(x.shape)
    torch.testing.assert_close(network(x, sigma), scaling.skip(at) * x + scaling.out(at) * inner)
    torch.testing.assert_close(network.denoised(network.features(x, sigma), x, sigma), network(x, sigma))


def test_a_level_is_a_number_or_one_for_each_example():
    network, x = stirred(Denoiser(16), POINT), x_of(POINT)
    torch.testing.assert_close(network(x, 0.3), network(x, torch.full((5,), 0.3, dtype=torch.float64)))
    assert not torch.allclose(network(x, 0.3), network(x, 0.31))


def test_a_class_and_a_row_of_numbers_are_conditions_and_change_the_answer():
    x = x_of(IMAGE)
    of_class = stirred(Denoiser(16, classes=3), IMAGE)
    assert of_class.conditional and not built(Denoiser(16), IMAGE).conditional
    one, other = (of_class(x, 1.0, torch.full((5,), label)) for label in (0, 2))
    assert not torch.allclose(one, other)
    of_context = stirred(Denoiser(16, context=4), IMAGE)
    one, other = (of_context(x, 1.0, torch.full((5, 4), value)) for value in (0.0, 1.0))
    assert not torch.allclose(one, other)


def test_a_condition_that_is_missing_or_not_wanted_is_refused():
    x = x_of(IMAGE)
    with pytest.raises(ValueError, match="reads a condition"):
        built(Denoiser(8, classes=3), IMAGE)(x, 1.0)
    with pytest.raises(ValueError, match="condition=None"):
        built(Denoiser(8), IMAGE)(x, 1.0, torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    "spec", [Denoiser(8, 3), Denoiser(8, 3, classes=2), Denoiser(8, 3, context=2)], ids=repr
)
def test_its_stages_are_those_at_sigma_data(spec):
    network, x = stirred(spec, IMAGE), x_of(IMAGE)
    told = {"classes": torch.zeros(5, dtype=torch.int64), "context": torch.zeros(5, 2)}
    condition = next((told[name] for name in told if getattr(spec, name)), None)
    torch.testing.assert_close(network.stages(x)[-1], network.features(x, 0.5, condition))
    assert shapes_of(network, None, x).stages == (torch.Size([8]),) * 3
    assert shapes_of(network, None, x).classes == 16


def test_a_tangent_goes_through_it_as_through_any_function():
    network, x = stirred(Denoiser(16), POINT).double(), x_of(POINT).double()
    along, step = torch.ones_like(x), 1e-6
    levels = torch.full((5,), 0.8, dtype=torch.float64)
    _, tangent = torch.func.jvp(network, (x, levels), (along, torch.ones_like(levels)))
    by_hand = (network(x + step, levels + step) - network(x - step, levels - step)) / (2 * step)
    torch.testing.assert_close(tangent, by_hand, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "spec",
    [Denoiser(8), Denoiser(8, classes=3), Affine(1.0, 2.0), ClosedForm(LAW)],
    ids=lambda s: type(s).__name__,
)
def test_each_is_kept_by_its_name(spec, tmp_path):
    made = Classifier.fresh(spec, POINT, 2, seed=0)
    made.save(tmp_path)
    found = Classifier.load(tmp_path)
    assert found.architecture == spec and found.fingerprint() == made.fingerprint()


def test_an_affine_generator_makes_the_gaussian_that_it_says():
    network, z = (
        built(Affine(1.0, 2.0), POINT),
        torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)),
    )
    made = network(2.5 * z, 2.5)
    torch.testing.assert_close(made, 1 + 2 * z)
    # of N(1, 4) plus N(0, 9), at x: the density and the posterior mean
    x = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    law = torch.distributions.Normal(torch.tensor(1.0).double(), math.sqrt(13))
    torch.testing.assert_close(network.log_prob(x, 3.0), law.log_prob(x).sum(-1))
    torch.testing.assert_close(network.denoise(x, 3.0), 1 + 4 / 13 * (x - 1))


def test_the_denoiser_that_it_states_is_that_of_its_score():
    for network in (built(Affine(0.3, 0.8), POINT), built(ClosedForm(LAW), POINT)):
        x = x_of(POINT).double().requires_grad_(True)
        (slope,) = torch.autograd.grad(network.log_prob(x, 0.6).sum(), x)
        torch.testing.assert_close(network.denoise(x, 0.6), x + 0.36 * slope)


def test_the_closed_form_of_one_mode_carries_noise_along_its_known_solution():
    mean, scale, start = 1.5, 0.7, 40.0
    network = built(ClosedForm(Mixture(((mean,),), (scale,), (1.0,))), torch.Size([1]))
    z = torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64)
    found = heun(network, start * z, karras(256, 0.002, start))
    expected = mean + (start * z - mean) * scale / math.sqrt(scale**2 + start**2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Denoiser(width=0), "at least 1"),
        (lambda: Denoiser(sigma_data=0.0), "sigma_data is finite and > 0"),
        (lambda: Denoiser(classes=-1), "whole number"),
        (lambda: Denoiser(classes=2, context=3), "write classes or context"),
        (lambda: Denoiser().build(IMAGE, 10), "for classes write MLP"),
        (lambda: Affine(scale=0.0), "finite scale > 0"),
        (lambda: Affine().build(IMAGE, 16), "for points"),
        (lambda: ClosedForm().build(POINT, 2), "has .*no law"),
        (lambda: ClosedForm(LAW).build(torch.Size([3]), 3), "another one than"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
