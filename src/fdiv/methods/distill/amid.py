"""AMiD: distillation against an assistant between teacher and student, their alpha-mixture.

Shin, Kim, Jo, Na and Moon, "AMiD: Knowledge Distillation for LLMs with alpha-mixture Assistant
Distribution", arXiv 2510.15982.

    r = (1/Z) [ lambda p^h + (1 - lambda) q^h ]^(1/h),   h = (1 - alpha)/2
    L = < D(p, r) >  or  < D(q, r) >  over tokens

alpha = -1 is the arithmetic mixture (DistiLLM's), alpha = 1 the normalised geometric one, exp(lambda log p +
(1 - lambda) log q), and alpha = 3 the harmonic one. The paper's lambda is `weight`, its D `divergence`, p the
teacher and q the student. Gradients flow through r, and under "q, r" through q as well.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import Divergence, on_one_support
from fdiv._math import log_mixture
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._writer import require_sampler
from fdiv.sample._sampler import Sampler
from fdiv.sample.replay import AdaptiveReplay


@dataclass(frozen=True)
class AMiD:
    """The mean over response tokens of D(teacher, assistant) or D(student, assistant).

    alpha: smaller ones spread the assistant over whatever either model allows, larger ones over what both do.
    weight: of the teacher in the assistant. Near p = q the loss is (1 - weight)^2 D(p, q) for "p, r" and
    weight^2 D(p, q) for "q, r", so the second wants a weight near 1.
    pair: the arguments of the divergence. For the other orders turn the divergence round: KL(r, p) is
    AMiD(ReverseKL(), pair="p, r"), AlphaBeta(a, b) of (r, p) is AlphaBeta(b, a) of (p, r).
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: Divergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=Exact)
    sampler: Sampler = field(default_factory=AdaptiveReplay)
    alpha: float = 0.0
    weight: float = 0.1
    pair: Literal["p, r", "q, r"] = "p, r"

    def __post_init__(self):
        self.estimator.check(self.divergence)
        require_sampler(self.sampler)
        if self.estimator.sees != "logits":
            raise TypeError(
                f"AMiD mixes whole rows of teacher and student, which {self.estimator!r} does not see; "
                "write Exact(), TopK(k) or SampledLogits(n)"
            )
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha is a finite number, got {self.alpha!r}")
        if not 0 < self.weight < 1:
            raise ValueError(
                f"weight is the teacher's share of the assistant, between 0 and 1, got {self.weight!r}: at "
                "the ends the assistant is one of the two models; write GKD(...) to compare these"
            )
        if self.pair not in ("p, r", "q, r"):
            raise ValueError(
                f"pair is 'p, r' or 'q, r', got {self.pair!r}; for 'r, p' write the reverse divergence"
            )

    def __call__(self, *, log_p: Tensor, log_q: Tensor, count: Tensor | float | None = None) -> Out:
        """log_p, log_q [rows, vocab]; count: response tokens of the global batch (default: here)."""
        log_p, log_q = on_one_support(log_p, log_q)
        log_r = assistant(log_p, log_q, self.alpha, self.weight)
        first = log_p if self.pair == "p, r" else log_q
        return Out(mean_over_tokens(self.estimator(self.divergence, first, log_r), count=count), {})


def assistant(log_p: Tensor, log_q: Tensor, alpha: float, weight: float) -> Tensor:
    """log r, the normalised alpha-mixture of two rows [..., vocab]; for alpha >= 1 only on common support."""
    h = (1 - alpha) / 2
    empty = (log_p == -torch.inf) & (log_q == -torch.inf)  # where only one is, either side of h = 0 is right
    a, b = log_p.masked_fill(empty, 0.0), log_q.masked_fill(empty, 0.0)
    # log_mixture keeps the digits of two masses close to 1, so that h may be as small as it likes.
    log_r = log_mixture(h * a, h * b, weight) / h if h else weight * a + (1 - weight) * b
    return log_r.masked_fill(empty, -torch.inf).log_softmax(-1)
