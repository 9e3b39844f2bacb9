"""Comp-sum losses: one number leads from the sum of exponentials over cross-entropy to the absolute error.

Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", arXiv 2304.07288.
`CompSum.gce` and `TruncatedGCE` are of Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep
Neural Networks with Noisy Labels", arXiv 1805.07836.

    L = mean over examples of Phi(u),   u = sum over y' != y of e^(h_y' - h_y) = 1/q_y - 1,   q = softmax(h)
    Phi(u) = ((1 + u)^(1 - tau) - 1) / (1 - tau),   log(1 + u) at tau = 1

h are the logits. tau is 0 for the sum of exponentials, 1 for cross-entropy, 1 + q for generalised
cross-entropy (its q), 2 for the mean absolute error 1 - q_y. The gradient in h is q_y^(tau - 1) (q - e_y).
Ours: below 2 the loss is (2 - tau) D(e_y, q) under Alpha(2 - tau), at 2 it is TV(e_y, q).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import continued, ratio_cap
from fdiv.divergences.alpha import Alpha
from fdiv.divergences.tv import TV
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.supervise._labels import of_label, scores_of


@dataclass(frozen=True)
class CompSum:
    """Phi(1/q_y - 1), averaged over examples.

    A larger tau weighs an example by q_y^(tau - 1), so that a wrong label which the model disbelieves moves
    it less; from 2 on the best scores grow without bound and tell no probabilities.
    """

    consumes: ClassVar[Consumes] = "examples"

    tau: float = 1.0

    def __post_init__(self):
        check_tau(self.tau)

    @classmethod
    def gce(cls, q: float = 0.7) -> "CompSum":
        """Generalised cross-entropy (1 - q_y^q)/q."""
        return cls(1 + check_power(q))

    @property
    def divergence(self) -> FDivergence:
        """Of which the loss is the value at a one-hot p; beyond tau = 2 there is none, and TV() stands in."""
        return (2 - self.tau) * Alpha(2 - self.tau) if self.tau < 2 else TV()

    def __call__(self, *, logits: Tensor, labels: Tensor, count: Tensor | float | None = None) -> Out:
        """logits [B, C], labels [B]; count: examples of the global batch (default: here)."""
        log_q = scores_of(logits, labels).log_softmax(-1)
        surprise = -of_label(log_q, labels)
        if self.tau <= 1 and bool(surprise.detach().isposinf().any()):
            raise ValueError("a label has no probability: its logit is -inf; write a finite one, or tau > 1")
        metrics = {"nll": mean_over_tokens(surprise.detach())}
        return Out(mean_over_tokens(comp_sum(surprise, self.tau), count=count), metrics)

    def log_probs(self, logits: Tensor) -> Tensor:
        """The log-probabilities [B, C] that the scores stand for.

        The loss is least at softmax(h) in proportion to p^(1/(2 - tau)), of which this is the inverse; from
        tau = 2 on there is none, and softmax(h) is all there is.
        """
        return ((2 - self.tau) * logits if self.tau < 2 else logits).log_softmax(-1)


@dataclass(frozen=True)
class TruncatedGCE:
    """GCE with a ceiling: an example whose label has q_y <= k costs what it does at k, and moves nothing.

    k > 1/classes stops a fresh model altogether; so the ceiling holds from the fraction `start` of the
    training on, and plain GCE before. The original decides at intervals, for all examples, which ones to
    leave out; here each is looked at when it is drawn.
    """

    consumes: ClassVar[Consumes] = "examples"
    divergence: ClassVar[FDivergence] = TV()

    q: float = 0.7
    k: float = 0.5
    start: float = 0.5

    def __post_init__(self):
        check_power(self.q)
        if not 0 < self.k < 1:
            raise ValueError(
                f"k is a probability in (0, 1), got {self.k!r}; for no ceiling write CompSum.gce()"
            )
        if not 0 <= self.start < 1:
            raise ValueError(f"start is a fraction of the training in [0, 1), got {self.start!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("logits", "labels", *(("progress",) if self.start else ()))

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        progress: float | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """logits [B, C], labels [B]; `kept`: the share of examples below the ceiling, in force or not."""
        if self.start and progress is None:
            raise TypeError(
                f"start={self.start!r} reads progress; write start=0 to truncate from the first step"
            )
        surprise = -of_label(scores_of(logits, labels).log_softmax(-1), labels)
        kept = surprise.detach() < -math.log(self.k)
        rows = comp_sum(surprise, 1 + self.q)
        if progress is None or progress >= self.start:
            ceiling = -math.expm1(self.q * math.log(self.k)) / self.q
            rows = torch.where(kept, rows, ceiling)
        return Out(mean_over_tokens(rows, count=count), {"kept": mean_over_tokens(kept.to(rows))})


def comp_sum(surprise: Tensor, tau: float) -> Tensor:
    """Phi(1/q_y - 1) from -log q_y >= 0; for tau < 1 continued linearly before its exponential overflows."""
    power = 1 - tau
    if power == 0:
        return surprise
    if power < 0:
        return (power * surprise).expm1() / power
    cap = ratio_cap(surprise.dtype)
    return continued(torch.expm1, power * surprise, (math.exp(-cap), math.exp(cap))) / power


def check_tau(tau: float) -> None:
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau is finite and >= 0 (1 is cross-entropy, 2 the absolute error), got {tau!r}")


def check_power(q: float) -> float:
    if not 0 < q <= 1:
        raise ValueError(f"q is in (0, 1], got {q!r}; its limit at 0 is cross-entropy, CompSum(1.0)")
    return q
