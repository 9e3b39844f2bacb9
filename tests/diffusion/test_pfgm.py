"""PFGM++'s kernel: Student's t, the Gaussian at its end, and the field of charges that PFGM began with."""

import math

import pytest
import torch

from fdiv.diffusion.mixture import Mixture
from fdiv.diffusion.pfgm import perturbed, posterior_mean, prior, rescaled

stats = pytest.importorskip("scipy.stats")

F64 = torch.float64
INF = math.inf


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize("dims", [0.5, 1, 3, 128, 1e6])
def test_a_norm_becomes_the_same_quantile_of_the_kernels_radius(size, dims):
    # R^2 / sigma^2 = N F for F of the F-distribution with N and D degrees of freedom.
    noise = normal(400, size)
    norm, radius = noise.norm(dim=1), rescaled(noise, dims).norm(dim=1)
    above = stats.chi2.sf((norm**2).numpy(), size)
    expected = torch.from_numpy((size * stats.f.isf(above, size, dims)) ** 0.5)
    below = stats.chi2.cdf((norm**2).numpy(), size)
    low = torch.from_numpy((size * stats.f.ppf(below, size, dims)) ** 0.5)
    torch.testing.assert_close(
        radius, torch.where(torch.from_numpy(below) < 0.5, low, expected), rtol=1e-5, atol=0
    )


def test_directions_stay_and_larger_norms_go_further():
    noise = normal(200, 3)
    found = rescaled(noise, 2.0)
    torch.testing.assert_close(
        found / found.norm(dim=1, keepdim=True), noise / noise.norm(dim=1, keepdim=True)
    )
    order = noise.norm(dim=1).argsort()
    assert bool((found.norm(dim=1)[order].diff() > 0).all())


@pytest.mark.parametrize(("dims", "sigma"), [(5, 0.5), (50, 2.0)])
def test_the_variance_of_a_coordinate_is_that_of_students_t(dims, sigma):
    x = torch.full((200_000, 2), 3.0, dtype=F64)
    drawn = perturbed(x, sigma, dims, torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.02)
    assert drawn.var(0).mean().item() == pytest.approx(sigma**2 * dims / (dims - 2), rel=0.02)


def test_a_coordinate_is_students_t():
    drawn = perturbed(torch.zeros(5000, 4, dtype=F64), 0.7, 3, torch.Generator().manual_seed(0))[:, 0] / 0.7
    assert stats.kstest(drawn.numpy(), stats.t(3).cdf).pvalue > 0.01


def test_infinitely_many_dimensions_are_gaussian_noise():
    x, noise = normal(5, 3), normal(5, 3, seed=1)
    found = perturbed(x, 0.3, INF, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, x + 0.3 * noise, rtol=0, atol=0)
    torch.testing.assert_close(rescaled(noise, 1e9), noise, rtol=1e-5, atol=0)


def test_each_row_has_its_own_level_and_every_shape_is_kept():
    x, sigma = torch.zeros(3, 1, 4, 4), torch.tensor([0.1, 1.0, 10.0])
    found = perturbed(x, sigma, 64, torch.Generator().manual_seed(0))
    ones = perturbed(x, 1.0, 64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, sigma.view(3, 1, 1, 1) * ones)


def test_the_prior_is_the_kernel_about_zero():
    found = prior((4, 2), 80.0, 7, torch.Generator().manual_seed(3))
    zeros = torch.zeros(4, 2)
    torch.testing.assert_close(found, perturbed(zeros, 80.0, 7, torch.Generator().manual_seed(3)))


def test_a_row_does_not_depend_on_the_others():
    noise = normal(6, 5)
    torch.testing.assert_close(rescaled(noise, 3.0)[2:3], rescaled(noise[2:3], 3.0), rtol=0, atol=0)


@pytest.mark.parametrize("dims", [1, 3, 1e6])
def test_no_norm_is_too_small_or_too_large(dims):
    for noise in (torch.zeros(2, 3), torch.full((2, 3), 1e-30), torch.full((2, 3), 1e4), torch.zeros(0, 3)):
        found = rescaled(noise, dims)
        assert found.shape == noise.shape
        assert found.dtype == noise.dtype
        assert bool(found.isfinite().all())


# -- the denoiser -----------------------------------------------------------------------------------------


def test_at_a_million_dimensions_the_denoiser_is_edms():
    points, x = normal(6, 2), normal(20, 2, seed=1)
    pairs = Mixture(tuple(map(tuple, points.tolist())), (0.0,) * 6, (1.0,) * 6)
    for sigma in (0.3, 1.0, 10.0):
        gaussian = pairs.denoise(x, sigma)
        torch.testing.assert_close(posterior_mean(x, points, sigma, INF), gaussian)
        torch.testing.assert_close(posterior_mean(x, points, sigma, 1e6), gaussian, rtol=0, atol=1e-5)


def test_one_dimension_is_pfgm_the_field_of_charges_in_one_more_dimension():
    # dx/dr = E_x / E_r of the field E of charges at (y, 0), seen from (x, r): the slope is (x - D) / r.
    points, sigma = normal(5, 3), 0.8
    place = torch.cat([normal(1, 3, seed=1).squeeze(0), torch.tensor([sigma], dtype=F64)]).requires_grad_()
    charges = torch.cat([points, torch.zeros(5, 1, dtype=F64)], 1)
    potential = ((place - charges).norm(dim=1) ** (1 - 3)).sum()  # of N + 1 = 4 dimensions
    (slope,) = torch.autograd.grad(potential, place)
    x = place.detach()[:3]
    ours = (x - posterior_mean(x.unsqueeze(0), points, sigma, 1)[0]) / sigma
    torch.testing.assert_close(ours, slope[:3] / slope[3])


def test_the_posterior_is_bayes_rule_for_students_t():
    points, x, dims, sigma = normal(4, 2), normal(3, 2, seed=1), 3.5, 0.6
    shape = [[sigma**2, 0.0], [0.0, sigma**2]]
    log_p = torch.stack([
        torch.from_numpy(stats.multivariate_t(y.numpy(), shape, df=dims).logpdf(x.numpy())) for y in points
    ], 1)  # fmt: skip
    torch.testing.assert_close(posterior_mean(x, points, sigma, dims), log_p.softmax(-1) @ points)


@pytest.mark.parametrize("dims", [1, 128, INF])
def test_far_points_and_small_levels_stay_finite(dims):
    points, x = normal(4, 2).float(), torch.tensor([[1e4, -1e4], [0.0, 0.0]])
    assert bool(posterior_mean(x, points, 1e-3, dims).isfinite().all())


@pytest.mark.parametrize("dims", [0.0, -1.0, math.nan])
def test_dims_is_positive(dims):
    with pytest.raises(ValueError, match="write inf"):
        rescaled(torch.zeros(1, 2), dims)
