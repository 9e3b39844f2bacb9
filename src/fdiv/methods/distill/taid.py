"""TAID: a teacher that starts near the student and moves to the real one as the student follows.

Shing, Misaki, Bao, Yokoi and Akiba, "TAID: Temporally Adaptive Interpolated Distillation for Efficient
Knowledge Transfer in Language Models", arXiv 2501.16937.

    p_t = softmax((1 - t) sg(student logits) + t teacher logits),   L = D(p_t, q),   D = KL in the paper

t goes from t_start to t_end. With J = CE(p_t, q) of the step, N steps, and the first step leaving t alone:

    fall = (J' - J) / (J' + 1e-15)                          J' is the last step's
    m    = beta m + (1 - beta) fall
    t    = min(t_end, max(t_start + (t_end - t_start) step / N,  t + alpha sigmoid(m) (1 - t)))

The paper's t_start, t_end, alpha and beta are `start`, `end`, `rate` and `momentum`; sg stops the gradient.
J is the authors' loss: KL and the entropy of p_t together, so that fall also sees how p_t itself sharpens.
Near p = q the gradient is t (q - p): the loss is that of the real teacher, scaled by t.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Offline


@dataclass(frozen=True)
class TAID:
    """The mean over response tokens of D(p_t, student), p_t between student and teacher.

    start, end: of t. adaptive: whether t may run ahead of the straight line between them, or is that line.
    rate: how far ahead it may run in a step. momentum: how slowly it takes notice of the falling objective.
    """

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = ("state", "progress")

    divergence: Divergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=Exact)
    sampler: Sampler = field(default_factory=Offline)
    start: float = 0.4
    end: float = 1.0
    rate: float = 5e-4
    momentum: float = 0.99
    adaptive: bool = True

    def __post_init__(self):
        self.estimator.check(self.divergence)
        if self.estimator.sees != "logits":
            raise TypeError(
                f"TAID mixes the logits of both models and {self.estimator!r} does not see them; "
                "write Exact(), TopK(k) or SampledLogits(n)"
            )
        if not isinstance(self.sampler, Sampler):
            raise TypeError(
                f"a sampler says who writes the responses, got {self.sampler!r}; write Offline() or "
                "Mix(lmbda)"
            )
        if not 0 <= self.start <= self.end <= 1 or self.end == 0:
            raise ValueError(
                f"t goes from start to end, 0 <= start <= end <= 1 and end > 0, got {self.start!r} and "
                f"{self.end!r}: at t = 0 the student is its own teacher"
            )
        if not 0 <= self.rate <= 1 or not 0 <= self.momentum < 1:
            raise ValueError(f"rate is in [0, 1], momentum in [0, 1), got {self.rate!r}, {self.momentum!r}")

    def __call__(
        self,
        *,
        log_p: Tensor,
        log_q: Tensor,
        state: dict[str, float],
        progress: float,
        mask: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """log_p, log_q: both models' log-probabilities, [rows, vocab]; mask and count as GKD's.

        metrics: J as `objective` and `t`, means over the tokens of this call.
        """
        t = state["t"] if self.adaptive else self._line(progress)
        log_between = interpolated(log_p, log_q, t)
        tokens = GKD(self.divergence, self.estimator)
        loss = tokens(log_p=log_between, log_q=log_q, mask=mask, count=count).loss
        objective = cross_entropy(log_between, log_q.detach())
        numbers = {"objective": objective, "t": torch.full_like(objective, t)}
        return Out(loss, {name: mean_over_tokens(rows, mask) for name, rows in numbers.items()})

    def initial_state(self) -> dict[str, float]:
        """`objective` is the last step's, inf before the first."""
        return {"t": self.start, "momentum": 0.0, "objective": math.inf}

    def advance(
        self, state: dict[str, float], metrics: dict[str, float], progress: float
    ) -> dict[str, float]:
        """progress: that of the next step. The authors' line, at the step just taken, is one step behind."""
        objective, last = metrics["objective"], state["objective"]
        if not math.isfinite(objective):
            raise FloatingPointError(
                f"the objective that moves t is {objective}: the student excludes what its teacher says"
            )
        if last == math.inf:
            return state | {"objective": objective}
        fall = (last - objective) / (last + 1e-15)
        momentum = self.momentum * state["momentum"] + (1 - self.momentum) * fall
        sigmoid = (1 + math.tanh(momentum / 2)) / 2
        t = state["t"] + self.rate * sigmoid * (1 - state["t"])
        t = min(self.end, max(self._line(progress), t))
        return state | {"t": t, "momentum": momentum, "objective": objective}

    def _line(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@torch.no_grad()
def interpolated(log_p: Tensor, log_q: Tensor, t: float) -> Tensor:
    """log of p^t q^(1 - t), normalised over the last dimension; without gradients."""
    log_p, log_q = in_working_precision(log_p, log_q)
    if t in (0, 1):  # 0 times a logarithm of -inf is nan
        return log_p if t else log_q
    return (t * log_p + (1 - t) * log_q).log_softmax(-1)


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-sum p log q over the last dimension; what p has no mass for costs nothing."""
    return -(log_p.exp() * log_q.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
