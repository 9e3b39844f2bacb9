"""Math-PUMA: a model reads a problem one way as it reads it another, up to the scale of its logits.

Zhuang, Huang, Zhang and Zeng, "Math-PUMA: Progressive Upward Multimodal Alignment to Enhance Mathematical
Reasoning", arXiv 2408.08640 (its second stage).

    z = (logits - mean) / (standard deviation + 1e-6), over the vocabulary;   p, q = softmax(z / tau)
    L = weight tau^2 D(p, q) + (1 - weight) (-log q(y)), averaged over the tokens of the answer

p is the model shown the problem in text, without gradient ("strong", "ref"), q the model shown it mostly in
the picture ("weak", "act"); any two prompts of one answer will do. The paper's lambda is `weight`; its alpha
weighs what its code calls fkl, KL(q, p), so it is divergence = alpha * ReverseKL() + (1 - alpha) * KL().
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.jeffreys import Jeffreys
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, check_mask, mean_over_tokens
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Offline

EPSILON = 1e-6


@dataclass(frozen=True)
class MathPUMA:
    """Aligns the pattern of the next token's logits between two prompts, and fits the answer.

    Each row of either model is brought to mean 0 and standard deviation 1 first, so it is not taught how sure
    the teacher is; that is left to the likelihood of the answer.
    ema: the teacher follows the student by this rate; 1 is the paper's, one model on both sides.
    """

    consumes: ClassVar[Consumes] = "responses"
    context: ClassVar[str] = "privileged"
    reads: ClassVar[tuple[str, ...]] = ("log_q_label",)
    estimator: ClassVar[Estimator] = Exact()  # a mean over the vocabulary takes all of it

    divergence: Divergence = field(default_factory=lambda: 0.5 * Jeffreys())
    weight: float = 0.5
    tau: float = 1.0
    ema: float = 1.0
    sampler: Sampler = field(default_factory=Offline)

    def __post_init__(self):
        self.estimator.check(self.divergence)
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is the divergence's share, between 0 and 1, got {self.weight!r}")
        if not self.tau > 0:
            raise ValueError(f"tau must be > 0, got {self.tau!r}")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema is a rate between 0 and 1, got {self.ema!r}")

    def __call__(
        self,
        *,
        log_p: Tensor,
        log_q: Tensor,
        log_q_label: Tensor,
        mask: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """log_p, log_q [rows, vocab] at the same tokens of the answer, after either prompt; log_q_label
        [rows].

        mask [rows] selects tokens; count is their number in the global batch (default: here).
        """
        if mask is not None:
            for tensor, dimensions in ((log_p, -1), (log_q, -1), (log_q_label, None)):
                check_mask(mask, tensor.shape[:dimensions])
            log_p, log_q, log_q_label = (t[mask] for t in (log_p, log_q, log_q_label))
        # Log-densities are logits less a constant, which the mean takes with it.
        log_p, log_q = ((standardised(t) / self.tau).log_softmax(-1) for t in (log_p.detach(), log_q))
        alignment = mean_over_tokens(self.tau**2 * self.divergence(log_p, log_q), count=count)
        likelihood = mean_over_tokens(-log_q_label, count=count)
        metrics = {"alignment": alignment.detach(), "nll": likelihood.detach()}
        return Out(self.weight * alignment + (1 - self.weight) * likelihood, metrics)


def standardised(logits: Tensor) -> Tensor:
    """Each row at mean 0 and (unbiased) standard deviation 1 over its finite entries; -inf stays."""
    finite = logits.isfinite()
    size = finite.sum(-1, keepdim=True)
    # The others are filled with a constant of no account, for a gradient of 0 times inf is nan.
    safe = torch.where(finite, logits, 0.0)
    centred = torch.where(finite, safe - safe.sum(-1, keepdim=True) / size, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (size - 1).clamp(min=1)
    spread = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
    return torch.where(finite, centred / (spread + EPSILON), logits)
