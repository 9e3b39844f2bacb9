"""The largest mean of losses near a reference: distributionally robust expectations."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.alpha import Alpha
from fdiv.divergences.chi_square import Pearson
from fdiv.divergences.kl import KL
from fdiv.divergences.tv import TV
from fdiv.operators._root import rising_root
from fdiv.operators.worst_case import _log, weighted, worst_case

DECADES = {torch.float32: 20, torch.float64: 60}  # of lam at most, below and above the range of losses
JUMP = 1e-4  # how far D may miss rho, relative to it, where it does not jump


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
    weights, lam = _farthest(held, log_p, divergence, rho / scale)
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
    kept = _largest(losses.detach(), log_p.exp(), share)
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


# -- the constraint ------------------------------------------------------------------------------------


def _farthest(losses: Tensor, log_p: Tensor, divergence: FDivergence, rho: float) -> tuple[Tensor, Tensor]:
    """(weights [..., atoms], lam [...]) of the largest mean at D <= rho; no derivatives."""
    if rho == 0:
        return log_p.exp(), torch.full_like(losses[..., 0], math.inf)
    if divergence == TV():
        return _total_variation(losses, log_p.exp(), rho)
    weights, reachable = _at_the_top(losses, log_p, divergence, rho)
    weights, lam = weights.clone(), torch.zeros_like(losses[..., 0])
    if not bool(reachable.all()):
        weights[~reachable], lam[~reachable] = _on_the_boundary(
            losses[~reachable], log_p[~reachable], divergence, rho
        )
    return weights, lam


def _at_the_top(losses: Tensor, log_p: Tensor, divergence: FDivergence, rho: float):
    """(all mass on the largest losses, whether rho allows that [...])."""
    top = losses == losses.amax(-1, keepdim=True)
    inside = log_p.masked_fill(~top, -math.inf)
    first = torch.zeros_like(log_p).scatter(-1, top.to(torch.int8).argmax(-1, keepdim=True), 1.0)
    without = (inside == -math.inf).all(-1, keepdim=True)  # p has no mass there
    weights = torch.where(without, first, inside.masked_fill(without, 0.0).softmax(-1))
    return weights, divergence(weights.log(), log_p) <= rho


def _on_the_boundary(losses: Tensor, log_p: Tensor, divergence: FDivergence, rho: float):
    """(weights, lam) with D(weights, p) = rho, of [rows, atoms], by a search in the log of a scale."""
    top = losses.amax(-1, keepdim=True)
    gap = losses - top
    width = -gap.masked_fill(gap == -math.inf, 0.0).amin(-1, keepdim=True)
    width = torch.where(width > 0, width, 1.0)
    gap = gap / width

    def weights(t: Tensor) -> Tensor:
        return _path(gap, log_p, divergence, t)[0]

    def distance(w: Tensor) -> Tensor:
        return divergence(_log(w, log_p, divergence), log_p).unsqueeze(-1)

    def room(t: Tensor) -> Tensor:
        """Rising in t; below 0 where the weights are farther than rho."""
        return math.log(rho) - distance(weights(t)).log()

    root = rising_root(room, *_bracket(room, top), 4 * torch.finfo(top.dtype).eps)
    found, lam = _path(gap, log_p, divergence, root)
    return _without_jump(found, weights, distance, root, rho), (lam * width).squeeze(-1)


def _bracket(function: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Ends below and above the root, from +-2 outward; at most as far as the dtype tells anything apart."""
    end = math.log(10) * DECADES[like.dtype]
    low, high = torch.full_like(like, -2.0), torch.full_like(like, 2.0)
    while True:
        beyond, short = function(low) > 0, function(high) < 0
        if not bool((beyond & (low > -end) | short & (high < end)).any()):
            return low, high
        low = torch.where(beyond, (4 * low).clamp(min=-end), low)
        high = torch.where(short, (4 * high).clamp(max=end), high)


def _path(gap: Tensor, log_p: Tensor, divergence: FDivergence, t: Tensor) -> tuple[Tensor, Tensor]:
    """(weights of `penalised`, their lam): at lam = e^t, or for Alpha(k > 1) at max losses - eta = e^t."""
    if isinstance(divergence, Alpha) and divergence.alpha > 1:
        power = divergence.alpha - 1
        x = log_p.exp() * (1 + gap / t.exp()).clamp(min=0.0).pow(1 / power)
        total = x.sum(-1, keepdim=True)
        return x / total, power * t.exp() * total**power
    if divergence == KL():
        return (log_p + gap / t.exp()).softmax(-1), t.exp()
    return worst_case(-gap / t.exp(), log_p, divergence, 1.0).distribution, t.exp()


def _without_jump(
    found: Tensor,
    weights: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor], Tensor],
    root: Tensor,
    rho: float,
) -> Tensor:
    """`found`, or a mixture of the weights on both sides of the root, where D jumps over rho.

    It does where f has straight pieces: one lam has many maximisers, mixtures of two of them among these. And
    to the precision of `gap` where f is steep, as that of Alpha(50).
    """
    jumps = (distance(found) - rho).abs() > JUMP * rho
    if not bool(jumps.any()):
        return found
    step = torch.finfo(root.dtype).eps ** 0.5 * (1 + root.abs())
    near, far = weights(root + step), weights(root - step)
    share = rising_root(
        lambda part: distance((1 - part) * near + part * far) / rho - 1,
        torch.zeros_like(root),
        torch.ones_like(root),
        torch.finfo(root.dtype).eps ** 0.75,
    )
    return torch.where(jumps, (1 - share) * near + share * far, found)


def _total_variation(losses: Tensor, p: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    top = losses == losses.amax(-1, keepdim=True)
    kept = _largest(losses, p, max(0.0, 1 - rho))
    rest = 1 - kept.sum(-1, keepdim=True)
    level = losses.masked_fill(kept == 0, math.inf).amin(-1)
    lam = torch.where(level < math.inf, losses.amax(-1) - level, 0.0)
    return kept + rest * top / top.sum(-1, keepdim=True), lam


def _largest(losses: Tensor, p: Tensor, share: float) -> Tensor:
    """How much of each atom's mass belongs to the `share` of all mass with the largest losses."""
    order = losses.sort(dim=-1, descending=True, stable=True).indices
    sorted_p = p.gather(-1, order)
    before = sorted_p.cumsum(-1) - sorted_p
    kept = torch.minimum((share - before).clamp(min=0.0), sorted_p)
    return torch.zeros_like(p).scatter(-1, order, kept)
