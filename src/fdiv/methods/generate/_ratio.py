"""The density ratio r = p/q of noised samples: what a divergence does with it, and how far it is trusted."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.methods.generate._one_step import require_finite, require_size

REACH, CELLS = 8.0, 4000  # log-ratios in which a kink is looked for


@lru_cache(maxsize=4096)
def needs_ratio(divergence: FDivergence) -> bool:
    """Whether r^2 f''(r) varies: only of -log r, the reverse KL, it does not."""
    curvature = divergence.curvature(torch.linspace(-4, 4, 9, dtype=torch.float64))
    return bool((curvature - curvature[0]).abs().max() > 1e-9 * curvature[0].abs())


def require_curvature(divergence: object, who: str) -> None:
    """Raise unless it is an f-divergence whose f' has no jump, so that its curvature tells all of it."""
    require_f_divergence(divergence, who)
    assert isinstance(divergence, FDivergence)
    # An uneven number of cells: r = 1, the likeliest kink, is inside of one.
    log_ratio = torch.linspace(-REACH, REACH, CELLS, dtype=torch.float64)
    curvature, psi = divergence.curvature(log_ratio), divergence.psi(log_ratio)
    width = log_ratio[1] - log_ratio[0]
    smooth = width * (curvature[1:] + curvature[:-1]) / 2
    jump = (psi[:-1] - psi[1:] - smooth).abs() > 0.02 * smooth + 1e-12 * psi[1:].abs() + 1e-14
    if not divergence.is_smooth or bool(jump.any()):
        at = math.exp(log_ratio[:-1][jump].abs().min().item()) if bool(jump.any()) else 1.0
        raise ValueError(
            f"{divergence!r} has a kink (near a ratio of {at:.3g}) where its slope jumps: r^2 f''(r), by "
            f"which {who} weighs samples, misses the jump, so that another divergence would be trained; "
            "write JS(0.5), which is smooth and bounded"
        )
    if not bool((curvature > 0).any()):
        raise ValueError(f"{divergence!r} has no curvature, so that {who} would train nothing")


def require_ratio(name: str, ratio: tuple[float, float], bins: int, bin_rate: float) -> None:
    if not (len(ratio) == 2 and 0 < ratio[0] < 1 < ratio[1] < math.inf):
        raise ValueError(
            f"{name}(ratio) are the bounds of p/q, 0 < lower < 1 < upper < inf, got {ratio!r}; write "
            "(1e-6, 1e6) for hardly any"
        )
    if not (isinstance(bins, int) and not isinstance(bins, bool) and bins >= 0):
        raise ValueError(f"{name}(bins) is a whole number, 0 for none, got {bins!r}")
    require_size(name, least=0.0, bin_rate=bin_rate)
    if bin_rate >= 1 or (bin_rate and not bins):
        raise ValueError(f"{name}(bin_rate) is in [0, 1), and 0 without bins, got {bin_rate!r}")


def density_ratio(
    log_ratio: Tensor,
    rank: Tensor,
    bounds: tuple[float, float],
    bins: int,
    bin_rate: float,
    state: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """(log r [B] within the bounds and then of mean 1 in each bin of the noise's quantiles, metrics).

    E_q[r] is 1 at every level, whatever the laws; what a discriminator says is not, and drifts. The mean of a
    bin is bin_rate times its last one, in `state`, plus the batch's. Gradients pass where nothing is clipped,
    and not through the means. metrics: see `calibration`, and clipped, the share that the bounds held back.
    """
    require_finite(log_ratio.detach(), "log-ratios")
    low, high = (math.log(bound) for bound in bounds)
    clipped = ((log_ratio < low) | (log_ratio > high)).to(log_ratio.dtype).mean()
    metrics = {"clipped": clipped} | calibration(log_ratio.detach(), rank, bins)
    within = log_ratio.clamp(low, high)
    if not bins:
        return within, metrics
    place, means = _places(rank, bins), within.detach().new_ones(bins)
    for k in range(bins):
        mine, last = within.detach()[place == k], state.get(f"bin_{k}", 1.0)
        if len(mine):
            means[k] = bin_rate * last + (1 - bin_rate) * mine.exp().mean()
        else:
            means[k] = last
        if bin_rate:
            metrics[f"bin_{k}"] = means[k]
    return within - means[place].log(), metrics


def calibration(log_ratio: Tensor, rank: Tensor, bins: int) -> dict[str, Tensor]:
    """log of E_q[r], which is 0 of exact ratios: over all levels, and in the bin where it is furthest off."""
    place = _places(rank, bins) if bins else torch.zeros_like(rank, dtype=torch.long)
    each = [log_ratio[place == k] for k in range(max(1, bins))]
    off = [part.logsumexp(0) - math.log(len(part)) for part in each if len(part)]
    whole = log_ratio.logsumexp(0) - math.log(max(1, len(log_ratio)))
    return {"log_mean_ratio": whole, "worst_log_mean_ratio": max(off, key=abs, default=whole)}


def _places(rank: Tensor, bins: int) -> Tensor:
    return (rank * bins).long().clamp(max=bins - 1)
