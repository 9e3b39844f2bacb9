"""The metric family: problems that come with their exact answer, oracles, axioms and edges."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import fdiv
from fdiv import MMD, CauchySchwarz, Energy, Gaussian, Laplace, Sinkhorn, Sliced, Wasserstein1D

DOUBLE = partial(torch.tensor, dtype=torch.float64)
PLANE = [
    MMD(),
    MMD(Laplace(2.0)),
    Energy(),
    CauchySchwarz(1.0),
    Sliced(directions=8),
    Sinkhorn(1.0),
]
LINE = [*PLANE, Wasserstein1D(), Wasserstein1D(1), Wasserstein1D(1.5), Sinkhorn(1.0, p=1)]
EXACT = [d for d in LINE if not isinstance(d, Sinkhorn)]


def cloud(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(*shape: int, seed: int = 1, dtype=torch.float64) -> Tensor:
    return cloud(*shape, seed=seed, dtype=dtype).log_softmax(-1)


def problem(width: int = 1, n: int = 6, m: int = 4):
    return cloud(n, width), cloud(m, width, seed=2) + 0.5, weights(n), weights(m, seed=3)


# -- problems with an exact answer ---------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_a_translation_costs_its_length_to_the_p(p):
    x, _, log_a, _ = problem()
    value = Wasserstein1D(p).between(x, x + 0.7, log_a, log_a)
    assert value.item() == pytest.approx(0.7**p)


@pytest.mark.parametrize("divergence", LINE, ids=repr)
def test_a_permutation_of_points_and_weights_costs_nothing(divergence):
    x, _, log_a, _ = problem()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert divergence.between(x, x[order], log_a, log_a[order]).abs().item() < 1e-6


def test_two_gaussians_are_apart_by_their_means_and_widths():
    levels = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    x = math.sqrt(2) * torch.erfinv(2 * levels - 1).unsqueeze(-1)
    value = Wasserstein1D().between(x, 0.3 + 1.7 * x)
    assert value.item() == pytest.approx(0.3**2 + 0.7**2, rel=2e-3)


def test_sliced_gaussians_are_apart_by_a_share_of_their_means():
    x = cloud(3000, 3)
    value = Sliced(directions=200).between(x, 1.5 * x + DOUBLE([1.0, 0.0, 2.0]))
    assert value.item() == pytest.approx(5 / 3 + 0.25, rel=0.1)


@pytest.mark.parametrize(
    ("divergence", "value"),
    [
        (Wasserstein1D(3), 8.0),
        (Sliced(3), 8.0),
        (Energy(), 4.0),
        (MMD(Gaussian(2.0)), 2 - 2 * math.exp(-0.5)),
        (MMD(Laplace(2.0)), 2 - 2 * math.exp(-1.0)),
        (CauchySchwarz(2.0), 1.0),
        (Sinkhorn(0.1), 2.0),
        (Sinkhorn(0.1, p=1), 2.0),
    ],
    ids=repr,
)
def test_two_single_atoms_at_distance_two_have_a_closed_form(divergence, value):
    x, y = DOUBLE([[1.0]]), DOUBLE([[3.0]])
    assert divergence.between(x, y).item() == pytest.approx(value)
    weight = DOUBLE([0.0, -math.inf])
    padded = torch.cat([x, DOUBLE([[1e6]])])
    assert divergence.between(padded, y, weight).item() == pytest.approx(value, rel=1e-4)


def test_cauchy_schwarz_of_gaussian_samples_is_its_population_value():
    levels = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    x = math.sqrt(2) * torch.erfinv(2 * levels - 1).unsqueeze(-1)
    assert CauchySchwarz(0.5).between(x, x + 1.3).item() == pytest.approx(1.3**2 / 2.25, rel=1e-3)


# -- oracles ---------------------------------------------------------------------------------------


def by_loops(kernel, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> float:
    def total(x, y, a, b):
        return sum(
            (u * v * kernel((s - t).norm())).item()
            for s, u in zip(x, a, strict=True)
            for t, v in zip(y, b, strict=True)
        )

    return total(x, x, a, a) + total(y, y, b, b) - 2 * total(x, y, a, b)


@pytest.mark.parametrize(
    ("divergence", "kernel"),
    [
        (MMD(Gaussian(0.8)), lambda d: (-d * d / (2 * 0.8**2)).exp()),
        (MMD(Laplace(0.8)), lambda d: (-d / 0.8).exp()),
        (Energy(), lambda d: -d),
        (MMD(lambda x, y: -torch.cdist(x, y)), lambda d: -d),
    ],
)
def test_kernel_divergences_are_their_double_sums(divergence, kernel):
    x, y, log_a, log_b = problem(width=3)
    expected = by_loops(kernel, x, y, log_a.exp(), log_b.exp())
    assert divergence.between(x, y, log_a, log_b).item() == pytest.approx(expected)


def test_energy_is_the_square_of_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    x, y, log_a, log_b = problem()
    clouds = (t.flatten().numpy() for t in (x, y, log_a.exp(), log_b.exp()))
    expected = stats.energy_distance(*clouds) ** 2
    assert Energy().between(x, y, log_a, log_b).item() == pytest.approx(expected)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(("n", "m"), [(6, 4), (5, 5), (1, 7)])
def test_wasserstein_on_a_line_is_that_of_a_linear_programme(p, n, m):
    ot = pytest.importorskip("ot")
    x, y, log_a, log_b = problem(n=n, m=m)
    a, b = log_a.exp().numpy(), log_b.exp().numpy()
    value = Wasserstein1D(p).between(x, y, log_a, log_b).item()
    assert value == pytest.approx(ot.wasserstein_1d(x[:, 0].numpy(), y[:, 0].numpy(), a, b, p))
    assert value == pytest.approx(ot.emd2(a, b, (torch.cdist(x, y) ** p).numpy()))


def test_sliced_is_the_mean_over_its_directions():
    x, y, log_a, log_b = problem(width=3)
    one = torch.stack([x, y[[0, 1, 2, 3, 0, 1]]])
    assert Sliced(seed=1).between(x, y) != Sliced(seed=2).between(x, y)
    assert torch.equal(Sliced().between(one, y), Sliced().between(one, y))
    line = Sliced(3, directions=5).between(x[:, :1], y[:, :1], log_a, log_b)
    assert line.item() == pytest.approx(Wasserstein1D(3).between(x[:, :1], y[:, :1], log_a, log_b).item())


def transport(cost: Tensor, log_a: Tensor, log_b: Tensor, eps: float) -> Tensor:
    """The entropic problem, by its fixed point in the log domain, to convergence."""
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for _ in range(20_000):
        f = -eps * ((g - cost) / eps + log_b).logsumexp(1)
        new = -eps * ((f[:, None] - cost) / eps + log_a[:, None]).logsumexp(0)
        done = (new - g).abs().max() < 1e-12
        g = new
        if done:
            break
    return log_a.exp() @ f + log_b.exp() @ g


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_sinkhorn_is_the_converged_fixed_point_to_its_stated_accuracy(p):
    x, y, log_a, log_b = problem(width=2, n=20, m=15)
    blur = 0.2 * (torch.cat([x, y]).amax(0) - torch.cat([x, y]).amin(0)).norm().item()

    def exact(x, y, log_a, log_b):
        return transport(torch.cdist(x, y) ** p / p, log_a, log_b, blur**p).item()

    cross = exact(x, y, log_a, log_b)
    debiased = cross - (exact(x, x, log_a, log_a) + exact(y, y, log_b, log_b)) / 2
    for dtype, accuracy in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        cast = [t.to(dtype) for t in (x, y, log_a, log_b)]
        assert Sinkhorn(blur, p).between(*cast).item() == pytest.approx(debiased, rel=accuracy)
        biased = Sinkhorn(blur, p, debias=False).between(*cast).item()
        assert biased == pytest.approx(cross, rel=accuracy)


def test_sinkhorn_tends_to_transport_and_to_energy():
    x, y, log_a, log_b = problem()
    clouds = (x, y, log_a, log_b)
    assert Sinkhorn(0.01).between(*clouds).item() == pytest.approx(
        Wasserstein1D().between(*clouds).item() / 2, rel=1e-2
    )
    assert Sinkhorn(1e4, p=1).between(*clouds).item() == pytest.approx(
        Energy().between(*clouds).item() / 2, rel=1e-3
    )


def test_sinkhorn_leaves_the_grad_mode_as_it_was():
    x, y, _, _ = problem()
    x.requires_grad_()
    with torch.no_grad():
        value = Sinkhorn(1.0).between(x, y)
        assert not torch.is_grad_enabled() and not value.requires_grad
    assert Sinkhorn(1.0).between(x, y).requires_grad


# -- axioms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", LINE, ids=repr)
def test_metric_axioms_hold(divergence):
    x, y, log_a, log_b = problem()
    there = divergence.between(x, y, log_a, log_b)
    back = divergence.between(y, x, log_b, log_a)
    assert there.item() > 0
    assert there.item() == pytest.approx(back.item())
    assert divergence.between(x, x, log_a, log_a).item() == pytest.approx(0, abs=1e-14)
    assert divergence.between(x, x, log_a, weights(6, seed=9)).item() > 0


@pytest.mark.parametrize("divergence", LINE, ids=repr)
def test_batches_are_rows_one_by_one_and_weights_broadcast_against_points(divergence):
    points, log_p, log_q = cloud(5, 1), weights(2, 3, 5), weights(3, 5, seed=4)
    on = divergence.on(points)(log_p, log_q)
    assert on.shape == (2, 3)
    for i, j in ((0, 0), (1, 2)):
        alone = divergence.between(points, points, log_p[i, j], log_q[j]).item()
        assert on[i, j].item() == pytest.approx(alone, rel=1e-3, abs=1e-9)
    x, y = cloud(3, 5, 1), cloud(4, 1, seed=5)
    rows = divergence.between(x, y, log_q)
    assert rows.shape == (3,)
    alone = divergence.between(x[1], y, log_q[1]).item()
    assert rows[1].item() == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("divergence", LINE, ids=repr)
def test_an_atom_without_mass_changes_nothing_and_has_a_finite_gradient(divergence):
    x, y, log_a, log_b = problem()
    expected = divergence.between(x, y, log_a, log_b).item()
    x = torch.cat([x, DOUBLE([[2.0]])]).requires_grad_()
    log_a = torch.cat([log_a, DOUBLE([-math.inf])]).requires_grad_()
    value = divergence.between(x, y, log_a, log_b)
    assert value.item() == pytest.approx(expected, rel=1e-3)
    in_x, in_a = torch.autograd.grad(value, (x, log_a))
    assert in_x.isfinite().all() and in_a.isfinite().all()
    assert in_x[-1].item() == 0 and in_a[-1].item() == 0


@pytest.mark.parametrize("divergence", LINE, ids=repr)
def test_coincident_points_have_a_finite_gradient(divergence):
    x = DOUBLE([[0.0], [0.0], [1.0]]).requires_grad_()
    y = DOUBLE([[0.0], [1.0], [1.0], [1.0]]).requires_grad_()
    for other in (y, x.detach().clone().requires_grad_()):
        for gradient in torch.autograd.grad(divergence.between(x, other), (x, other)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", EXACT, ids=repr)
def test_gradients_in_points_and_weights_are_those_of_the_value(divergence):
    x, y, log_a, log_b = (t.requires_grad_() for t in problem())

    def normalised(x, y, log_a, log_b):  # Wasserstein is a function of probabilities only
        return divergence.between(x, y, log_a.log_softmax(-1), log_b.log_softmax(-1))

    assert torch.autograd.gradcheck(normalised, (x, y, log_a, log_b))


@pytest.mark.parametrize("p", [1, 2])
def test_sinkhorn_gradients_are_those_of_the_value_at_convergence(p):
    def value(x, y, log_a, log_b):
        weighted = (log_a.log_softmax(-1), log_b.log_softmax(-1))
        return Sinkhorn(2.0, p, tolerance=1e-12).between(x, y, *weighted)

    inputs = tuple(t.requires_grad_() for t in problem(n=3, m=3))
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("divergence", LINE, ids=repr)
def test_the_first_variation_on_points_is_the_price_of_moving_mass(divergence):
    points, log_p, log_q = cloud(5, 1), weights(5), weights(5, seed=4)
    on = divergence.on(points)
    in_p, in_q = on.first_variation(log_p, log_q)
    move = 1e-5 * DOUBLE([0.0, 1.0, 0.0, -1.0, 0.0])
    p, q = log_p.exp(), log_q.exp()
    by_p = on((p + move).log(), log_q) - on((p - move).log(), log_q)
    by_q = on(log_p, (q + move).log()) - on(log_p, (q - move).log())
    assert by_p.item() == pytest.approx(2 * (in_p * move).sum().item(), rel=1e-6)
    assert by_q.item() == pytest.approx(2 * (in_q * move).sum().item(), rel=1e-6)


@pytest.mark.parametrize("divergence", [Wasserstein1D(), Sliced(directions=4), Energy()], ids=repr)
def test_an_almost_empty_atom_has_the_price_of_giving_it_mass(divergence):
    points, log_q = cloud(5, 1), weights(5, seed=4)
    log_p = torch.cat([weights(4), DOUBLE([-60.0])])
    on = divergence.on(points)
    in_p, _ = on.first_variation(log_p, log_q)
    move = 1e-6 * DOUBLE([-1.0, 0.0, 0.0, 0.0, 1.0])
    change = on((log_p.exp() + move).log(), log_q) - on(log_p, log_q)
    assert change.item() == pytest.approx((in_p * move).sum().item(), rel=1e-4)


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", LINE, ids=repr)
def test_half_precision_is_computed_in_float32(divergence):
    x, y = problem()[:2]
    halves = [t.bfloat16() for t in (x, y)]
    value = divergence.between(*halves)
    assert value.dtype == torch.float32
    expected = divergence.between(*(t.double() for t in halves))
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    log_p, log_q = weights(40).bfloat16(), weights(40, seed=5).bfloat16()
    assert divergence.on(cloud(40, 1))(log_p, log_q).dtype == torch.float32


@pytest.mark.parametrize("divergence", [MMD(), Energy(), Sliced()], ids=repr)
def test_autocast_does_not_lower_the_precision(divergence):
    x, y = (t.float() for t in problem(width=2)[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = divergence.between(x, y)
    assert torch.equal(value, divergence.between(x, y))


@pytest.mark.parametrize("divergence", PLANE, ids=repr)
def test_clouds_far_from_the_origin_lose_no_digits(divergence):
    x, y = (t.float() for t in problem(width=2)[:2])
    x, y = (t.mul(64).round().div(64) for t in (x, y))  # the shift below is then exact
    near, far = divergence.between(x, y), divergence.between(x + 1024, y + 1024)
    torch.testing.assert_close(far, near, rtol=2e-3, atol=1e-6)


def test_distant_clouds_keep_a_finite_cauchy_schwarz_and_its_pull():
    x = torch.zeros(3, 2, requires_grad=True)
    value = CauchySchwarz(1.0).between(x, torch.full((4, 2), 1000.0))
    assert value.item() == pytest.approx(2e6)
    assert torch.autograd.grad(value, x)[0].sum(0).tolist() == pytest.approx([-2000.0, -2000.0])


@pytest.mark.parametrize("divergence", LINE, ids=repr)
def test_its_notation_reads_back(divergence):
    assert fdiv.parse(repr(divergence)) == divergence
    assert hash(fdiv.parse(repr(divergence))) == hash(divergence)


@pytest.mark.parametrize("divergence", [Wasserstein1D(), Sliced(), Sinkhorn(1.0)], ids=repr)
def test_transport_refuses_measures_of_different_mass(divergence):
    x, y, log_a, log_b = problem()
    with pytest.raises(ValueError, match="equal mass, got 2 and 1"):
        divergence.between(x, y, log_a + math.log(2), log_b)


def test_wasserstein_refuses_the_plane_and_names_sliced():
    with pytest.raises(ValueError, match="Sliced"):
        Wasserstein1D().between(cloud(3, 2), cloud(3, 2))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gaussian(0.0),
        lambda: Laplace(-1.0),
        lambda: CauchySchwarz(math.inf),
        lambda: Wasserstein1D(0.5),
        lambda: Sliced(directions=0),
        lambda: Sliced(seed=0.5),
        lambda: Sinkhorn(0.0),
        lambda: Sinkhorn(1.0, p=3),
        lambda: Sinkhorn(1.0, debias="yes"),
        lambda: Sinkhorn(1.0, tolerance=0.0),
        lambda: Sinkhorn(1.0, chunk=-1),
        lambda: MMD("gaussian"),
        lambda: MMD(Gaussian),
    ],
)
def test_parameters_out_of_range_are_refused_when_built(build):
    with pytest.raises((ValueError, TypeError), match="got"):
        build()
