"""Mixtures of Gaussians, against torch's own and against integrals."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fdiv.diffusion.mixture import Mixture

F64 = torch.float64
TWO = Mixture(((-1.0, 0.5), (2.0, 0.0), (0.0, -1.0)), (0.3, 0.6, 1.2), (2.0, 1.0, 1.0))


def points(count=50):
    return 2 * torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


def of_torch(sigma):
    scales = (torch.tensor(TWO.scales, dtype=F64) ** 2 + sigma**2).sqrt()
    parts = Independent(Normal(torch.tensor(TWO.means, dtype=F64), scales.unsqueeze(-1).expand(3, 2)), 1)
    return MixtureSameFamily(Categorical(torch.tensor(TWO.weights, dtype=F64)), parts)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 30.0])
def test_the_smoothed_density_is_that_of_wider_components(sigma):
    torch.testing.assert_close(TWO.log_prob(points(), sigma), of_torch(sigma).log_prob(points()))


@pytest.mark.parametrize("sigma", [0.0, 0.7, 30.0])
def test_the_score_is_the_gradient(sigma):
    x = points().requires_grad_()
    (slope,) = torch.autograd.grad(TWO.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(TWO.score(x, sigma), slope)


def test_the_denoiser_is_the_posterior_mean_by_quadrature():
    line, sigma = Mixture(((-1.0,), (2.0,)), (0.3, 0.6), (0.3, 0.7)), 0.8
    x0 = torch.linspace(-8, 8, 4001, dtype=F64)
    x = torch.tensor([-3.0, 0.1, 0.7, 4.0], dtype=F64)
    joint = line.log_prob(x0.unsqueeze(-1)).exp() * (-((x.unsqueeze(-1) - x0) ** 2) / (2 * sigma**2)).exp()
    expected = (joint * x0).sum(-1) / joint.sum(-1)
    torch.testing.assert_close(line.denoise(x.unsqueeze(-1), sigma).squeeze(-1), expected)


def test_a_level_for_each_row_is_read_row_by_row():
    x, sigma = points(4), torch.tensor([0.1, 1.0, 2.0, 50.0], dtype=F64)
    for function in (TWO.denoise, TWO.score, TWO.log_prob, TWO.log_shares):
        rows = torch.stack([function(row, s.item()) for row, s in zip(x, sigma, strict=True)])
        torch.testing.assert_close(function(x, sigma), rows)


def test_without_noise_nothing_is_denoised_and_under_much_all_goes_to_the_mean():
    x = points()
    torch.testing.assert_close(TWO.denoise(x, 0.0), x)
    mean = torch.tensor([0.0, 0.0], dtype=F64)  # (2 (-1, .5) + (2, 0) + (0, -1)) / 4
    torch.testing.assert_close(TWO.denoise(x, 1e8), mean.expand(50, 2), rtol=0, atol=1e-6)


def test_points_of_no_width_are_data():
    pair = Mixture(((-1.0,), (1.0,)), (0.0, 0.0), (1.0, 1.0))
    x = torch.linspace(-3, 3, 20, dtype=F64).unsqueeze(-1)
    torch.testing.assert_close(pair.denoise(x, 0.5), (x / 0.25).tanh())
    with pytest.raises(ValueError, match="point mass"):
        pair.log_prob(x)


def test_samples_have_the_mixtures_moments():
    generator = torch.Generator().manual_seed(0)
    for sigma in (0.0, 2.0):
        drawn = TWO.sample(100_000, generator, sigma).double()
        means, weights = torch.tensor(TWO.means, dtype=F64), torch.tensor([0.5, 0.25, 0.25], dtype=F64)
        scales = torch.tensor(TWO.scales, dtype=F64)
        mean = weights @ means
        second = weights @ (means**2 + scales.unsqueeze(-1) ** 2) + sigma**2
        torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.03)
        torch.testing.assert_close(drawn.square().mean(0), second, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_far_away_nothing_overflows(dtype):
    x = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 1e4]], dtype=dtype).requires_grad_()
    for sigma in (1e-3, 1.0, 1e4):
        for found in (TWO.log_prob(x, sigma), TWO.score(x, sigma), TWO.denoise(x, sigma)):
            assert found.dtype == dtype
            assert bool(found.isfinite().all())
            assert bool(torch.autograd.grad(found.sum(), x)[0].isfinite().all())


@pytest.mark.parametrize(
    "fields",
    [
        ((), (), ()),
        (((0.0,), (0.0, 1.0)), (1.0, 1.0), (1.0, 1.0)),
        (((0.0,),), (1.0, 1.0), (1.0,)),
        (((0.0,),), (-1.0,), (1.0,)),
        (((0.0,),), (1.0,), (0.0,)),
        (((0.0,),), (1.0,), (math.nan,)),
    ],
)
def test_what_is_no_mixture_is_refused(fields):
    with pytest.raises(ValueError, match=r"mixture|scales|weights"):
        Mixture(*fields)


def test_points_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match="2 coordinates"):
        TWO.denoise(torch.zeros(3, 4), 1.0)
