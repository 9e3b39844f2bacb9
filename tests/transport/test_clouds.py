"""Clouds of points, costs made block by block, and the debiased divergence."""

import math

import pytest
import torch
from tests.transport.problems import TIGHT, cloud, weights

from fdiv import KL, TV, Energy, Sinkhorn
from fdiv.transport import gaussian
from fdiv.transport.clouds import self_sinkhorn_between, sinkhorn_between
from fdiv.transport.costs import Power, squared_distance
from fdiv.transport.debiased import sinkhorn_divergence
from fdiv.transport.sinkhorn import Solver, sinkhorn


def clouds(n: int = 9, m: int = 7):
    return cloud(n, 2), cloud(m, 2, seed=1) + 0.5, weights(n), weights(m, seed=2)


# -- blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marginals", ["balanced", 2.0 * KL(), TV()], ids=repr)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_blocks_of_costs_give_what_the_whole_matrix_gives(marginals, chunk):
    x, y, log_a, log_b = clouds()
    options = {"marginals": marginals, "cost": Power(1.5), "solver": TIGHT}
    whole = sinkhorn_between(x, y, log_a, log_b, 0.5, chunk=0, **options)
    blocks = sinkhorn_between(x, y, log_a, log_b, 0.5, chunk=chunk, **options)
    torch.testing.assert_close(blocks.value, whole.value, rtol=1e-10, atol=0)
    for of in ("f", "g", "plan", "linear", "marginals"):
        torch.testing.assert_close(getattr(blocks, of), getattr(whole, of), rtol=1e-8, atol=1e-10)


def test_blocks_take_batches_annealing_and_the_symmetric_problem():
    x, y = cloud(3, 8, 2), cloud(6, 2, seed=1)
    for annealed in (False, True):
        solver = Solver(tolerance=1e-9, annealed=annealed)
        whole, blocks = (sinkhorn_between(x, y, eps=0.3, chunk=c, solver=solver) for c in (0, 3))
        torch.testing.assert_close(blocks.value, whole.value, rtol=1e-7, atol=0)
    whole, blocks = (self_sinkhorn_between(x, eps=0.3, chunk=c) for c in (0, 3))
    torch.testing.assert_close(blocks.value, whole.value, rtol=1e-8, atol=0)


class Widest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most numbers that any operation has returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_blocks_bound_the_memory_forward_and_backward():
    x, y = cloud(150, 2).requires_grad_(), cloud(100, 2, seed=1).requires_grad_()
    for chunk, most in ((0, 150 * 100), (5, 5 * 150)):
        with Widest() as widest:
            found = sinkhorn_divergence(x, y, eps=0.5, chunk=chunk, solver=Solver(tolerance=1e-2)).value
            torch.autograd.grad(found, (x, y))
        assert widest.numbers <= most if chunk else widest.numbers >= most


# -- costs -------------------------------------------------------------------------------------------


def test_costs_are_powers_of_the_distance_over_the_power():
    x, y, _, _ = clouds()
    for p in (1, 1.5, 2):
        torch.testing.assert_close(Power(p)(x, y), torch.cdist(x, y) ** p / p)
    torch.testing.assert_close(squared_distance(x, y), torch.cdist(x, y) ** 2)
    assert torch.autograd.gradgradcheck(squared_distance, (cloud(3, 2).requires_grad_(), y[:2]))


def test_points_far_from_the_origin_lose_no_digits_in_float32():
    x, y, log_a, log_b = (t.float() for t in clouds(30, 20))
    x, y = x.mul(64).round().div(64), y.mul(64).round().div(64)  # the shift is then exact
    for chunk in (0, 7):
        near, far = (
            sinkhorn_divergence(x + c, y + c, log_a, log_b, 0.5, chunk=chunk).value for c in (0.0, 4096.0)
        )
        torch.testing.assert_close(near, far, rtol=1e-6, atol=0)


def test_any_function_of_the_points_can_be_the_cost():
    x, y, log_a, log_b = clouds()

    def cosine(x, y):
        return 1 - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT

    found = sinkhorn_between(x, y, log_a, log_b, 0.1, cost=cosine)
    assert found.value.item() == pytest.approx(sinkhorn(cosine(x, y), log_a, log_b, 0.1).value.item())


@pytest.mark.parametrize(
    ("x", "y", "options"),
    [
        (torch.zeros(0, 2), torch.zeros(3, 2), {}),
        (torch.zeros(3, 2), torch.zeros(3, 3), {}),
        (torch.zeros(3), torch.zeros(3), {}),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"chunk": -1}),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"chunk": 2, "log_a": torch.zeros(3)}),
    ],
)
def test_clouds_that_cannot_be_compared_are_refused(x, y, options):
    with pytest.raises(ValueError, match="got"):
        sinkhorn_between(x, y, **options)


# -- the divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("marginals", ["balanced", 2.0 * KL(), 0.5 * TV()], ids=repr)
def test_the_divergence_is_zero_at_equality_and_above_elsewhere(marginals):
    solver = Solver(tolerance=1e-10)
    x, y, log_a, log_b = clouds(6, 5)
    if marginals != "balanced":
        log_a, log_b = log_a + 0.3, log_b - 0.4

    def divergence(*measures):
        return sinkhorn_divergence(*measures, 0.5, marginals=marginals, solver=solver).value.item()

    assert abs(divergence(x, x, log_a, log_a)) < 1e-12
    order = [3, 1, 0, 5, 4, 2]
    assert abs(divergence(x, x[order], log_a, log_a[order])) < 1e-9
    assert divergence(x, y, log_a, log_b) > 1e-3
    assert divergence(x, y, log_a, log_b) == pytest.approx(divergence(y, x, log_b, log_a), rel=1e-8)
    assert divergence(x, x, log_a, log_a.flip(0)) > 1e-5


def test_the_divergence_is_convex_in_a_measure():
    x, y, log_a, log_b = clouds()
    values = []
    for share in (0.0, 0.5, 1.0):
        mixed = ((1 - share) * log_a.exp() + share * log_a.flip(0).exp()).log()
        values.append(sinkhorn_divergence(x, y, mixed, log_b, 0.3, solver=TIGHT).value.item())
    assert values[1] < (values[0] + values[2]) / 2


def test_unequal_masses_pay_for_the_difference():
    """At one point S is rho (sqrt m_a - sqrt m_b)^2: each of the three problems is that of two Diracs."""
    point = torch.zeros(1, 2, dtype=torch.float64)
    log_a, log_b = (torch.tensor([math.log(m)], dtype=torch.float64) for m in (1.7, 0.6))
    eps, rho = 1e-4, 2.0
    found = sinkhorn_divergence(point, point, log_a, log_b, eps, marginals=rho * KL(), solver=TIGHT)
    assert found.value.item() == pytest.approx(rho * (math.sqrt(1.7) - math.sqrt(0.6)) ** 2, rel=1e-3)


def test_the_divergence_is_that_of_geomloss_balanced_and_not():
    geomloss = pytest.importorskip("geomloss")
    x, y, log_a, log_b = clouds(30, 20)
    for reach, marginals in ((None, "balanced"), (1.5, 1.5**2 * KL())):
        loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.7, scaling=0.999, reach=reach)
        x.requires_grad_()
        expected = loss(log_a.exp(), x, log_b.exp(), y)
        found = sinkhorn_divergence(x, y, log_a, log_b, 0.49, cost=Power(2), marginals=marginals).value
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        gradients = (torch.autograd.grad(value, x)[0] for value in (found, expected))
        ours, theirs = gradients
        if reach:  # geomloss's is that of its value times (rho + eps / 2) / (rho + eps)
            theirs = theirs * (reach**2 + 0.49) / (reach**2 + 0.49 / 2)
        assert (ours - theirs).norm() < 1e-2 * ours.norm()


def test_the_divergence_tends_to_energy_and_to_transport():
    ot = pytest.importorskip("ot")
    x, y, log_a, log_b = clouds()
    wide = sinkhorn_divergence(x, y, log_a, log_b, 1e5, cost=Power(1))
    assert wide.value.item() == pytest.approx(Energy().between(x, y, log_a, log_b).item() / 2, rel=1e-4)
    narrow = sinkhorn_divergence(x, y, log_a, log_b, 1e-4)
    exact = ot.emd2(log_a.exp().numpy(), log_b.exp().numpy(), squared_distance(x, y).numpy())
    assert narrow.value.item() == pytest.approx(exact, rel=1e-4)


def test_gaussians_on_a_grid_are_apart_by_the_closed_form():
    grid = torch.linspace(-14, 14, 400, dtype=torch.float64).unsqueeze(-1)

    def law(mean, variance):
        return (-(grid[:, 0] - mean).square() / (2 * variance)).log_softmax(0)

    found = sinkhorn_divergence(grid, grid, law(-0.5, 0.8), law(0.7, 1.9), 0.6, solver=Solver(tolerance=1e-9))
    laws = [torch.tensor(v, dtype=torch.float64) for v in ([-0.5], [[0.8]], [0.7], [[1.9]])]
    assert found.value.item() == pytest.approx(gaussian.debiased(*laws, 0.6).item(), rel=1e-8)
    assert found.cross.value.item() == pytest.approx(gaussian.entropic(*laws, 0.6).item(), rel=1e-8)
    carried = found.cross.plan @ grid[:, 0] / found.cross.marginals[0]  # mean of y given x
    centre = slice(150, 250)
    expected = gaussian.monge_map(*laws, eps=0.6)(grid)[:, 0]
    torch.testing.assert_close(carried[centre], expected[centre], rtol=1e-6, atol=1e-6)


def test_the_class_is_the_function_at_its_convention():
    x, y, log_a, log_b = clouds()
    for p in (1, 2):
        whole = sinkhorn_divergence(x, y, log_a, log_b, 0.4**p, cost=Power(p))
        assert Sinkhorn(0.4, p).between(x, y, log_a, log_b).item() == whole.value.item()
        biased = Sinkhorn(0.4, p, debias=False, chunk=3).between(x, y, log_a, log_b)
        assert biased.item() == pytest.approx(whole.cross.value.item(), rel=1e-8)
    assert whole.converged and whole.cross.converged
    with pytest.warns(RuntimeWarning, match="did not converge"):
        Sinkhorn(0.01, tolerance=1e-15).between(x.float(), y.float())
