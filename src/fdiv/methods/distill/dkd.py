"""DKD: what a teacher says of the label, and what it says of the other classes, weighted apart.

Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation", arXiv 2203.08679.

    L = cross_entropy CE + min(progress / warmup, 1) tau^2 [ alpha TCKD + beta NCKD ]
    TCKD = D of (p_y, 1 - p_y) from (q_y, 1 - q_y),   NCKD = D of the other classes, each side renormalised

p is the teacher and q the student at the temperature tau, y the label; alpha, beta and T (`temperature`) are
the paper's, whose divergence is KL. KL(p, q) = TCKD + (1 - p_y) NCKD, so that a teacher that is sure of the
label says next to nothing of the others: DKD leaves that factor out. Both parts are divergences for every f,
and TCKD <= D(p, q); a factor that joins them to D(p, q) is known of powers alone, it is
(1 - p_y)^a (1 - q_y)^(1 - a) for Alpha(a).
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._classes import (
    but_label,
    cross_entropy,
    of_label,
    require_finite,
    require_temperature,
    require_weights,
)


@dataclass(frozen=True)
class DKD:
    """Cross-entropy, and alpha and beta times the divergences at the label and among the other classes.

    warmup: the fraction of the training over which the teacher's terms grow from nothing; the paper's 20 of
    240 epochs by default. A teacher without any mass beside the label says nothing of the others: NCKD is 0.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "p_logits", "progress")

    divergence: FDivergence = field(default_factory=KL)
    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    warmup: float = 1 / 12
    cross_entropy: float = 1.0

    def __post_init__(self):
        require_f_divergence(self.divergence, "DKD, which compares p_y with 1 - p_y,")
        require_weights(alpha=self.alpha, beta=self.beta, cross_entropy=self.cross_entropy)
        require_temperature(self.temperature)
        if not self.alpha + self.beta > 0:
            raise ValueError("alpha=0 and beta=0 leave the teacher out; write SFT() for labels alone")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a fraction of the training in [0, 1], got {self.warmup!r}")

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        p_logits: Tensor,
        progress: float = 1.0,
        count: Tensor | float | None = None,
    ) -> Out:
        """logits, p_logits [B, C] of the student and the teacher; labels [B]; count: of the global batch."""
        target, others = self.parts(p_logits.detach(), logits, labels)
        labelled = cross_entropy(logits, labels)
        taught = self.alpha * target + self.beta * others
        scale = self.temperature**2 * (min(progress / self.warmup, 1.0) if self.warmup else 1.0)
        loss = mean_over_tokens(self.cross_entropy * labelled + scale * taught, count=count)
        terms = {"cross_entropy": labelled, "target": target, "others": others}
        return Out(loss, {name: mean_over_tokens(rows.detach()) for name, rows in terms.items()})

    def parts(self, p_logits: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(TCKD, NCKD), [B] each, at the temperature."""
        p_logits, logits = (t / self.temperature for t in in_working_precision(p_logits, logits))
        (p_binary, p_others), (q_binary, q_others) = (decoupled(t, labels) for t in (p_logits, logits))
        silent = p_binary[:, 1:] == -torch.inf
        p_others, q_others = (t.masked_fill(silent, 0.0) for t in (p_others, q_others))
        return (
            require_finite(self.divergence(p_binary, q_binary), self.divergence),
            require_finite(self.divergence(p_others, q_others), self.divergence),
        )


def decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (the label, any other class) [B, 2], and of the others without it [B, C - 1].

    The second is a softmax that never sees the label's logit, however large.
    """
    if logits.shape[-1] < 2:
        raise ValueError("a classifier has two classes at least; got one logit an example")
    others = but_label(logits, labels)
    label, rest = of_label(logits, labels).unsqueeze(-1), others.logsumexp(-1, keepdim=True)
    return torch.cat([label, rest], -1).log_softmax(-1), others.log_softmax(-1)
