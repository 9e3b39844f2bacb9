"""The clipped policy gradient that the GRPO family shares, and the means that it is taken over.

    gain of a token = min( c A, clip(c, 1 - low, 1 + high) A ),   c = policy / behaviour

Schulman, Wolski, Dhariwal, Radford and Klimov, "Proximal Policy Optimization Algorithms", arXiv 1707.06347:
clip=0.2, alike on both sides. DAPO, arXiv 2503.14476: clip=(0.2, 0.28), so that rare tokens can rise.
GSPO, arXiv 2507.18071: c is the geometric mean of a sequence's ratios, one number for all of its tokens.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fdiv.estimate import _far
from fdiv.methods._method import blank, mean_over_tokens

Clip = float | tuple[float, float] | None
Aggregate = Literal["tokens", "sequences"] | int


class Gain(NamedTuple):
    """Of each token, [B, T]: what is maximised, its ratio, and 1 where the clip took its gradient."""

    gain: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_gain(log_ratio: Tensor, advantage: Tensor, clip: Clip) -> Gain:
    """log policy/behaviour [B, T], advantage [B, 1] or [B, T]; clip=None leaves the ratio as it is."""
    # Neither the ratio nor its product with a large pseudo-reward may overflow: behind a clip, 0 times inf
    # has the gradient nan. Both go on as lines.
    ratio, free = log_ratio.exp(), _far.weighted(log_ratio, advantage)
    if clip is None:
        return Gain(free, ratio.detach(), torch.zeros_like(ratio))
    low, high = bounds(clip)
    held = ratio.clamp(1 - low, 1 + high) * advantage
    return Gain(torch.minimum(free, held), ratio.detach(), (held < free).to(ratio.dtype))


def log_importance(
    log_policy: Tensor, log_behaviour: Tensor, mask: Tensor, per: Literal["token", "sequence"] = "token"
) -> Tensor:
    """log policy/behaviour of each token, or its mean over each sequence; [B, T], 0 where masked."""
    log_ratio = _far.log_weight(blank(log_policy, mask), blank(log_behaviour.detach(), mask))
    if per == "sequence":
        log_ratio = (log_ratio.sum(-1) / mask.sum(-1).clamp(min=1)).unsqueeze(-1).expand_as(mask)
    return log_ratio


def bounds(clip: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high): how far the ratio may leave 1 to either side."""
    return clip if isinstance(clip, tuple) else (clip, clip)


def check_clip(clip: Clip) -> None:
    """Raise unless `clip` is a number, a pair (low, high) or None."""
    if clip is None:
        return
    sides = clip if isinstance(clip, tuple) else (clip, clip)
    if len(sides) != 2 or not all(isinstance(side, int | float) for side in sides):
        raise TypeError(f"clip is a number, a pair (low, high) or None for no clipping, got {clip!r}")
    low, high = sides
    if not (0 < low < 1 and 0 < high < (math.inf if isinstance(clip, tuple) else 1)):
        raise ValueError(
            f"clip is between 0 and 1, and in a pair (low, high) only high may be larger; got {clip!r}. "
            "Write clip=None for no clipping"
        )


def aggregated(
    rows: Tensor,
    mask: Tensor,
    over: Aggregate,
    count: Tensor | float | None = None,
    sequences: Tensor | float | None = None,
) -> Tensor:
    """The mean of rows [B, T] that a loss takes; `count` and `sequences` are those of the *global* batch.

    "tokens": over all tokens (DAPO). "sequences": over sequences, of each one's mean over its tokens (GRPO's
    paper; an empty one counts as 0). A number L: over sequences, of each one's sum over L (Dr. GRPO, arXiv
    2503.20783).
    """
    if over == "tokens":
        return mean_over_tokens(rows, mask, count)
    length = mask.sum(-1, keepdim=True).clamp(min=1) if over == "sequences" else over
    return mean_over_tokens(rows / length, mask, len(mask) if sequences is None else sequences)


def check_aggregate(over: object) -> None:
    if over in ("tokens", "sequences") or (type(over) is int and over > 0):
        return
    raise ValueError(
        f"aggregate is 'tokens', 'sequences', or the number of tokens that each sequence's sum is divided by "
        f"(Dr. GRPO's longest answer), got {over!r}"
    )
