"""A divergence along sampled sequences: summed over tokens, or of whole sequences.

The sum over tokens of D(p, q)(.|s_i), with states s_i that q itself writes, has two parts in its gradient:

    E_q[ sum_i (psi_i + sum over j > i of D_j) grad log q(y_i|s_i) ]

psi_i acts through the token itself, and D_j, any unbiased value, through where the token leads. Whole
sequences have the one ratio p(y)/q(y): its psi stands at every token. Only for ReverseKL() are the two the
same divergence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv._math import in_working_precision, ratio_cap
from fdiv.estimate import _far
from fdiv.estimate._estimator import Estimator


class Penalty(NamedTuple):
    """What to differentiate and what to log, each [B, T]; 0 at masked tokens. `value` has no gradient."""

    surrogate: Tensor
    value: Tensor


def per_token(
    estimator: Estimator,
    divergence: Divergence,
    evidence: Sequence[Tensor],
    log_policy: Tensor,
    mask: Tensor,
    *,
    future: bool = True,
    weight: Tensor | float = 1.0,
) -> Penalty:
    """The sum over tokens of D(p, q)(.|s_i), and its exact gradient.

    evidence: what the estimator reads, [B, T] (MonteCarlo) or [B, T, vocab] (Exact). log_policy [B, T]: log q
    of the sampled tokens, with its gradient. mask [B, T]: the tokens that count; the others may be anything.
    future: False drops the values of later tokens, which is wrong: what is left is the gradient with the
    states held fixed. weight: `prefix_weight` where another policy wrote the text.
    A later value that is infinite moves nothing, as an infinite D has no gradient.
    """
    evidence = [_blank(tensor, mask) for tensor in evidence]
    own, value = (
        torch.where(mask, weight * rows, 0.0) for rows in _own_and_value(estimator, divergence, evidence)
    )
    if future:
        own = own + later(value) * _far.moving(_blank(log_policy, mask))
    return Penalty(own, value)


def per_sequence(
    estimator: Estimator, divergence: Divergence, evidence: Sequence[Tensor], mask: Tensor
) -> Penalty:
    """D(p, q) of whole sequences, from the summed log-probabilities of their tokens; evidence [B, T] each.

    Each sequence's value is spread evenly over its tokens, so that a row sums to it.
    """
    if estimator.sees != "log_probs":
        raise TypeError(
            f"{estimator!r} sees one token's vocabulary, not the ratio of whole sequences; write MonteCarlo()"
        )
    # An infinite sum is an atom without mass; nan could only come of log-probabilities of +inf.
    totals = [_blank(tensor, mask).sum(-1, keepdim=True) for tensor in evidence]
    own, value = _own_and_value(estimator, divergence, totals)
    share = mask.to(value.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)
    return Penalty(own * share, value * share)


def prefix_weight(log_policy: Tensor, log_behaviour: Tensor, mask: Tensor) -> Tensor:
    """q/behaviour of the tokens before each one, [B, T]: how much likelier its state is to q; no gradient.

    With it the sum over tokens is exact off-policy: MonteCarlo("behaviour") adds the token's own weight,
    Exact() needs no more. Its variance grows with every token; the usual approximation is to leave it out.
    """
    pair = (_blank(tensor.detach(), mask) for tensor in (log_policy, log_behaviour))
    log_q, log_behaviour = in_working_precision(*pair)
    each = _far.log_weight(log_q, log_behaviour)
    before = torch.cat([torch.zeros_like(each[..., :1]), each[..., :-1].cumsum(-1)], dim=-1)
    return _far.bent(before, ratio_cap(before.dtype)).exp()


def later(value: Tensor) -> Tensor:
    """The sum over the tokens after each one, [B, T]; infinite values are left out."""
    value = torch.where(value.isfinite(), value, 0.0)
    return value.flip(-1).cumsum(-1).flip(-1) - value


def _own_and_value(
    estimator: Estimator, divergence: Divergence, evidence: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """What to differentiate and an unbiased value: MonteCarlo's potential, for one, has none of its own."""
    surrogate = getattr(estimator, "surrogate", None)
    if surrogate is None:
        own = estimator(divergence, *evidence)
        return own, own.detach()
    with torch.no_grad():
        value = estimator(divergence, *evidence)
    return surrogate(divergence, *evidence), value


def check_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """`mask`, which is boolean and of this shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is boolean, got {mask.dtype}; write mask.bool()")
    if mask.shape != shape:
        raise ValueError(f"mask {tuple(mask.shape)} and samples {tuple(shape)} differ in shape")
    return mask


def _blank(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zeros where `mask`, of the leading dimensions, is false: a gradient of 0 times inf would be nan."""
    check_mask(mask, tensor.shape[: mask.ndim])
    return torch.where(mask.reshape(mask.shape + (1,) * (tensor.ndim - mask.ndim)), tensor, 0.0)
