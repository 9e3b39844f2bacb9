"""The weights of the largest mean within a ball of an f-divergence: see fdiv.operators.dro."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.divergences.alpha import Alpha
from fdiv.divergences.kl import KL
from fdiv.divergences.tv import TV
from fdiv.operators._root import rising_root
from fdiv.operators.worst_case import _log, worst_case

DECADES = {torch.float32: 20, torch.float64: 60}  # of lam at most, below and above the range of losses
JUMP = 1e-4  # how far D may miss rho, relative to it, where it does not jump


def farthest(losses: Tensor, log_p: Tensor, divergence: FDivergence, rho: float) -> tuple[Tensor, Tensor]:
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
    kept = largest(losses, p, max(0.0, 1 - rho))
    rest = 1 - kept.sum(-1, keepdim=True)
    level = losses.masked_fill(kept == 0, math.inf).amin(-1)
    lam = torch.where(level < math.inf, losses.amax(-1) - level, 0.0)
    return kept + rest * top / top.sum(-1, keepdim=True), lam


def largest(losses: Tensor, p: Tensor, share: float) -> Tensor:
    """How much of each atom's mass belongs to the `share` of all mass with the largest losses."""
    order = losses.sort(dim=-1, descending=True, stable=True).indices
    sorted_p = p.gather(-1, order)
    before = sorted_p.cumsum(-1) - sorted_p
    kept = torch.minimum((share - before).clamp(min=0.0), sorted_p)
    return torch.zeros_like(p).scatter(-1, order, kept)
