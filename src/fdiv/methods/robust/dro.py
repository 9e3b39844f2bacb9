"""DRO: the mean loss under the worst weights near the empirical ones, instead of the mean.

Namkoong and Duchi, "Variance-based Regularization with Convex Objectives", arXiv 1610.02581, for the ball;
Li, Beirami, Sanjabi and Smith, "Tilted Empirical Risk Minimization", arXiv 2007.01162, for the penalty under
KL, whose 1/t is `lam`; Levy, Carmon, Duchi and Sidford, "Large-Scale Methods for Distributionally Robust
Optimization", arXiv 2010.05893, for what a mini-batch does to both.

    L = max over w of sum w_i l_i - lam D(w, 1/B),   or with D(w, 1/B) <= rho;   l_i = -log q(y_i | x_i)
    CVaR: the same with w_i <= 1/(share B), which is the mean of the worst `share` of the losses

The gradient is that of sum w_i l_i with w held (Danskin). The worst weights of a *batch* are not those of the
data: E L(batch) <= L(data), the less so the larger the batch. With `rate` and KL() the normaliser is a
running estimate instead, as in compositional gradient descent (Wang, Fang and Liu, arXiv 1411.3803):

    u <- (1 - rate) u + rate mean_i e^(l_i/lam),   gradient mean_i e^(l_i/lam) grad l_i / u
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out
from fdiv.methods.supervise._labels import of_label, scores_of
from fdiv.operators.dro import Robust, constrained, cvar, penalised

State = dict[str, float]


@dataclass(frozen=True)
class DRO:
    """Cross-entropy under the worst weights of a batch: at a price `lam`, or within a radius `rho`.

    D(w, p) has the worst weights as its p: KL() is sum w log(B w). rate: see the module; the first steps take
    the mean of all batches so far, 1/step in place of a smaller rate. The metric `effective` is the number of
    examples that equal weights would spread over, as a share of the batch; `lam` is the multiplier of rho.
    """

    consumes: ClassVar[Consumes] = "examples"
    unit: ClassVar[str] = "batch"

    divergence: FDivergence = field(default_factory=KL)
    lam: float | None = None
    rho: float | None = None
    rate: float | None = None

    def __post_init__(self):
        require_f_divergence(self.divergence, "DRO")
        if (self.lam is None) == (self.rho is None):
            raise ValueError(
                f"DRO has a price lam or a radius rho, one of them, got lam={self.lam!r} and rho={self.rho!r}"
            )
        if self.lam is not None and not 0 < self.lam < math.inf:
            raise ValueError(f"lam is finite and > 0, got {self.lam!r}; for lam = inf train by cross-entropy")
        if self.rho is not None and not 0 <= self.rho < math.inf:
            raise ValueError(f"rho bounds a divergence: finite and >= 0, got {self.rho!r}")
        check_rate(self.rate)
        if self.rate is not None and (self.divergence != KL() or self.lam is None):
            raise ValueError(
                f"the running estimate is of E exp(loss/lam), of KL() at a price: got {self.divergence!r} "
                f"and lam={self.lam!r}; leave rate out"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        return ("logits", "labels", *(("state",) if self.rate else ()))

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        count: Tensor | float | None = None,
        state: State | None = None,
    ) -> Out:
        """logits [B, C], labels [B] of one whole batch; count, if given, is B."""
        losses = cross_entropy(logits, labels, count)
        if not len(losses):
            return empty(losses)
        if self.rate:
            assert self.lam is not None
            return running(losses, self.lam, self.rate, required(state))
        if self.lam is not None:
            return told(penalised(losses, self.divergence, self.lam), losses)
        assert self.rho is not None
        found = constrained(losses, self.divergence, self.rho)
        out = told(found, losses)
        return Out(out.loss, out.metrics | ({"lam": found.multiplier} if self.rho else {}))

    def initial_state(self) -> State:
        return {"log_moment": 0.0, "steps": 0.0} if self.rate else {}

    def advance(self, state: State, metrics: dict[str, float], progress: float) -> State:
        return advanced(state, metrics) if self.rate else state


@dataclass(frozen=True)
class CVaR:
    """The mean of the worst `share` of a batch's cross-entropies: weights of at most 1/(share B)."""

    consumes: ClassVar[Consumes] = "examples"
    unit: ClassVar[str] = "batch"
    divergence: ClassVar[FDivergence] = KL()  # of each loss; the ball is no f-divergence's

    share: float = 0.3

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share is a fraction of the examples, in (0, 1], got {self.share!r}")

    def __call__(self, *, logits: Tensor, labels: Tensor, count: Tensor | float | None = None) -> Out:
        """logits [B, C], labels [B] of one whole batch; count, if given, is B."""
        losses = cross_entropy(logits, labels, count)
        return told(cvar(losses, self.share), losses) if len(losses) else empty(losses)


def cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | float | None) -> Tensor:
    """-log q(y) [B]; raises where these are not the whole batch."""
    losses = -of_label(scores_of(logits, labels).log_softmax(-1), labels)
    if count is not None and int(count) != len(losses):
        raise ValueError(
            f"the worst weights are those of a whole batch of {int(count)}, got {len(losses)} examples of it"
        )
    return losses


def told(found: Robust, losses: Tensor) -> Out:
    """The robust value, and what its weights are like."""
    weights, losses = found.weights.detach(), losses.detach()
    effective = 1 / (weights.square().sum() * len(losses))
    return Out(found.value, {"nll": losses.mean(), "worst": losses.max(), "effective": effective})


def empty(losses: Tensor) -> Out:
    """Nothing to learn from, with the graph intact."""
    return Out(losses.sum(), {})


# -- the running estimate of E exp(loss/lam) -----------------------------------------------------------


def running(losses: Tensor, lam: float, rate: float, state: State) -> Out:
    """lam log u, of a u that has seen this batch, with the compositional gradient of the losses."""
    tilted = (losses / lam).detach()
    log_moment = tilted.logsumexp(0) - math.log(len(tilted))
    log_u = moved_moment(log_moment, state, rate)
    weights = (tilted - log_u).exp() / len(tilted)
    gain = (weights * losses).sum()
    effective = 1 / ((tilted.log_softmax(0) * 2).exp().sum() * len(losses))
    numbers = {"nll": losses.detach().mean(), "worst": losses.detach().max(), "effective": effective}
    return Out(lam * log_u + gain - gain.detach(), numbers | {"log_moment": log_u})


def moved_moment(log_moment: Tensor, state: State, rate: float) -> Tensor:
    """log u, after a batch of this log mean e^(l/lam)."""
    share = max(rate, 1 / (1 + state["steps"]))
    if share == 1:
        return log_moment
    before = log_moment.new_tensor(state["log_moment"] + math.log1p(-share))
    return torch.logaddexp(before, log_moment + math.log(share))


def advanced(state: State, metrics: dict[str, float]) -> State:
    """After a step whose metric `log_moment` is log u."""
    if "log_moment" not in metrics:
        return state
    return {"log_moment": metrics["log_moment"], "steps": state["steps"] + 1}


def required(state: State | None) -> State:
    if state is None:
        raise TypeError("a running estimate reads state; pass initial_state() at the first step")
    return state


def check_rate(rate: float | None) -> None:
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"rate is in (0, 1], 1 being the batch alone, or None, got {rate!r}")
