"""Transport on lines: other costs than powers, directions at right angles, the line that tells most."""

import math
from functools import partial

import pytest
import torch
from tests.worlds import close, gradient

import fdiv
from fdiv import Sliced, Wasserstein1D
from fdiv.divergences.max_sliced import MaxSliced
from fdiv.divergences.wasserstein import unit_vectors

DOUBLE = partial(torch.tensor, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def white(n, width, scale, seed=0):
    """A cloud of mean 0 and covariance scale^2 I, to rounding."""
    x = normal(n, width, seed=seed)
    x = x - x.mean(0)
    return scale * x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n)).T


def problem(n=6, m=4):
    x, y = normal(n), normal(m, seed=2) + 0.5
    return x, y, normal(n, seed=1).log_softmax(-1), normal(m, seed=3).log_softmax(-1)


# -- any convex cost --------------------------------------------------------------------------------------


def huber(gap):
    return torch.where(gap.abs() < 0.5, gap.square(), gap.abs() - 0.25)


def uphill(gap):
    return torch.where(gap > 0, 3 * gap, -0.5 * gap)


def far_only(gap):
    return (gap.abs() - 0.3).clamp(min=0).square()


def exponential(gap):
    return gap.exp() - gap - 1


@pytest.mark.parametrize("cost", [huber, uphill, far_only, exponential])
def test_any_convex_cost_of_the_difference_is_that_of_the_linear_programme(cost):
    ot = pytest.importorskip("ot")
    x, y, log_a, log_b = problem()
    value = Wasserstein1D(cost=cost).between(x[:, None], y[:, None], log_a, log_b)
    exact = ot.emd2(log_a.exp().numpy(), log_b.exp().numpy(), cost(x[:, None] - y).numpy())
    assert value.item() == pytest.approx(exact)


def test_a_power_is_a_cost_like_others():
    x, y, log_a, log_b = problem()
    clouds = (x[:, None], y[:, None], log_a, log_b)
    for p in (1, 1.5, 3):
        value = Wasserstein1D(cost=lambda gap, p=p: gap.abs() ** p).between(*clouds)
        assert value.item() == pytest.approx(Wasserstein1D(p).between(*clouds).item())


def test_gradients_under_a_cost_are_those_of_the_value():
    x, y, log_a, log_b = problem()

    def value(x, y, a, b):
        clouds = (x[:, None], y[:, None], a.log_softmax(-1), b.log_softmax(-1))
        return Wasserstein1D(cost=exponential).between(*clouds)

    assert torch.autograd.gradcheck(value, tuple(t.requires_grad_() for t in (x, y, log_a, log_b)))


@pytest.mark.parametrize("cost", [lambda gap: gap.abs().sqrt(), lambda gap: -gap.square(), torch.sin])
def test_a_cost_that_is_not_convex_is_refused(cost):
    with pytest.raises(ValueError, match="convex function of x - y"):
        Wasserstein1D(cost=cost)


def test_an_exponent_beside_a_cost_and_a_cost_that_is_none_are_refused():
    with pytest.raises(ValueError, match="an exponent or a cost"):
        Wasserstein1D(3, cost=huber)
    with pytest.raises(TypeError, match="a function of x - y"):
        Wasserstein1D(cost="huber")  # type: ignore[arg-type]


# -- parity -----------------------------------------------------------------------------------------------


def test_wasserstein_1_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    x, y, log_a, log_b = problem()
    value = Wasserstein1D(1).between(x[:, None], y[:, None], log_a, log_b)
    clouds = (t.numpy() for t in (x, y, log_a.exp(), log_b.exp()))
    assert value.item() == pytest.approx(stats.wasserstein_distance(*clouds))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_sliced_is_the_power_of_pots_root_along_the_same_lines(p, orthogonal):
    ot = pytest.importorskip("ot")
    x, y = normal(20, 3), normal(15, 3, seed=2) + 0.5
    lines = unit_vectors(7, 3, 5, orthogonal)
    root = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=lines.T.numpy(), p=p)
    value = Sliced(p, directions=7, seed=5, orthogonal=orthogonal).between(x, y)
    assert value.item() == pytest.approx(root**p)


# -- directions at right angles ---------------------------------------------------------------------------


def test_whole_blocks_are_frames_and_the_rest_is_a_part_of_one():
    lines = unit_vectors(8, 3, 0, True)
    assert lines.shape == (8, 3)
    for block in (lines[:3], lines[3:6]):
        close(block @ block.T, torch.eye(3, dtype=torch.float64), 1e-12)
    assert (lines[6] @ lines[7]).abs() < 1e-12 and (lines[0] @ lines[3]).abs() > 1e-3


def test_frames_favour_no_direction():
    """E of a coordinate of a uniform unit vector is 0, of its square 1 / D; both without a preferred sign."""
    lines = unit_vectors(30_000, 3, 0, True)
    first = lines[::3]  # one of each frame: independent
    assert first.mean(0).abs().max() < 4 * math.sqrt(1 / 3 / len(first))
    close(first.square().mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), 0.05)


@pytest.mark.parametrize("blocks", [1, 4])
def test_gaussians_with_round_covariances_have_the_closed_form_in_whole_blocks(blocks):
    """N(0, s^2 I) and N(m, t^2 I): |m|^2 / D + (s - t)^2, here of clouds with these moments exactly."""
    shift, s, t = DOUBLE([1.0, -2.0, 0.5]), 0.7, 1.9
    x = white(50, 3, s)
    y = (t / s) * x + shift
    value = Sliced(directions=3 * blocks, orthogonal=True).between(x, y)
    assert value.item() == pytest.approx(shift.square().sum().item() / 3 + (s - t) ** 2, rel=1e-12)
    assert Sliced(directions=3 * blocks).between(x, y).item() != pytest.approx(value.item(), rel=1e-3)


def test_right_angles_lower_the_error_of_the_mean_over_the_sphere():
    x, y = normal(30, 4), normal(30, 4, seed=1) * DOUBLE([3.0, 1.0, 1.0, 0.3]) + 0.5
    truth = Sliced(1.5, directions=20_000, seed=10**6).between(x, y)

    def error(orthogonal):
        values = [Sliced(1.5, 8, seed, orthogonal).between(x, y) - truth for seed in range(200)]
        return torch.stack(values).square().mean()

    assert error(True) < 0.7 * error(False)


# -- the line that tells most -----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_shift_is_seen_whole_along_its_own_line(p):
    x, shift = normal(9, 4), DOUBLE([1.0, 2.0, -1.0, 0.5])
    value = MaxSliced(p).between(x, x + shift)
    assert value.item() == pytest.approx(shift.norm().item() ** p, rel=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_in_the_plane_it_is_the_best_of_all_angles(p):
    x, y = normal(12, 2), normal(9, 2, seed=1) * DOUBLE([0.4, 2.0]) + 0.2
    log_a, log_b = normal(12, seed=2).log_softmax(-1), normal(9, seed=3).log_softmax(-1)
    angles = torch.arange(20_000, dtype=torch.float64) * math.pi / 20_000
    lines = torch.stack([angles.cos(), angles.sin()], -1)
    on_x, on_y = ((lines @ points.T).unsqueeze(-1) for points in (x, y))
    best = Wasserstein1D(p).between(on_x, on_y, log_a[None], log_b[None]).max().item()
    value = MaxSliced(p).between(x, y, log_a, log_b).item()
    assert value == pytest.approx(best, rel=1e-6) and value >= best * (1 - 1e-7)


def test_it_lies_between_the_mean_over_lines_and_the_transport_itself():
    ot = pytest.importorskip("ot")
    for seed in range(5):
        x, y = normal(10, 3, seed=seed), normal(10, 3, seed=seed + 50) + 0.3
        exact = ot.emd2([], [], torch.cdist(x, y).square().numpy())
        value = MaxSliced().between(x, y).item()
        assert Sliced(directions=16, orthogonal=True).between(x, y).item() < value < exact


def test_its_gradient_is_that_along_the_line_it_found():
    x, y = normal(8, 3).requires_grad_(), normal(8, 3, seed=1) + 0.4
    metric = MaxSliced(steps=200)
    actual = gradient(metric.between(x, y), x).reshape(x.shape)
    for place in ((0, 0), (3, 2), (7, 1)):
        move = torch.zeros_like(x)
        move[place] = 1e-5
        change = metric.between(x.detach() + move, y) - metric.between(x.detach() - move, y)
        assert change.item() / 2e-5 == pytest.approx(actual[place].item(), rel=1e-3, abs=1e-6)


def test_equal_clouds_are_at_distance_zero_with_a_finite_gradient_and_the_order_of_clouds_is_nothing():
    x, y = normal(6, 3).requires_grad_(), normal(6, 3, seed=1)
    same = MaxSliced().between(x, x.detach())
    assert same.item() == 0 and gradient(same, x).isfinite().all()
    there, back = MaxSliced().between(x, y), MaxSliced().between(y, x)
    assert there.item() == pytest.approx(back.item(), rel=1e-6)


def test_each_problem_of_a_batch_has_a_line_of_its_own_and_weights_broadcast():
    x, y = normal(3, 6, 2), normal(1, 5, 2, seed=1)
    log_a = normal(2, 1, 6, seed=4).log_softmax(-1)
    values = MaxSliced().between(x, y, log_a)
    assert values.shape == (2, 3)
    alone = MaxSliced().between(x[1], y[0], log_a[1, 0])
    assert values[1, 1].item() == pytest.approx(alone.item(), rel=1e-9)
    with torch.no_grad():
        assert torch.equal(MaxSliced().between(x, y, log_a), values)


@pytest.mark.parametrize(
    "divergence",
    [Wasserstein1D(), Sliced(), Sliced(orthogonal=True), MaxSliced(), MaxSliced(1, 4, 9, 2)],
    ids=repr,
)
def test_its_notation_reads_back(divergence):
    assert fdiv.parse(repr(divergence), ["fdiv.divergences.max_sliced"]) == divergence


@pytest.mark.parametrize(
    "build",
    [
        lambda: MaxSliced(0.5),
        lambda: MaxSliced(starts=0),
        lambda: MaxSliced(steps=2.5),  # type: ignore[arg-type]
        lambda: MaxSliced(seed="0"),  # type: ignore[arg-type]
        lambda: Sliced(orthogonal=1),  # type: ignore[arg-type]
    ],
)
def test_parameters_out_of_range_are_refused_when_built(build):
    with pytest.raises(ValueError, match="got"):
        build()
