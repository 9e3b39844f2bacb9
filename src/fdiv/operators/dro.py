"""The largest mean of losses near a reference: distributionally robust expectations."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.alpha import Alpha
from fdiv.divergences.chi_square import Pearson
from fdiv.operators._ball import farthest, largest
from fdiv.operators.worst_case import weighted, worst_case


class Robust(NamedTuple):
    """value [...], the largest mean; the weights [..., atoms] that reach it; a multiplier [...]."""

    value: Tensor
    weights: Tensor
    multiplier: Tensor


def penalised(
    losses: Tensor, divergence: FDivergence, lam: float = 1.0, log_p: Tensor | None = None, dim: int = -1
) -> Robust:
    """max of E_w[losses] - lam D(w, p) over the probability vectors w along `dim`.

    It is `worst_case` of the gains -losses, one solver for both: its `p` are the weights w here and its `q`
    the reference p. KL() is lam log E_p exp(losses/lam) with w = softmax(losses/lam + log p). multiplier: the
    tau of sum w = 1, with w_j = p_j (f')^{-1}((losses_j - tau)/lam).

    Shapes, what may be infinite, and derivatives: as in `worst_case`. log_p None is uniform.
    """
    losses, log_p = _prepared(losses, log_p, dim)
    found = worst_case(-losses, log_p, divergence, lam)
    return Robust(-found.value, found.distribution.movedim(-1, dim), -found.eta)


def constrained(
    losses: Tensor, divergence: FDivergence, rho: float, log_p: Tensor | None = None, dim: int = -1
) -> Robust:
    """max of E_w[losses] over the probability vectors w along `dim` with D(w, p) <= rho.

    The dual is min over lam of lam rho + the value of `penalised`: lam is searched where D(w(lam), p) = rho,
    and is the `multiplier`, the derivative of the value in rho (inf at rho = 0, 0 where the largest loss is
    reached). `Alpha(k)`, k > 1, has its weights in closed form, p (losses - eta)_+^(1/(k-1)) up to scale: the
    Cressie-Read dual min over eta of eta + (1 + k (k-1) rho)^(1/k) (E_p (losses - eta)_+^k')^(1/k'), k' =
    k/(k-1). `TV()` moves the mass rho from the smallest losses to the largest.

    Shapes: losses and log_p [..., atoms, ...]; log_p is normalised, None is uniform. Atoms where log_p is
    -inf get mass if its price f'(inf) is finite; a loss of -inf leaves them out. The value is differentiable
    once in the losses, with the weights as its derivative (Danskin), not in log_p.
    Errors: TypeError for what is no f-divergence, or flat at 1; ValueError for rho < 0, for log_p that is not
    normalised or asks for a gradient, and for losses that are not finite where p has mass.
    Source: Namkoong and Duchi, "Variance-based Regularization with Convex Objectives" (arXiv 1610.02581);
    Duchi and Namkoong, "Learning Models with Uniform Performance via Distributionally Robust Optimization"
    (arXiv 1810.08750), for the Cressie-Read family.

    >>> import torch
    >>> from fdiv import TV
    >>> constrained(torch.tensor([0.0, 1.0, 4.0, 3.0]), TV(), rho=0.25).value
    tensor(3.)
    """
    require_f_divergence(divergence, "constrained")
    if not rho >= 0:
        raise ValueError(f"rho bounds a divergence and is >= 0, got {rho!r}")
    losses, log_p = _prepared(losses, log_p, dim, constant=True)
    scale, divergence = weighted(1.0, divergence)
    if isinstance(divergence, Pearson):
        scale, divergence = 2 * scale, Alpha(2.0)
    held = losses.detach()
    if math.isinf(divergence.slope_at_infinity):
        held = held.masked_fill(log_p == -math.inf, -math.inf)
    weights, lam = farthest(held, log_p, divergence, rho / scale)
    return Robust(_Mean.apply(losses, weights), weights.movedim(-1, dim), lam / scale)


def cvar(losses: Tensor, share: float, log_p: Tensor | None = None, dim: int = -1) -> Robust:
    """The mean of the largest `share` of the losses: max of E_w[losses] with w <= p / share.

    Also min over eta of eta + E_p (losses - eta)_+ / share; `multiplier` is that eta, the quantile. Shapes,
    derivatives and errors: as in `constrained`.
    Source: Rockafellar and Uryasev, "Optimization of conditional value-at-risk" (2000).
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is a fraction of the examples, in (0, 1], got {share!r}")
    losses, log_p = _prepared(losses, log_p, dim, constant=True)
    kept = largest(losses.detach(), log_p.exp(), share)
    weights = kept / kept.sum(-1, keepdim=True)
    eta = losses.detach().masked_fill(kept == 0, math.inf).amin(-1)
    return Robust(_Mean.apply(losses, weights), weights.movedim(-1, dim), eta)


def _prepared(
    losses: Tensor, reference: Tensor | None, dim: int, constant: bool = False
) -> tuple[Tensor, Tensor]:
    """(losses, log p), of one shape and dtype with the atoms last."""
    if losses.ndim == 0 or losses.shape[dim] == 0:
        raise ValueError(f"losses are [..., atoms] with at least one atom, got {tuple(losses.shape)}")
    (losses,) = in_working_precision(losses)
    uniform = losses.new_full((), -math.log(losses.shape[dim])).expand_as(losses)
    log_p = uniform if reference is None else reference
    if constant and log_p.requires_grad:
        raise ValueError("the value has no derivative in log_p here; write log_p.detach(), or `penalised`")
    losses, log_p = torch.broadcast_tensors(*in_working_precision(losses, log_p))
    if not bool((log_p.logsumexp(dim).abs() <= 1e-3).all()):
        raise ValueError("log_p is normalised over the atoms; write log_p.log_softmax(-1)")
    if not bool((losses.isfinite() | ((log_p == -math.inf) & (losses == -math.inf))).all()):
        raise ValueError("losses are finite; -inf is allowed where log_p = -inf, and leaves that atom out")
    return losses.movedim(dim, -1), log_p.movedim(dim, -1)


class _Mean(torch.autograd.Function):
    """E_w[losses], whose derivative keeps w, the maximiser, as it is."""

    @staticmethod
    def forward(losses: Tensor, weights: Tensor) -> Tensor:
        return (weights * losses.masked_fill(weights == 0, 0.0)).sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (weights,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * weights, None
