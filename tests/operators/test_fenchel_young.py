"""fenchel_young: cross-entropy and the entmax losses, its gradient, its zero, its memory, its refusals."""

import math

import pytest
import torch
from tests.estimate.test_fused_linear import PeakMemory
from tests.thinned import thinned
from torch import Tensor
from torch.nn.functional import cross_entropy

from fdiv import JS, KL, Alpha, ChiKL, Neyman, Pearson, ReverseKL, SquaredHellinger, f_softargmax
from fdiv.operators import fenchel_young as module
from fdiv.operators.fenchel_young import fenchel_young, has_constant
from fdiv.operators.softmax import f_softmax

torch.set_num_threads(1)

DIVERGENCES = [
    KL(),
    2.0 * KL(),
    Alpha(1.5),
    0.5 * Alpha(2.0),
    Pearson(),
    JS(0.3),
    SquaredHellinger(),
    ReverseKL(),
]
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
ALPHAS = [1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0]


def draw(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=source, dtype=torch.float64)


def assert_close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


THETA, LABELS = draw(6, 7, seed=1), torch.tensor([0, 3, 6, 2, 2, 5])
LOG_Q, TARGETS = draw(7, seed=2), draw(6, 7, seed=3).softmax(-1)


def losses(theta: Tensor, target: Tensor, divergence, reference: Tensor | None = None) -> Tensor:
    return fenchel_young(theta, target, divergence, reference).loss


def gradient(theta: Tensor, target: Tensor, divergence, reference: Tensor | None = None) -> Tensor:
    theta = theta.clone().requires_grad_()
    (grad,) = torch.autograd.grad(losses(theta, target, divergence, reference).sum(), theta)
    return grad


# -- what is known of it --------------------------------------------------------------------------------


def test_the_worked_number():
    theta = torch.tensor([[1.0, 0.5, -1.0]], dtype=torch.float64)
    found = fenchel_young(theta, torch.tensor([0]), Alpha(1.5))
    assert_close(found.loss, torch.tensor([0.184371379], dtype=torch.float64), 1e-9)
    assert found.support.tolist() == [2]


def test_kl_is_cross_entropy_and_with_a_reference_logit_adjustment():
    for divergence in (KL(), Alpha(1.0)):
        assert_close(losses(THETA, LABELS, divergence), cross_entropy(THETA, LABELS, reduction="none"))
        adjusted = cross_entropy(THETA + LOG_Q, LABELS, reduction="none")
        assert_close(losses(THETA, LABELS, divergence, LOG_Q), adjusted)
    entropy = (TARGETS * TARGETS.log()).sum(-1)
    assert_close(losses(THETA, TARGETS, KL()), cross_entropy(THETA, TARGETS, reduction="none") + entropy)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_entmax_package_agrees(alpha):
    entmax = pytest.importorskip("entmax")
    theta = THETA.clone().requires_grad_()
    theirs = entmax.entmax_bisect_loss(theta, LABELS, alpha, 70)
    assert_close(losses(THETA, LABELS, Alpha(alpha)), theirs.detach(), 1e-9)
    assert_close(gradient(THETA, LABELS, Alpha(alpha)), torch.autograd.grad(theirs.sum(), theta)[0], 1e-9)
    if alpha in (1.5, 2.0):
        exact = entmax.entmax15_loss if alpha == 1.5 else entmax.sparsemax_loss
        assert_close(losses(THETA, LABELS, Alpha(alpha)), exact(THETA, LABELS), 1e-13)


@each_divergence
@pytest.mark.parametrize("reference", [None, LOG_Q], ids=["ones", "any"])
@pytest.mark.parametrize("target", [LABELS, TARGETS], ids=["labels", "distributions"])
def test_it_is_its_definition_and_its_gradient_the_residual(divergence, reference, target):
    y = torch.nn.functional.one_hot(target, 7).double() if target.ndim == 1 else target
    log_q = torch.zeros(7, dtype=torch.float64) if reference is None else reference
    constant = divergence(y.log(), log_q) if has_constant(divergence) else 0.0
    expected = f_softmax(THETA, divergence, reference) + constant - (y * THETA).sum(-1)
    assert_close(losses(THETA, target, divergence, reference), expected, 1e-11)
    residual = f_softargmax(THETA, divergence, reference) - y
    assert_close(gradient(THETA, target, divergence, reference), residual)


def test_the_constant_is_left_out_where_no_label_has_a_finite_one():
    assert all(has_constant(d) for d in (KL(), Alpha(0.5), Alpha(3.0), JS(0.5), ChiKL(0.5), Pearson()))
    assert not any(has_constant(d) for d in (ReverseKL(), Alpha(-0.5), Neyman(), KL().reverse))


@each_divergence
def test_it_is_zero_at_the_maximiser_and_nowhere_below(divergence):
    if not has_constant(divergence):
        pytest.skip("known up to a constant")
    x = f_softargmax(THETA, divergence, LOG_Q)
    assert_close(losses(THETA, x, divergence, LOG_Q), torch.zeros(6, dtype=torch.float64), 1e-11)
    assert (losses(draw(300, 7, seed=4), draw(300, 7, seed=5).softmax(-1), divergence) >= 0).all()
    # D(x, q) = <x, theta> - softmax_f
    assert_close(divergence(x.log(), LOG_Q), (x * THETA).sum(-1) - f_softmax(THETA, divergence, LOG_Q), 1e-11)


@pytest.mark.parametrize(
    ("divergence", "log_q", "margin"),
    [
        *((Alpha(a), 0.0, 1 / (a - 1)) for a in (1.25, 1.5, 2.0, 3.0)),
        (Alpha(2.0), math.log(0.3), 10 / 3),
        (Alpha(1.5), math.log(0.3), 2 / math.sqrt(0.3)),
    ],
    ids=repr,
)
def test_the_loss_vanishes_from_the_margin_on(divergence, log_q, margin):
    """theta_y - max of the others >= f'(1/q_y) - f'(0): 3.6515 for Alpha(1.5) at q_y = 0.3."""
    theta = torch.zeros(2, 4, dtype=torch.float64)
    theta[:, 1] = torch.tensor([margin + 1e-9, margin - 0.1], dtype=torch.float64)
    found = fenchel_young(
        theta, torch.tensor([1, 1]), divergence, torch.full((4,), log_q, dtype=torch.float64)
    )
    assert abs(found.loss[0]) < 1e-14 and found.loss[1] > 1e-8
    assert found.support.tolist() == [1, 4]
    assert (
        abs(divergence.phi(torch.tensor(-log_q, dtype=torch.float64)) - divergence.slope_at_zero - margin)
        < 1e-9
    )


# -- derivatives again, and forward -----------------------------------------------------------------------


@pytest.mark.parametrize("divergence", thinned([Alpha(1.5), KL(), JS(0.3)]), ids=repr)
@pytest.mark.parametrize("target", [LABELS[:1], TARGETS[:1]], ids=["labels", "distributions"])
def test_torch_finds_all_derivatives_right(divergence, target):
    theta = THETA[:1].clone().requires_grad_()

    def function(theta: Tensor) -> Tensor:
        return losses(theta, target, divergence, LOG_Q)

    assert torch.autograd.gradcheck(function, (theta,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (theta,), check_fwd_over_rev=True)


# -- size and precision -------------------------------------------------------------------------------------


@each_divergence
def test_rows_are_worked_on_in_parts(divergence, monkeypatch):
    whole = (losses(THETA, LABELS, divergence, LOG_Q), gradient(THETA, LABELS, divergence, LOG_Q))
    by_row = losses(THETA, LABELS, divergence, LOG_Q.expand(6, -1))
    monkeypatch.setattr(module, "CELLS", 15)  # two rows and a bit
    assert_close(losses(THETA, LABELS, divergence, LOG_Q), whole[0])
    assert_close(losses(THETA, LABELS, divergence, LOG_Q.expand(6, -1)), by_row)
    assert_close(gradient(THETA, LABELS, divergence, LOG_Q), whole[1])


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), JS(0.5)], ids=repr)
def test_a_vocabulary_needs_the_gradient_and_a_part(divergence):
    rows, vocab, part = 96, 4096, 2
    theta = draw(rows, vocab, seed=6).float().requires_grad_()
    module_cells, module.CELLS = module.CELLS, part * vocab
    try:
        with PeakMemory(floor=part * vocab) as memory:
            losses(theta, torch.arange(rows), divergence).sum().backward()
    finally:
        module.CELLS = module_cells
    bytes_of_theta = rows * vocab * 4
    assert (
        memory.peak < 2 * bytes_of_theta + 60 * part * vocab * 4
    )  # the residual, the gradient, one part's work


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), Alpha(2.0), JS(0.5), SquaredHellinger()], ids=repr)
def test_a_vocabulary_in_float32_keeps_its_digits(divergence):
    theta = draw(4, 49_152, seed=7, scale=2.0)
    labels = theta.argsort(-1)[:, -40]
    exact, single = (losses(t, labels, divergence) for t in (theta, theta.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), JS(0.5)], ids=repr)
def test_half_precision_is_computed_in_float32(divergence):
    theta = THETA.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(theta, LABELS, divergence)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses(theta.detach().float(), LABELS, divergence), rtol=0.0, atol=0.0)
    (grad,) = torch.autograd.grad(found.sum(), theta)
    assert grad.dtype == torch.bfloat16
    exact = gradient(theta.detach().float(), LABELS, divergence)
    torch.testing.assert_close(grad.float(), exact, rtol=1e-2, atol=1e-3)


@each_divergence
def test_scores_as_large_as_1e4_and_atoms_left_out_stay_finite(divergence):
    theta, reference = 1e4 * THETA, LOG_Q.clone()
    theta[0, 4], reference[1] = -math.inf, -math.inf
    for target in (LABELS, LABELS[:0]):
        rows = theta[: len(target)].clone().requires_grad_()
        found = losses(rows, target, divergence, reference)
        assert found.isfinite().all()
        assert torch.autograd.grad(found.sum(), rows)[0].isfinite().all()


# -- refusals -----------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"got \(6, 7\) and \(5,\)"):
        losses(THETA, LABELS[:5], KL())
    with pytest.raises(ValueError, match=r"int64 numbers of atoms, got torch\.int32"):
        losses(THETA, LABELS.int(), KL())
    with pytest.raises(ValueError, match="from 0 to 6, got -100 to 6"):
        losses(THETA, torch.where(LABELS == 0, -100, LABELS), KL())
    with pytest.raises(ValueError, match="sums to one in each row"):
        losses(THETA, TARGETS / 2, KL())
    with pytest.raises(ValueError, match="constants here; detach them"):
        losses(THETA, TARGETS.clone().requires_grad_(), KL())
    for divergence in (KL(), Alpha(1.5)):
        with pytest.raises(ValueError, match="mass on an atom that is left out"):
            losses(THETA, LABELS, divergence, LOG_Q.masked_fill(torch.arange(7) == 3, -math.inf))
    with pytest.raises(TypeError, match="fenchel_young takes an f-divergence"):
        losses(THETA, LABELS, "KL")
