"""Cauchy-Schwarz divergences between distributions known by samples that belong together, row by row.

With K the Gaussian Gram matrix of the inputs, all sums over the N samples of a batch:

    I_CS(x; t) = log [sum K T] + log [sum K sum T] - 2 log [sum_j (sum_i K_ij)(sum_i T_ij)]
    D_CS(p(y|x); q(y'|x)) = log [sum W YY] + log [sum W Y'Y'] - 2 log [sum W Y'Y]

`sum K T` multiplies entry by entry, and YY, Y'Y', Y'Y are Gram matrices within and between the two answers.
The first is the Cauchy-Schwarz divergence of the joint density from the product of its margins, N's having
cancelled; W weighs K so that its rows stand for p(.|x). Both ignore the scale of every kernel. Everything is
a log-sum-exp: kernels underflow a dozen bandwidths away. Memory N x N.

Sources: Yu et al., "The Conditional Cauchy-Schwarz Divergence with Applications to Time-Series Data and
Sequential Decision Making", arXiv 2301.08970, and "Cauchy-Schwarz Divergence Information Bottleneck for
Regression", arXiv 2404.17951.
"""

from typing import Literal

import torch
from torch import Tensor

from fdiv._math import in_working_precision
from fdiv.divergences.kernels import distances, require_positive

Weighting = Literal["row", "both"]


def cs_information(x: Tensor, t: Tensor, bandwidth: float = 1.0, t_bandwidth: float = 1.0) -> Tensor:
    """I_CS(x; t) >= 0, in nats: 0 for an independent or constant t. x [N, D], t [N, E] -> []."""
    x, t = _rows(x=x, t=t)
    return _information(_log_gram(x, x, bandwidth), _log_gram(t, t, t_bandwidth))


def normalised_cs_information(
    x: Tensor, t: Tensor, bandwidth: float = 1.0, t_bandwidth: float = 1.0
) -> Tensor:
    """I_CS(x; t) / sqrt(I_CS(x; x) I_CS(t; t)); 0, without gradient, where x or t is constant.

    For features t much smaller than their bandwidth it does not depend on their scale. Computed in float64,
    as a ratio of numbers that may both be small.
    """
    x, t = _rows(x=x, t=t)
    log_k = _log_gram(x.double(), x.double(), bandwidth)
    log_t = _log_gram(t.double(), t.double(), t_bandwidth)
    own = _information(log_k, log_k) * _information(log_t, log_t)
    # Of a constant all three are 0 but for rounding, which must not be divided.
    known = own > (64 * torch.finfo(own.dtype).eps) ** 2
    share = _information(log_k, log_t) / torch.where(known, own, 1.0).sqrt()
    return torch.where(known, share, 0.0).to(x.dtype)


def conditional_cs(
    x: Tensor,
    y: Tensor,
    answer: Tensor,
    bandwidth: float = 1.0,
    y_bandwidth: float = 1.0,
    weighting: Weighting = "row",
) -> Tensor:
    """D_CS(p(y|x); q(answer|x)) in nats, of x [N, D], y [N, E] and answer [N, E] -> [].

    weighting, with s_i = sum_j K_ij:
        "row"    W_ij = K_ij / s_i^2, the paper's. It is not symmetric in i and j, so that the sum is no inner
                 product: the value can be negative, and its minimum is not exactly at answer = y.
        "both"   W_ij = K_ij / (s_i s_j), which is positive semi-definite: the value is >= 0, 0 at answer = y,
                 and symmetric in y and answer.
    """
    x, y, answer = _rows(x=x, y=y, answer=answer)
    if y.shape != answer.shape:
        raise ValueError(f"y {tuple(y.shape)} and answer {tuple(answer.shape)} differ in shape")
    log_w = _log_weights(_log_gram(x, x, bandwidth), weighting)

    def weighed(a: Tensor, b: Tensor) -> Tensor:
        return (log_w + _log_gram(a, b, y_bandwidth)).logsumexp((0, 1))

    return weighed(y, y) + weighed(answer, answer) - 2 * weighed(answer, y)


def _information(log_k: Tensor, log_t: Tensor) -> Tensor:
    """log <joint, joint> + log <margins, margins> - 2 log <joint, margins>, of two log Gram matrices."""
    joint = (log_k + log_t).logsumexp((0, 1))
    margins = log_k.logsumexp((0, 1)) + log_t.logsumexp((0, 1))
    return joint + margins - 2 * (log_k.logsumexp(0) + log_t.logsumexp(0)).logsumexp(0)


def _log_weights(log_k: Tensor, weighting: Weighting) -> Tensor:
    log_s = log_k.logsumexp(1, keepdim=True)
    if weighting == "row":
        return log_k - 2 * log_s
    if weighting == "both":
        return log_k - log_s - log_s.mT
    raise ValueError(f"weighting is 'row' or 'both', got {weighting!r}")


def _log_gram(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """Logarithms of exp(-|a_i - b_j|^2 / (2 bandwidth^2)), [N, N]."""
    require_positive(bandwidth, "bandwidth")
    return -(distances(a, b) / bandwidth).square() / 2


def _rows(**samples: Tensor) -> tuple[Tensor, ...]:
    """The samples [N, ...], one row each and of one number, as [N, D] in one precision."""
    for name, sample in samples.items():
        if sample.ndim < 2:
            raise ValueError(
                f"{name} holds one row a sample, (N, D), got shape {tuple(sample.shape)}; numbers are points "
                f"on a line, of shape (N, 1): write {name}.unsqueeze(-1)"
            )
    if len({len(sample) for sample in samples.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(sample.shape)}" for name, sample in samples.items())
        raise ValueError(f"samples belong together row by row, and these differ in number: {shapes}")
    return in_working_precision(*(sample.flatten(1) for sample in samples.values()))
