"""Probes of score fields: a rotation that moves no mass, and surfaces of known dimension."""

import math

import pytest
import torch

from fdiv.diffusion.edm import heun, karras, score
from fdiv.diffusion.mixture import Mixture
from fdiv.diffusion.probes import (
    asymmetry,
    dimension,
    dimension_by_flow,
    dimension_by_trace,
    divergence,
    gauge_residual,
    jacobian,
    loop_integral,
)

F64 = torch.float64
TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
TWO = Mixture(((-1.0, 0.5), (2.0, 0.0)), (0.5, 0.8), (0.4, 0.6))


def points(count=200, dim=2, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seeded(seed=1):  # not that of the points, or a probe would be the point
    return torch.Generator().manual_seed(seed)


def gaussian_score(x):
    return -x


def turned(c):
    """The score of N(0, I) and a rotation."""
    return lambda x: -x + c * x @ TURN.T


def of_mixture(x):
    return TWO.score(x)


# -- is it a gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0, 5.0])
def test_the_asymmetry_of_a_turned_score_is_known(c):
    expected = 4 * c**2 / (1 + c**2)
    assert asymmetry(turned(c), points()).item() == pytest.approx(expected)
    estimate = asymmetry(turned(c), points(2000), probes=4, generator=seeded())
    assert estimate.item() == pytest.approx(expected, rel=0.05, abs=1e-12)


def test_probes_find_the_asymmetry_of_a_field_that_bends():
    def field(x):
        return torch.stack([x[:, 0] * x[:, 1], x[:, 0].sin(), x[:, 2] * x[:, 0]], 1)

    x = points(4000, 3)
    exact = asymmetry(field, x).item()
    assert 0.1 < exact < 4
    assert asymmetry(field, x, probes=8, generator=seeded()).item() == pytest.approx(exact, rel=0.05)


def test_a_score_has_no_asymmetry_and_no_loop():
    assert asymmetry(of_mixture, points()).item() < 1e-24
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=F64)
    assert loop_integral(of_mixture, square, points=2000).item() == pytest.approx(0, abs=1e-6)


def test_a_loop_in_a_rotation_is_twice_its_area():
    triangle = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]], dtype=F64)
    for c in (0.5, -2.0):
        assert loop_integral(turned(c), triangle).item() == pytest.approx(-2 * 3.0 * c)
        assert loop_integral(turned(c), triangle.flip(0)).item() == pytest.approx(2 * 3.0 * c)


def test_the_jacobian_has_rows_for_outputs():
    x = points(3)
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    torch.testing.assert_close(jacobian(lambda at: at @ matrix.T, x), matrix.expand(3, 2, 2))
    images = x.view(3, 1, 2)
    torch.testing.assert_close(jacobian(lambda at: at @ matrix.T, images), matrix.expand(3, 2, 2))


def test_the_divergence_is_the_laplacian_of_the_log_density():
    x = points(20).requires_grad_()
    (slope,) = torch.autograd.grad(TWO.log_prob(x).sum(), x, create_graph=True)
    second = [torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)]
    exact = divergence(of_mixture, x.detach())
    torch.testing.assert_close(exact, second[0] + second[1])
    one = x.detach()[:1].expand(50_000, 2)
    estimate = divergence(of_mixture, one, probes=2, generator=seeded()).mean()
    torch.testing.assert_close(estimate, exact[0], rtol=0.02, atol=0.02)


# -- does it matter ----------------------------------------------------------------------------------------


def test_a_rotation_of_a_round_law_meets_the_gauge_condition():
    for probes in (None, 2):
        found = gauge_residual(turned(3.0), gaussian_score, points(), probes, seeded())
        assert found.item() == pytest.approx(0, abs=1e-20 if probes is None else 1e-6)


def test_a_remainder_that_moves_mass_has_the_residual_of_its_law():
    # R = c x under N(0, I): div R + R . s = c (d - |x|^2), whose square has the mean c^2 2 d.
    x = points(50_000, 3)
    for probes in (None, 1):
        found = gauge_residual(lambda at: -at + 0.5 * at, gaussian_score, x, probes, seeded())
        assert found.item() == pytest.approx(0.25 * 6, rel=0.05)


def test_the_residual_is_a_penalty_that_undoes_such_a_remainder():
    share = torch.tensor(0.7, dtype=F64, requires_grad=True)
    x = points(50_000, 3)
    for probes in (None, 2):
        found = gauge_residual(lambda at: -at + share * at, gaussian_score, x, probes, seeded())
        (slope,) = torch.autograd.grad(found, share)
        assert slope.item() == pytest.approx(2 * 0.7 * 6, rel=0.05)


def test_samples_of_a_turned_flow_have_the_same_law():
    # Data N(0, s^2 I); the denoiser D + sigma^2 c A x turns the flow and leaves every marginal.
    scale, x = 0.7, 80 * points(1000)

    def denoiser(x, sigma, c=2.0):
        plain = scale**2 * x / (scale**2 + sigma**2).unsqueeze(-1)
        return plain + c * (sigma**2 / (scale**2 + sigma**2)).unsqueeze(-1) * (x @ TURN.T)

    levels = karras(200)
    found, plain = heun(denoiser, x, levels), heun(lambda x, s: denoiser(x, s, 0.0), x, levels)
    assert (found - plain).norm(dim=1).mean() > 0.5  # not the same points
    torch.testing.assert_close(found.norm(dim=1), plain.norm(dim=1), rtol=0.02, atol=0)
    torch.testing.assert_close(found.T.cov(), plain.T.cov(), rtol=0, atol=0.02)


# -- how many dimensions ------------------------------------------------------------------------------------


def flat(dims, spread=1.0, dim=6):
    """Score and denoiser of a Gaussian on a subspace of dim dimensions, turned into the whole space."""
    frame = torch.linalg.qr(points(dim, dim, seed=5)).Q
    variance = torch.tensor([spread**2] * dims + [0.0] * (dim - dims), dtype=F64)

    def denoiser(x, sigma):
        shrink = variance / (variance + sigma.unsqueeze(-1) ** 2)
        return (x @ frame * shrink) @ frame.T

    x = (points(10, dim) * variance.sqrt()) @ frame.T
    return denoiser, x


@pytest.mark.parametrize("dims", [0, 1, 3, 6])
def test_the_dimension_of_a_subspace(dims):
    denoiser, x = flat(dims)
    noisy = x + 0.01 * points(10, 6, seed=1)

    def field(at):
        return score(denoiser, at, 0.01)

    assert dimension(field, noisy, 0.01).tolist() == [dims] * 10
    exact = torch.full((10,), dims / (1 + 1e-4), dtype=F64)
    torch.testing.assert_close(dimension_by_trace(field, noisy, 0.01), exact, rtol=0, atol=1e-9)
    one = noisy[:1].expand(10_000, 6)
    estimate = dimension_by_trace(field, one, 0.01, probes=2, generator=seeded()).mean()
    assert estimate.item() == pytest.approx(dims, abs=0.1)
    levels = karras(12, least=0.01, most=0.5)[:-1]
    assert dimension_by_flow(denoiser, x + 0.5 * points(10, 6, seed=1), levels).tolist() == [dims] * 10


def circle_score(x, sigma):
    """Of the uniform law on the unit circle: its density is exp(-|x|^2 / 2 sigma^2) I0(|x| / sigma^2)."""
    radius = x.norm(dim=1, keepdim=True)
    ratio = torch.special.i1e(radius / sigma**2) / torch.special.i0e(radius / sigma**2)
    return (ratio * x / radius - x) / sigma**2


def test_the_dimension_of_a_circle_depends_on_the_level_it_is_seen_at():
    turn = torch.linspace(0, 6, 12, dtype=F64)
    x = torch.stack([turn.cos(), turn.sin()], 1)
    near = dimension_by_trace(lambda at: circle_score(at, 0.1), x, 0.1)
    torch.testing.assert_close(near, torch.ones(12, dtype=F64), rtol=0, atol=0.01)
    assert dimension(lambda at: circle_score(at, 0.1), x, 0.1).tolist() == [1] * 12
    # From afar it is a point: E[x0 | x] hardly moves.
    assert dimension(lambda at: circle_score(at, 10.0), x, 10.0).tolist() == [0] * 12
    assert dimension_by_trace(lambda at: circle_score(at, 10.0), x, 10.0).max() < 0.02


def test_a_rotation_upsets_singular_values_but_not_the_trace():
    # Why a gradient is wanted here: the remainder meets the gauge condition, and the count is off.
    denoiser, x = flat(1, dim=2)

    def turned_field(at):
        return score(denoiser, at, 0.01) + 0.9e4 * at @ TURN.T

    plain = lambda at: score(denoiser, at, 0.01)  # noqa: E731
    assert dimension(plain, x, 0.01).tolist() == [1] * 10
    assert dimension(turned_field, x, 0.01).tolist() != [1] * 10
    torch.testing.assert_close(
        dimension_by_trace(turned_field, x, 0.01), dimension_by_trace(plain, x, 0.01), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: asymmetry(gaussian_score, points(), probes=0), "None for all"),
        (lambda: loop_integral(gaussian_score, points(2)), "three corners"),
        (lambda: dimension_by_flow(flat(1)[0], points(2, 6), karras(4)), "at 0 no direction"),
    ],
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_far_points_have_finite_probes():
    x = torch.tensor([[1e4, -1e4], [0.0, 0.0]], dtype=torch.float32)
    for found in (
        asymmetry(of_mixture, x),
        divergence(of_mixture, x, 2, seeded()),
        gauge_residual(of_mixture, gaussian_score, x),
    ):
        assert bool(found.isfinite().all())
    assert math.isfinite(loop_integral(of_mixture, 1e4 * points(3).float()).item())
