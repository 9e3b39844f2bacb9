"""The Fenchel-Young losses of f-divergences, row by row: cross-entropy, the sparsemax and entmax losses."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, Sum, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.alpha import Alpha
from fdiv.divergences.kl import KL
from fdiv.operators.softargmax import f_softargmax, held_atoms, scores_and_reference
from fdiv.operators.softmax import above_empty, regulariser

CELLS = 2**20  # rows x atoms that are worked on at once


class Losses(NamedTuple):
    loss: Tensor  # [rows]
    support: Tensor  # [rows] int64: how many atoms have probability


def fenchel_young(
    theta: Tensor, target: Tensor, divergence: FDivergence, reference: Tensor | None = None
) -> Losses:
    """f_softmax(theta; q) + D(target, q) - <theta, target>: >= 0, and 0 where the target is f_softargmax.

    Its gradient in theta is f_softargmax(theta; q) - target, so the solver is not differentiated. Where
    f(0) = inf (`has_constant` is false: ReverseKL, Jeffreys, ...) D(target, q) is infinite for every label;
    it does not depend on theta, and is left out for all targets: the loss can then be below 0.

    Shapes: theta [rows, atoms]; target [rows] int64, the atom itself, or [rows, atoms], probabilities.
    `reference` is log q, [atoms] or [rows, atoms], None is q = 1. An atom with theta or reference -inf is
    left out. Target and reference are constants. float16 and bfloat16 are computed in float32. Some rows are
    worked on at a time; beside theta one tensor of its shape and dtype is kept, the gradient.
    Differentiable again, and forward.
    Errors: ValueError for a target with mass where an atom is left out, or that does not sum to one, and for
    a target or a reference with a gradient; and those of f_softargmax.
    Source: Roulet et al. (arXiv 2501.18537); Blondel, Martins, Niculae, "Learning with Fenchel-Young losses"
    (arXiv 1901.02324).

    >>> import torch
    >>> from fdiv import Alpha
    >>> fenchel_young(torch.tensor([[1.0, 0.5, -1.0]]), torch.tensor([0]), Alpha(1.5)).loss
    tensor([0.1844])
    """
    require_f_divergence(divergence, "fenchel_young")
    _check(theta, target, reference)
    loss, support, _ = _Losses.apply(theta, target, reference, divergence)
    return Losses(loss, support)


def has_constant(divergence: FDivergence) -> bool:
    """Whether the loss contains D(target, q), which is finite for labels where f(0) is."""
    return math.isfinite(divergence.f_at_zero)


def _check(theta: Tensor, target: Tensor, reference: Tensor | None) -> None:
    if theta.ndim != 2 or target.shape not in (theta.shape[:1], theta.shape):
        raise ValueError(
            "theta is [rows, atoms], and the target [rows] labels or [rows, atoms] probabilities; got "
            f"{tuple(theta.shape)} and {tuple(target.shape)}"
        )
    if target.ndim == 1 and target.dtype != torch.int64:
        raise ValueError(f"labels are int64 numbers of atoms, got {target.dtype}")
    if target.requires_grad or (reference is not None and reference.requires_grad):
        raise ValueError(
            "target and reference are constants here; detach them, or write f_softmax(theta, D, reference) + "
            "D(target.log(), reference) - (theta * target).sum(-1), which is differentiable in all three"
        )
    if target.ndim == 1 and len(target) and not 0 <= int(target.min()) <= int(target.max()) < theta.shape[1]:
        raise ValueError(
            f"labels are from 0 to {theta.shape[1] - 1}, got {int(target.min())} to {int(target.max())}"
        )
    if target.ndim == 2 and not bool(((target.sum(-1) - 1).abs() < 1e-2).all() and (target >= 0).all()):
        raise ValueError("a target of probabilities is >= 0 and sums to one in each row; write .softmax(-1)")


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(theta: Tensor, target: Tensor, reference: Tensor | None, divergence: FDivergence):
        """(loss, support, x - target)."""
        (example,) = in_working_precision(theta[:0])
        loss, support = example.new_empty(len(theta)), target.new_empty(len(theta), dtype=torch.int64)
        residual = torch.empty_like(theta)
        step = max(1, CELLS // max(1, theta.shape[1]))
        for first in range(0, len(theta), step):
            part = slice(first, first + step)
            scores, log_q = scores_and_reference(theta[part], _part(reference, part))
            best = scores.amax(-1, keepdim=True)  # both sides are taken from here, for their digits
            work = _of_few if math.isfinite(divergence.slope_at_zero) else _of_all
            gain, support[part] = work(scores, best, log_q, divergence, residual[part])
            loss[part] = gain + _of_target(scores, best, log_q, target[part], divergence)
            _subtract(residual[part], target[part])
        return loss, support, residual

    @staticmethod
    def setup_context(ctx, inputs, output):
        theta, target, reference, ctx.divergence = inputs
        _, support, residual = output
        ctx.mark_non_differentiable(support, residual)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(theta, target, reference, residual)
        ctx.save_for_forward(theta, target, reference, residual)

    @staticmethod
    def backward(ctx, in_loss: Tensor | None, _support, _residual):
        if in_loss is None:
            return None, None, None, None
        residual = _residual_of(ctx)
        return in_loss.unsqueeze(-1).to(residual.dtype) * residual, None, None, None

    @staticmethod
    def jvp(ctx, in_theta: Tensor, _target, _reference, _divergence):
        residual = _residual_of(ctx)
        moved = torch.where(residual == 0, 0.0, residual * in_theta)
        return moved.sum(-1, dtype=in_working_precision(residual[:0])[0].dtype), None, None


def _residual_of(ctx) -> Tensor:
    """x - target; once more, and with its own derivative, where that may be asked for."""
    theta, target, reference, residual = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return residual
    one_hot = target if target.ndim == 2 else torch.nn.functional.one_hot(target, theta.shape[1])
    return (f_softargmax(theta, ctx.divergence, reference) - one_hot).to(residual.dtype)


def _subtract(x: Tensor, target: Tensor) -> None:
    """x -= target, in place."""
    if target.ndim == 2:
        x.sub_(target)
    else:
        x.scatter_add_(-1, target.unsqueeze(-1), x.new_full((len(x), 1), -1.0))


def _part(reference: Tensor | None, part: slice) -> Tensor | None:
    return (
        reference[part] if reference is not None and reference.ndim == 2 and len(reference) > 1 else reference
    )


def _of_few(
    theta: Tensor, best: Tensor, log_q: Tensor, divergence: FDivergence, out: Tensor
) -> tuple[Tensor, Tensor]:
    """(f_softmax(theta - best; q) + f(0) sum q, the support), of the atoms held alone, where f has zeros.

    x goes to `out`.
    """
    found = held_atoms(theta, divergence, log_q)
    if found is None:
        whole = f_softargmax(theta, divergence, log_q)
        row, column = whole.nonzero(as_tuple=True)
        x = whole[row, column]
        out.copy_(whole)
    else:
        row, column, x = found
        out.zero_().index_put_((row, column), x.to(out.dtype))
    best = best.squeeze(-1)
    each = x * (theta[row, column] - best[row]) - above_empty(x.log(), log_q[row, column], divergence)
    return torch.zeros_like(best).index_add_(0, row, each), row.bincount(minlength=len(out))


def _of_all(
    theta: Tensor, best: Tensor, log_q: Tensor, divergence: FDivergence, out: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, where all atoms are held but for those left out; without f(0) sum q where that is inf."""
    x = f_softargmax(theta, divergence, log_q)
    out.copy_(x)
    support = (x > 0).sum(-1)
    temperature, plain = _plain(divergence)
    if plain == KL():  # f_softmax + sum q, at the temperature
        return temperature * (((theta - best) / temperature + log_q).logsumexp(-1) + 1), support
    gain = torch.where(x > 0, x * (theta - best), 0.0).sum(-1)
    return gain - regulariser(x, log_q, divergence), support


def _plain(divergence: FDivergence) -> tuple[float, FDivergence]:
    """(weight, the divergence without it)."""
    if divergence == Alpha(1.0):
        return 1.0, KL()
    if isinstance(divergence, Sum) and len(divergence.terms) == 1:
        weight, inner = divergence.terms[0]
        deeper, plain = _plain(inner)
        return weight * deeper, plain
    return 1.0, divergence


def _of_target(theta: Tensor, best: Tensor, log_q: Tensor, target: Tensor, divergence: FDivergence) -> Tensor:
    """D(target, q) - f(0) sum q - <theta - best, target>, [rows]; without the first two where f(0) = inf."""
    reached = _expected(theta, best, target)
    if not has_constant(divergence):
        return -reached
    if target.ndim == 2:
        return regulariser(target.to(theta.dtype), log_q, divergence) - reached
    log_q_there = log_q.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return above_empty(torch.zeros_like(log_q_there), log_q_there, divergence) - reached


def _expected(theta: Tensor, best: Tensor, target: Tensor) -> Tensor:
    """<theta - best, target>, [rows]."""
    if target.ndim == 1:
        mean = (theta.gather(-1, target.unsqueeze(-1)) - best).squeeze(-1)
    else:
        mean = torch.where(target > 0, target * (theta - best), 0.0).sum(-1)
    if bool((mean == -math.inf).any()):
        raise ValueError(
            "a target has mass on an atom that is left out: theta, or the reference, is -inf there; leave "
            "such rows out, or give the atom a little mass"
        )
    return mean
