"""f_softargmax against closed forms, its conditions of optimality, finite differences and entmax."""

import math

import pytest
import torch
from tests.methods.test_fdpo_optimum import BETA, REFERENCE, REWARDS, optimum
from tests.methods.test_fdpo_optimum import SMOOTH as OPTIMA
from tests.test_divergences import ROWS
from tests.thinned import fewer, thinned
from torch import Tensor

from fdiv import (
    JS,
    KL,
    TV,
    Alpha,
    Generator,
    Pearson,
    Renyi,
    ReverseKL,
    SkewReverseKL,
    SoftenedKL,
    SquaredHellinger,
    Triangular,
)
from fdiv.operators import _candidates, _solver
from fdiv.operators._root import rising_root
from fdiv.operators.softargmax import f_softargmax

torch.set_num_threads(1)

SMOOTH = [row.divergence for row in ROWS if row.divergence.is_smooth]
KINKED = [row.divergence for row in ROWS if not row.divergence.is_smooth]
SPARSE = [d for d in SMOOTH if d.slope_at_zero > -100]  # Alpha(1 + 1e-6) keeps all atoms
each_smooth = pytest.mark.parametrize("divergence", SMOOTH, ids=repr)
each_kind = pytest.mark.parametrize("divergence", SMOOTH[1::3], ids=repr)
each_sparse = pytest.mark.parametrize("divergence", SPARSE, ids=repr)
NARROW, LARGE = 7, 1500  # the second goes through the candidates for the support


def draw(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=source, dtype=torch.float64)


def assert_close(got: Tensor, expected: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


# -- closed forms ----------------------------------------------------------------------------------------


def by_sorting(theta: Tensor, alpha: float) -> Tensor:
    """sparsemax (2) and 1.5-entmax: tau in closed form for each size of the support; the largest holds."""
    z = theta.sort(-1, descending=True).values
    size = torch.arange(1, theta.shape[-1] + 1, dtype=theta.dtype)
    if alpha == 2.0:
        tau = (z.cumsum(-1) - 1) / size
    else:
        z, theta = z / 2, theta / 2
        mean = z.cumsum(-1) / size
        variance = z.square().cumsum(-1) / size - mean.square()
        tau = mean - (1 / size - variance).clamp(min=0).sqrt()
    last = (z > tau).sum(-1, keepdim=True) - 1
    above = (theta - tau.gather(-1, last)).clamp(min=0)
    return above if alpha == 2.0 else above.square()


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.0)], ids=repr)
def test_kl_is_softmax_with_the_reference_added(divergence):
    theta, reference = draw(4, NARROW), draw(4, NARROW, seed=1)
    assert_close(f_softargmax(theta, divergence), theta.softmax(-1))
    assert_close(f_softargmax(theta, divergence, reference), (theta + reference).softmax(-1))


@pytest.mark.parametrize("atoms", [NARROW, LARGE])
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_alpha_is_sparsemax_and_entmax_without_a_change_of_scale(alpha, atoms):
    theta = draw(5, atoms, seed=2)
    assert_close(f_softargmax(theta, Alpha(alpha)), by_sorting(theta, alpha))


def test_pearson_is_twice_alpha_2_and_so_sparsemax_at_half_the_scores():
    theta = draw(5, NARROW, seed=3)
    assert_close(f_softargmax(theta, Pearson()), by_sorting(theta / 2, 2.0))


@pytest.mark.parametrize("atoms", [NARROW, LARGE])
def test_the_entmax_package_agrees(atoms):
    entmax = pytest.importorskip("entmax")
    theta = draw(5, atoms, seed=4)
    assert_close(f_softargmax(theta, Alpha(1.5)), entmax.entmax15(theta))
    assert_close(f_softargmax(theta, Alpha(2.0)), entmax.sparsemax(theta))
    for alpha in (1.05, 1.25, 1.7, 3.0):
        assert_close(f_softargmax(theta, Alpha(alpha)), entmax.entmax_bisect(theta, alpha, n_iter=60), 1e-12)


def test_the_entmax_package_agrees_on_the_gradient():
    entmax = pytest.importorskip("entmax")
    weight = draw(5, LARGE, seed=5)
    for alpha in (1.25, 1.5, 2.0):
        theta = draw(5, LARGE, seed=6).requires_grad_()
        (ours,) = torch.autograd.grad((weight * f_softargmax(theta, Alpha(alpha))).sum(), theta)
        (theirs,) = torch.autograd.grad((weight * entmax.entmax_bisect(theta, alpha, n_iter=60)).sum(), theta)
        assert_close(ours, theirs, 1e-11)


def test_numbers_worked_out_by_hand():
    theta = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    expected = torch.tensor([0.673992636, 0.326007364, 0.0], dtype=torch.float64)
    assert_close(f_softargmax(theta, Alpha(1.5)), expected, 1e-9)
    # Reverse KL, q = 1/2, scores (0, s): x_2 = 1 / (2 (t - s)), t the larger root of t^2 - t(s+1) + s/2.
    s = 1.7
    t = (s + 1 + math.sqrt((s + 1) ** 2 - 2 * s)) / 2
    half = torch.full((2,), -math.log(2), dtype=torch.float64)
    x = f_softargmax(torch.tensor([0.0, s], dtype=torch.float64), ReverseKL(), half)
    assert x[1].item() == pytest.approx(0.5 / (t - s), rel=1e-14)


def test_a_constant_reference_is_a_temperature_to_the_alpha_family():
    theta = draw(3, NARROW, seed=7)
    for alpha in (0.5, 1.5, 3.0):
        reference = torch.full((NARROW,), math.log(0.2), dtype=torch.float64)
        expected = f_softargmax(theta * 0.2 ** (alpha - 1), Alpha(alpha))
        assert_close(f_softargmax(theta, Alpha(alpha), reference), expected, 1e-12)


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), Pearson(), JS(0.3)], ids=repr)
def test_a_weight_on_the_divergence_is_a_temperature(divergence):
    theta = draw(3, NARROW, seed=8)
    assert_close(f_softargmax(theta, 2.5 * divergence), f_softargmax(theta / 2.5, divergence), 1e-12)


def test_all_the_probability_is_on_one_atom_from_the_margin_on():
    for alpha in (1.25, 1.5, 2.0, 3.0):
        margin = 1 / (alpha - 1)
        gaps = torch.tensor([[0.999 * margin, 0.0], [margin, 0.0]], dtype=torch.float64)
        x = f_softargmax(gaps, Alpha(alpha))
        assert x[0, 1] > 0
        assert x[1].tolist() == [1.0, 0.0]


# -- the conditions of optimality --------------------------------------------------------------------------


def assert_optimal(divergence, theta: Tensor, log_q: Tensor, x: Tensor) -> None:
    """Sum 1; theta - f'(x/q) is one tau where x > 0, and at x = 0 no more than that tau."""
    tolerance = 1e-9 if isinstance(divergence, Generator) else 1e-12
    assert_close(x.sum(-1), torch.ones_like(x.sum(-1)), 1e-13)
    held = x > 1e-290  # the rest is 0, or near underflow
    slope = divergence.phi(x.clamp(min=1e-290).log() - log_q)
    slack = tolerance * (1 + torch.where(held, slope.abs() + theta.abs(), 0.0).amax(-1))
    tau = (theta - slope).masked_fill(~held, -math.inf).amax(-1)
    assert ((theta - slope).masked_fill(~held, math.inf).amin(-1) >= tau - slack).all()
    assert ((theta - slope).masked_fill(held, -math.inf).amax(-1) <= tau + slack).all()


@pytest.mark.parametrize("divergence", thinned(SMOOTH), ids=repr)
@pytest.mark.parametrize("atoms", [NARROW, LARGE])
def test_the_maximiser_is_optimal_with_and_without_a_reference(divergence, atoms):
    theta = draw(4, atoms, seed=9) * torch.tensor([[0.5], [2.0], [10.0], [100.0]])
    log_q = draw(4, atoms, seed=10).log_softmax(-1)
    assert_optimal(divergence, theta, torch.zeros_like(theta), f_softargmax(theta, divergence))
    assert_optimal(divergence, theta, log_q, f_softargmax(theta, divergence, log_q))


@each_kind
def test_no_other_distribution_does_better(divergence):
    theta, log_q = draw(NARROW, seed=11), draw(NARROW, seed=12).log_softmax(-1)
    x = f_softargmax(theta, divergence, log_q)
    others = torch.lerp(x, draw(200, NARROW, seed=13).softmax(-1), torch.rand(200, 1, dtype=torch.float64))

    def objective(x):
        return (x * theta).sum(-1) - divergence(x.log(), log_q)

    assert (objective(others) < objective(x)).all()


@each_smooth
def test_a_constant_added_to_the_scores_changes_nothing(divergence):
    theta = draw(3, NARROW, seed=14)
    assert_close(f_softargmax(theta + 7.5, divergence), f_softargmax(theta, divergence), 1e-12)


@each_kind
def test_equal_scores_share_equally_and_one_atom_takes_all(divergence):
    theta = torch.tensor([[2.0, 2.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    x = f_softargmax(theta, divergence)
    assert_close(x[0, 0], x[0, 1]), assert_close(x[0, 2], x[0, 3])
    assert_close(x[1], torch.full((4,), 0.25, dtype=torch.float64))
    assert f_softargmax(torch.tensor([-3.0]), divergence).tolist() == [1.0]


@each_sparse
def test_the_candidates_hold_the_support_and_are_few(divergence):
    theta, log_q = draw(3, LARGE, seed=15, scale=3.0), torch.zeros(1, 1, dtype=torch.float64).expand(3, LARGE)
    few = _candidates.candidates(theta, log_q, divergence)
    assert few is not None
    held = _solver.solve(theta, log_q, divergence).x > 0
    kept = torch.zeros_like(held)
    kept[few.row, few.column] = True
    assert (kept >= held).all()
    assert few.width < LARGE // 2


def test_the_support_of_a_vocabulary_is_found_among_few_of_its_atoms():
    theta = draw(8, 32_003, seed=16, scale=1.0)
    few = _candidates.candidates(theta, torch.zeros(1, 1, dtype=torch.float64).expand_as(theta), Alpha(1.5))
    assert few is not None and few.width < 600
    assert_close(f_softargmax(theta, Alpha(1.5)), by_sorting(theta, 1.5))


def test_rows_of_unlike_support_stand_side_by_side():
    theta = draw(3, LARGE, seed=17)
    theta[1] *= 100
    theta[2, 5:] = -math.inf
    expected = torch.cat([f_softargmax(row, Alpha(1.5)).unsqueeze(0) for row in theta])
    assert_close(f_softargmax(theta, Alpha(1.5)), expected)
    assert (expected > 0).sum(-1).tolist()[1:] == [1, (expected[2] > 0).sum().item()]


@pytest.mark.parametrize("divergence", [ReverseKL(), SquaredHellinger(), SoftenedKL()], ids=repr)
def test_where_newton_does_not_converge_the_bracket_gives_the_same(divergence, monkeypatch):
    theta, log_q = draw(3, NARROW, seed=18), draw(3, NARROW, seed=19).log_softmax(-1)
    theta[2] *= 100
    expected = f_softargmax(theta, divergence, log_q)
    monkeypatch.setattr(_solver, "NEWTON_STEPS", 0)
    assert_close(f_softargmax(theta, divergence, log_q), expected, 1e-12)


def test_a_root_at_the_end_of_its_bracket_stays_while_others_are_looked_for():
    tried = []

    def function(x: Tensor) -> Tensor:
        tried.append(x)
        return torch.stack([x[0], x[1] ** 3 - 0.3, (40 * (x[2] - 0.1)).expm1(), x[3] + 1])

    low, high = -torch.ones(4, dtype=torch.float64), torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)
    root = rising_root(function, low, high, 1e-14)
    assert_close(root, torch.tensor([0.0, 0.3 ** (1 / 3), 0.1, -1.0], dtype=torch.float64))
    assert len(tried) < 20


# -- derivatives -------------------------------------------------------------------------------------------


def finite_differences(function, at: Tensor, step: float) -> Tensor:
    """d function_i / d at_j of a map of rows to rows, [atoms, atoms]: all steps in one batch."""
    steps = step * torch.eye(len(at), dtype=at.dtype)
    return ((function(at + steps) - function(at - steps)) / (2 * step)).T


def jacobian(function, at: Tensor) -> Tensor:
    """The same by autograd: one copy of the row an output."""
    rows = at.expand(len(at), -1).clone().requires_grad_()
    (result,) = torch.autograd.grad(function(rows).diagonal().sum(), rows)
    return result


@pytest.mark.parametrize("divergence", thinned(SMOOTH), ids=repr)
def test_the_derivatives_are_those_of_finite_differences(divergence):
    theta, log_q = draw(NARROW, seed=20), draw(NARROW, seed=21).log_softmax(-1)
    for function, at in (
        (lambda t: f_softargmax(t, divergence, log_q), theta),
        (lambda s: f_softargmax(theta.expand_as(s), divergence, s), log_q),
    ):
        assert_close(jacobian(function, at), finite_differences(function, at, 1e-5), 1e-7)


@pytest.mark.parametrize(
    "divergence",
    [KL(), Alpha(1.5), Alpha(-0.5), Pearson(), JS(0.3), SkewReverseKL(0.3), 0.5 * KL() + 3.0 * Pearson()],
    ids=repr,
)
def test_the_second_derivatives_are_those_of_finite_differences(divergence):
    theta, log_q, weight = draw(NARROW, seed=20), draw(NARROW, seed=21).log_softmax(-1), draw(NARROW, seed=22)

    def pulled_back(theta: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [t if t.requires_grad else t.detach().requires_grad_() for t in (theta, log_q)]
        total = (weight * f_softargmax(wanted[0], divergence, wanted[1])).sum()
        return torch.autograd.grad(total, wanted, create_graph=True)

    rows = theta.expand(NARROW, -1)
    for which in (0, 1):
        for function, at in (
            (lambda t, i=which: pulled_back(t, log_q.expand(len(t), -1))[i], theta),
            (lambda s, i=which: pulled_back(rows[: len(s)], s)[i], log_q),
        ):
            expected = finite_differences(lambda x, f=function: f(x).detach(), at, 1e-5)
            assert_close(jacobian(function, at), expected, 1e-6)


@pytest.mark.parametrize("divergence", [Alpha(1.5), SquaredHellinger()], ids=repr)
def test_torch_finds_both_derivatives_right(divergence):
    theta, log_q = draw(2, 3, seed=23).requires_grad_(), draw(1, 3, seed=24).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, s: f_softargmax(t, divergence, s), (theta, log_q))
    assert torch.autograd.gradgradcheck(lambda t, s: f_softargmax(t, divergence, s), (theta, log_q))


@pytest.mark.parametrize("alpha", [0.5, 1.25, 1.5, 2.0])
def test_the_jacobian_is_the_closed_form_of_the_alpha_family(alpha):
    theta, log_q = draw(NARROW, seed=25), draw(NARROW, seed=26).log_softmax(-1)
    x = f_softargmax(theta, Alpha(alpha), log_q)
    w = torch.where(x > 0, x ** (2 - alpha) * log_q.exp() ** (alpha - 1), 0.0)
    expected = torch.diag(w) - w.outer(w) / w.sum()
    assert_close(jacobian(lambda t: f_softargmax(t, Alpha(alpha), log_q), theta), expected, 1e-12)


@each_kind
def test_the_largest_value_has_the_maximiser_as_its_gradient(divergence):
    theta, log_q = draw(3, NARROW, seed=27).requires_grad_(), draw(3, NARROW, seed=28).log_softmax(-1)
    x = f_softargmax(theta, divergence, log_q)
    held = x > 0
    log_x = torch.where(held, x, 1.0).log().masked_fill(~held, -math.inf)
    value = (x * theta).sum() - divergence(log_x, log_q).sum()
    (grad,) = torch.autograd.grad(value, theta)
    assert_close(grad, x.detach(), 1e-8)


def test_peaked_rows_have_finite_gradients_that_sum_to_zero():
    theta, weight = draw(50, NARROW, seed=29, scale=100.0), draw(50, NARROW, seed=30)
    for divergence in SMOOTH:
        for reference in (None, draw(50, NARROW, seed=31, scale=10.0).log_softmax(-1)):
            at = theta.clone().requires_grad_()
            (grad,) = torch.autograd.grad((weight * f_softargmax(at, divergence, reference)).sum(), at)
            assert grad.isfinite().all()
            assert (grad.sum(-1).abs() <= 1e-9 * grad.abs().amax(-1) + 1e-15).all()


@pytest.mark.parametrize("steps", [_solver.NEWTON_STEPS, 0])
def test_the_best_atom_may_have_hardly_any_mass(steps, monkeypatch):
    """Reverse KL at q_1 = e^-40: 1 - (theta_1 - tau) = q_1 / x_1 is far below the rounding of theta - tau."""
    monkeypatch.setattr(_solver, "NEWTON_STEPS", steps)
    log_q = torch.tensor([-40.0, 0.0, -1.0], dtype=torch.float64)
    theta = torch.tensor([10.0, 0.0, 1.0], dtype=torch.float64).requires_grad_()
    x = f_softargmax(theta, ReverseKL(), log_q)
    others = log_q.exp()[1:] / (10.0 - theta.detach()[1:])  # at theta_1 - tau = 1, up to e^-40
    assert_close(x.detach()[1:], others, 1e-15)
    (grad,) = torch.autograd.grad(x[0], theta)
    w = others.square() / log_q.exp()[1:]
    assert_close(grad, torch.cat([w.sum().unsqueeze(0), -w]), 1e-14)


@pytest.mark.parametrize(
    "divergence", [JS(0.5), SquaredHellinger(), SkewReverseKL(0.3), Triangular()], ids=repr
)
def test_the_derivatives_hold_where_the_best_atom_has_hardly_any_mass(divergence):
    log_q = torch.tensor([-25.0, 0.0, -0.5, -1.0], dtype=torch.float64)
    theta = torch.tensor([2.5, 0.5, 0.8, 0.6], dtype=torch.float64)

    def function(t: Tensor) -> Tensor:
        return f_softargmax(t, divergence, log_q)

    assert function(theta)[0] > 0.01
    assert_close(jacobian(function, theta), finite_differences(function, theta, 1e-5), 1e-8)


@each_sparse
def test_an_atom_entering_the_support_moves_no_faster_than_one_just_inside(divergence):
    """Where x_2 -> 0, u f''(u) is lost to rounding, and x / (u f''(u)) must not be made of what is left."""
    edge = abs(divergence.slope_at_zero)
    inside = torch.cat(
        [
            edge * (1e-16 * torch.arange(1, 60, dtype=torch.float64) - 1),
            torch.tensor([1e-4 - edge], dtype=torch.float64),
        ]
    )
    theta = torch.stack([torch.zeros_like(inside), inside], -1).requires_grad_()
    (grad,) = torch.autograd.grad(f_softargmax(theta, divergence)[:, 1].sum(), theta)
    assert (grad[:, 1] >= 0).all()
    assert (grad[:-1, 1] <= 1.1 * grad[-1, 1]).all()


def test_a_best_atom_of_hardly_any_mass_does_not_overflow_the_fast_path():
    theta, log_q = torch.tensor([1.0, 0.0]), torch.tensor([-100.0, 0.0])
    for alpha in (1.25, 1.5, 2.0):
        expected = f_softargmax(theta.double(), Alpha(alpha), log_q.double())
        torch.testing.assert_close(f_softargmax(theta, Alpha(alpha), log_q), expected.float())


# -- masks, shapes and types -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "atoms"),
    [*((d, NARROW) for d in SMOOTH[1::3]), *((d, LARGE) for d in SPARSE[::3])],
    ids=repr,
)
def test_masked_atoms_have_no_probability_and_no_gradient(divergence, atoms):
    theta, log_q = draw(2, atoms, seed=32), draw(2, atoms, seed=33).log_softmax(-1)
    in_theta, in_reference = theta.clone(), log_q.clone()
    in_theta[:, 1], in_reference[:, 3] = -math.inf, -math.inf
    in_theta[:, 3] = 50.0  # the best score of all, where the reference has no mass
    in_theta.requires_grad_(), in_reference.requires_grad_()
    x = f_softargmax(in_theta, divergence, in_reference)
    left = [j for j in range(atoms) if j not in (1, 3)]
    assert_close(x[:, left], f_softargmax(theta[:, left], divergence, log_q[:, left]), 1e-12)
    for grad in torch.autograd.grad(x.square().sum(), (in_theta, in_reference)):
        assert grad.isfinite().all()
        assert (grad[:, [1, 3]] == 0).all()
    assert (x[:, [1, 3]] == 0).all()


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), JS(0.5)], ids=repr)
def test_a_row_without_an_atom_is_refused(divergence):
    theta = torch.zeros(3, 4)
    theta[1] = -math.inf
    with pytest.raises(ValueError, match="row 1 has no atom"):
        f_softargmax(theta, divergence)
    with pytest.raises(ValueError, match="row 0 has no atom"):
        f_softargmax(torch.zeros(4), divergence, torch.full((4,), -math.inf))
    with pytest.raises(ValueError, match="has no atom"):
        f_softargmax(torch.zeros(3, 0), divergence)


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), JS(0.5)], ids=repr)
def test_a_broken_row_comes_out_nan_and_leaves_the_others_alone(divergence):
    theta = draw(3, NARROW, seed=34)
    broken = theta.clone()
    broken[0, 2], broken[1, 3] = math.nan, math.inf
    x = f_softargmax(broken, divergence)
    assert x[:2].isnan().all()
    assert_close(x[2], f_softargmax(theta, divergence)[2])


@each_kind
def test_float32_is_float64_to_its_precision(divergence):
    theta, log_q = draw(2, LARGE, seed=35).float(), draw(2, LARGE, seed=36).log_softmax(-1).float()
    x, expected = (f_softargmax(t, divergence, log_q) for t in (theta, theta.double()))
    assert x.dtype == torch.float32 and expected.dtype == torch.float64
    assert (x.double() - expected).abs().sum(-1).max() < (1e-4 if isinstance(divergence, Generator) else 5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), JS(0.5), 2.0 * KL()], ids=repr)
def test_half_precision_is_computed_and_returned_in_float32(divergence, dtype):
    theta = draw(3, NARROW, seed=37).to(dtype).requires_grad_()
    x = f_softargmax(theta, divergence)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, f_softargmax(theta.float(), divergence), rtol=0.0, atol=0.0)
    (grad,) = torch.autograd.grad(x.square().sum(), theta)
    assert grad.dtype == dtype and grad.abs().sum() > 0
    with pytest.raises(TypeError, match="floating-point"):
        f_softargmax(torch.ones(3, dtype=torch.long), divergence)


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), ReverseKL()], ids=repr)
def test_any_dimension_can_hold_the_atoms(divergence):
    theta, reference = draw(2, NARROW, 3, seed=38), draw(NARROW, 1, seed=39)
    x = f_softargmax(theta, divergence, reference, dim=1)
    expected = f_softargmax(theta.movedim(1, -1), divergence, reference.squeeze(-1)).movedim(-1, 1)
    assert_close(x, expected)
    assert_close(f_softargmax(theta, divergence, reference, dim=-2), expected)
    assert_close(f_softargmax(theta[0, :, 0], divergence), f_softargmax(theta, divergence, dim=1)[0, :, 0])
    (theta.requires_grad_(), reference.requires_grad_())
    grads = torch.autograd.grad(
        f_softargmax(theta, divergence, reference, dim=1)[:, 0].sum(), (theta, reference)
    )
    assert [g.shape for g in grads] == [theta.shape, reference.shape]


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), ReverseKL()], ids=repr)
def test_an_empty_batch_stays_empty(divergence):
    assert f_softargmax(torch.zeros(0, 5), divergence).shape == (0, 5)
    assert f_softargmax(torch.zeros(4, 0, 5), divergence, torch.zeros(5)).shape == (4, 0, 5)


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", KINKED, ids=repr)
def test_a_kink_is_refused(divergence):
    with pytest.raises(TypeError, match=r"jumps or is flat.*JS\(0.5\)"):
        f_softargmax(torch.zeros(3), divergence)


def flat_at_one(log_ratio: Tensor) -> Tensor:
    """(u - 1)_+^3: nothing distinguishes distributions below the reference."""
    return log_ratio.exp().sub(1).clamp(min=0.0) ** 3


@pytest.mark.parametrize("divergence", [Generator(flat_at_one), 0.5 * TV()], ids=repr)
def test_what_has_no_single_maximiser_is_refused(divergence):
    with pytest.raises(TypeError, match="jumps or is flat"):
        f_softargmax(torch.zeros(3), divergence)


@pytest.mark.parametrize("other", [Renyi(2.0), "KL", KL], ids=repr)
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="f_softargmax takes an f-divergence"):
        f_softargmax(torch.zeros(3), other)


def test_a_reference_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"broadcasts to theta \(2, 3\), got \(2,\)"):
        f_softargmax(torch.zeros(2, 3), KL(), torch.zeros(2))


# -- against plain bisection, written from f' alone --------------------------------------------------------


def halved(low: Tensor, high: Tensor, above) -> Tensor:
    """Where `above` turns true, elementwise."""
    for _ in range(90):
        middle = (low + high) / 2
        over = above(middle)
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (low + high) / 2


def bisected(row, theta: Tensor, log_q: Tensor) -> Tensor:
    """x, from tau between max theta - f'(1/sum q) and max(theta - f'(1/q)); f' is the row's closed form."""

    def x_at(tau: Tensor) -> Tensor:
        slope = theta - tau
        far = torch.full_like(slope, 40.0)
        log_ratio = halved(-far, far, lambda log_ratio: row.phi(log_ratio.exp()) > slope)
        return torch.where(slope > row.ends[2], (log_ratio + log_q).exp(), 0.0)

    high = theta.amax(-1, keepdim=True) - row.phi(1 / log_q.exp().sum(-1, keepdim=True))
    low = (theta - row.phi((-log_q).exp())).amax(-1, keepdim=True)
    assert (x_at(low).sum(-1) >= 1 - 1e-9).all() and (x_at(high).sum(-1) <= 1 + 1e-9).all()
    return x_at(halved(low, high, lambda tau: x_at(tau).sum(-1, keepdim=True) < 1))


@pytest.mark.parametrize("row", thinned((row for row in ROWS if row.divergence.is_smooth), 4), ids=str)
def test_plain_bisection_of_the_closed_form_agrees(row):
    theta, log_q = draw(3, NARROW, seed=40), draw(3, NARROW, seed=41)  # of any mass
    tolerance = 1e-9 if row.exact else 1e-7
    assert_close(f_softargmax(theta, row.divergence, log_q), bisected(row, theta, log_q), tolerance)
    assert_close(
        f_softargmax(theta, row.divergence), bisected(row, theta, torch.zeros_like(theta)), tolerance
    )


@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0])
def test_the_entmax_package_agrees_on_outputs_and_gradients(alpha):
    entmax = pytest.importorskip("entmax")
    theta, weight = draw(6, 11, seed=42).requires_grad_(), draw(6, 11, seed=43)
    ours, theirs = f_softargmax(theta, Alpha(alpha)), entmax.entmax_bisect(theta, alpha, n_iter=70)
    assert_close(ours, theirs.detach(), 1e-9)
    (found,) = torch.autograd.grad((weight * ours).sum(), theta)
    (expected,) = torch.autograd.grad((weight * theirs).sum(), theta)
    assert_close(found, expected, 1e-9)


def test_two_atoms_are_a_sigmoid_cut_off_by_pearson():
    s = torch.linspace(-3, 3, 13, dtype=torch.float64)
    half = torch.full((2,), -math.log(2), dtype=torch.float64)
    x = f_softargmax(torch.stack([torch.zeros_like(s), s], -1), Alpha(2.0), half)
    assert_close(x[:, 1], (0.5 + s / 4).clamp(0, 1))


# -- forward mode -------------------------------------------------------------------------------------------


@fewer(each_kind)
@pytest.mark.parametrize("atoms", [NARROW, LARGE])
def test_forward_is_the_transpose_of_backward(divergence, atoms):
    theta, log_q = draw(2, atoms, seed=44), draw(2, atoms, seed=45).log_softmax(-1)
    moves, weight = (draw(2, atoms, seed=46), draw(2, atoms, seed=47)), draw(2, atoms, seed=48)

    def function(theta: Tensor, log_q: Tensor) -> Tensor:
        return f_softargmax(theta, divergence, log_q)

    _, moved = torch.func.jvp(function, (theta, log_q), moves)
    pulled = torch.func.vjp(function, theta, log_q)[1](weight)
    expected = sum((p * m).sum() for p, m in zip(pulled, moves, strict=True))
    assert_close((weight * moved).sum(), expected, 1e-9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(theta, moves[0])
        alone = torch.autograd.forward_ad.unpack_dual(function(dual, log_q)).tangent
    assert_close(alone, torch.func.jvp(lambda t: function(t, log_q), (theta,), moves[:1])[1])


@pytest.mark.parametrize("divergence", [Alpha(1.5), JS(0.3), ReverseKL()], ids=repr)
def test_jacobians_by_rows_and_columns_and_hessians_agree(divergence):
    theta, log_q = draw(4, seed=49), draw(4, seed=50).log_softmax(-1)

    def function(theta: Tensor) -> Tensor:
        return f_softargmax(theta, divergence, log_q)

    assert_close(torch.func.jacrev(function)(theta), torch.func.jacfwd(function)(theta))
    assert_close(torch.func.jacrev(function)(theta), jacobian(function, theta))

    def square(theta: Tensor) -> Tensor:
        return function(theta).square().sum()

    forward_over_reverse = torch.func.hessian(square)(theta)
    reverse_over_reverse = torch.func.jacrev(torch.func.jacrev(square))(theta)
    slopes = finite_differences(torch.func.grad(lambda t: function(t).square().sum()), theta, 1e-5)
    assert_close(forward_over_reverse, reverse_over_reverse, 1e-12)
    assert_close(forward_over_reverse, slopes, 1e-8)


def test_torch_finds_the_forward_derivatives_right():
    theta, log_q = draw(1, 3, seed=51).requires_grad_(), draw(1, 3, seed=52).requires_grad_()

    def function(theta: Tensor, log_q: Tensor) -> Tensor:
        return f_softargmax(theta, Alpha(0.5), log_q)

    assert torch.autograd.gradcheck(function, (theta, log_q), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (theta, log_q), check_fwd_over_rev=True)


# -- where it stands in a program ---------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), JS(0.5)], ids=repr)
def test_autocast_changes_nothing(divergence):
    theta = draw(3, LARGE, seed=53).float().requires_grad_()
    expected = f_softargmax(theta, divergence)
    (slope,) = torch.autograd.grad(expected.square().sum(), theta)
    with torch.autocast("cpu", torch.bfloat16):
        x = f_softargmax(theta, divergence)
        (found,) = torch.autograd.grad(x.square().sum(), theta)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(found, slope, rtol=0.0, atol=0.0)


def test_scores_of_any_order_and_length_have_their_candidates_found():
    """Sorted ones have all of their support in one group; 1500 atoms leave 28 over; wide ones many groups."""
    theta = draw(4, LARGE, seed=54)
    theta[0], theta[1] = theta[0].sort(descending=True).values, theta[1].sort().values
    theta[2, -5:] += 3.0
    assert_close(f_softargmax(theta, Alpha(1.5)), by_sorting(theta, 1.5))
    assert_close(f_softargmax(0.02 * theta, Alpha(1.5)), by_sorting(0.02 * theta, 1.5))


@pytest.mark.parametrize("divergence", OPTIMA, ids=repr)
def test_a_proximal_policy_is_one_call(divergence):
    """argmax of E[reward] - beta D(reference, policy), against roots of psi found on grids."""
    policy = f_softargmax(REWARDS / BETA, divergence.reverse, REFERENCE.log())
    assert_close(policy, optimum(divergence), 1e-9)


@pytest.mark.parametrize("divergence", [Alpha(1.5), Alpha(2.0), Alpha(3.0), Pearson(), JS(0.3)], ids=repr)
def test_references_of_very_unlike_masses_keep_their_digits(divergence):
    """The best score stands where there is least mass, and sparse rows among many that are not."""
    theta, log_q = draw(40, NARROW, seed=55), 6 * draw(40, NARROW, seed=56).log_softmax(-1)
    theta = theta * torch.tensor([1.0, 10.0, 100.0, 0.1], dtype=torch.float64).repeat(10).unsqueeze(-1)
    x = f_softargmax(theta, divergence, log_q)
    assert_optimal(divergence, theta, log_q, x)
    alone = [f_softargmax(t[None], divergence, q[None]) for t, q in zip(theta, log_q, strict=True)]
    assert_close(x, torch.cat(alone), 1e-11)
