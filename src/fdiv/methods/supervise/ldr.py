"""LDR: the worst weighting of the score margins over classes, within a divergence of the uniform one.

Zhu, Ying and Yang, "Label Distributionally Robust Losses for Multi-class Classification: Consistency,
Robustness and Adaptivity", arXiv 2112.14869.

    L = mean of max over p of sum_k p_k delta_k - lam D(p, uniform),   delta_k = f_k - f_y + margin [k != y]
    ALDR: max over lam as well, less (alpha D_max / (2 lam_0)) (lam - lam_0)^2,   D_max = D(one-hot, uniform)

f are the logits. The paper's LDR-KL is KL(), lam log mean_k e^(delta_k / lam): cross-entropy less log K at
lam = 1 and margin = 0. Its LDR-k-KL bounds p by 1/k, `top`; its D_max is log K. Any f-divergence is ours.
For lam -> 0 the loss is Crammer and Singer's max_k delta_k, for lam -> inf the mean margin. Its gradient in f
is p - e_y.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.alpha import Alpha
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.supervise._labels import scores_of
from fdiv.methods.supervise._margins import Scores, margins, prepared, uniform, worst, worst_under_cap
from fdiv.operators.worst_case import weighted

SETTLED = 50  # steps of an unseen example's lam, which falls to where it stays


@dataclass(frozen=True)
class LDR:
    """The worst weighted margin, averaged over examples.

    lam: 0 and inf are the limits themselves. top: no class has more than 1/top of the weight; KL() only.
    scores: "plain" logits; or the authors' code, which divides those of an example by their mean size
        ("unit"), after a softplus ("softplus").
    """

    consumes: ClassVar[Consumes] = "examples"

    divergence: FDivergence = field(default_factory=KL)
    lam: float = 1.0
    margin: float = 0.1
    top: int = 1
    scores: Scores = "plain"

    def __post_init__(self):
        check(self, "LDR")
        if not self.lam >= 0:
            raise ValueError(f"lam is >= 0, 0 and inf being the limits, got {self.lam!r}")
        if not (isinstance(self.top, int) and self.top >= 1):
            raise ValueError(f"top is a number of classes, at least 1, got {self.top!r}")
        if self.top > 1 and weighted(1.0, self.divergence)[1] not in (KL(), Alpha(1.0)):
            raise ValueError(f"a bound on the weights is solved under KL() alone, got {self.divergence!r}")

    def __call__(self, *, logits: Tensor, labels: Tensor, count: Tensor | float | None = None) -> Out:
        """logits [B, K], labels [B]; count: examples of the global batch (default: here)."""
        delta = margins(prepared(scores_of(logits, labels), self.scores), labels, self.margin)
        if self.top > delta.shape[1]:
            raise ValueError(f"top={self.top} of {delta.shape[1]} classes cannot share a weight of 1")
        return Out(mean_over_tokens(self._worst(delta), count=count), {})

    def _worst(self, delta: Tensor) -> Tensor:
        if self.lam == 0:
            return delta.topk(self.top).values.mean(-1)
        if math.isinf(self.lam):
            return delta.mean(-1)
        if self.top > 1:
            return worst_under_cap(delta, weighted(self.lam, self.divergence)[0], self.top)
        return -worst(delta, self.divergence, self.lam).value

    def log_probs(self, logits: Tensor) -> Tensor:
        """The log-probabilities [B, K] at which, without a margin, the expected loss is least."""
        if not 0 < self.lam < math.inf:
            return logits.log_softmax(-1)
        return worst(prepared(logits, self.scores), self.divergence, self.lam).distribution.log()


@dataclass(frozen=True)
class ALDR:
    """LDR with a lam of its own for each example: lam_0 (1 - D(p, uniform) / (alpha D_max)).

    So lam is near lam_0 (field `lam`) where the classes are hard to tell, and least, lam_0 (1 - 1/alpha),
    where the model is sure. A table holds the lam of every training example; a step moves it once, by the p
    at the old one. margin_in_p: the authors' code has False, that p is then taken without the margin.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "index", "memory")

    divergence: FDivergence = field(default_factory=KL)
    lam: float = 1.0
    alpha: float = 2.0
    margin: float = 0.1
    scores: Scores = "plain"
    margin_in_p: bool = True

    def __post_init__(self):
        check(self, "ALDR")
        if not 0 < self.lam < math.inf:
            raise ValueError(f"lam is finite and > 0, got {self.lam!r}; write LDR(lam=...) for a limit")
        if not 1 < self.alpha < math.inf:
            raise ValueError(f"alpha is > 1, or lam could reach 0, got {self.alpha!r}")
        if math.isinf(self.divergence.f_at_zero):
            raise ValueError(
                f"{self.divergence!r} is infinite between one class and all of them, so that nothing bounds "
                "lam; write KL(), or another divergence with a finite f(0)"
            )

    def initial_memory(self, data: Any, reference: Any = None) -> dict[str, Tensor]:
        """lam of each of data.inputs."""
        return {"lam": torch.full((len(data.inputs),), self.lam, device=data.inputs.device)}

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        index: Tensor,
        memory: dict[str, Tensor],
        count: Tensor | float | None = None,
    ) -> Out:
        """logits [B, K], labels [B]; index [B] into the table, negative for what it does not hold.

        metrics: `lam`, the mean.
        """
        scores = prepared(scores_of(logits, labels), self.scores)
        lam = self.step(scores.detach(), labels, self._old(memory, index, scores))
        delta = margins(scores, labels, self.margin)
        value = -lam * worst(delta / lam.unsqueeze(-1), self.divergence).value
        strength = self.alpha * self._most(delta.shape[1]) / (2 * self.lam)
        loss = mean_over_tokens(value - strength * (lam - self.lam).square(), count=count)
        return Out(loss, {"lam": mean_over_tokens(lam)})

    def remember(
        self, memory: dict[str, Tensor], *, logits: Tensor, labels: Tensor, index: Tensor, **_: Any
    ) -> None:
        """Writes the lam that the loss was taken at."""
        scores = prepared(scores_of(logits, labels), self.scores)
        lam = self.step(scores, labels, self._old(memory, index, scores))
        memory["lam"][index] = lam.to(memory["lam"])

    def step(self, scores: Tensor, labels: Tensor, lam: Tensor) -> Tensor:
        """The next lam [B], from the p at this one; where it stays, the loss is largest in lam."""
        delta = margins(scores, labels, self.margin if self.margin_in_p else 0.0)
        p = worst(delta / lam.unsqueeze(-1), self.divergence).distribution
        far = self.divergence(p.log(), uniform(delta)) / self._most(delta.shape[1])
        return self.lam * (1 - far.clamp(max=1.0) / self.alpha)  # rounding may pass D_max

    def log_probs(self, logits: Tensor) -> Tensor:
        """The log-probabilities [B, K] at which, without a margin, the expected loss is least.

        They need no label: without a margin p at an example's own lam does not depend on it.
        """
        scores, free = prepared(logits, self.scores), replace(self, margin=0.0)
        lam, nobody = (
            scores.new_full(scores.shape[:1], self.lam),
            scores.new_zeros(len(scores), dtype=torch.int64),
        )
        for _ in range(SETTLED):
            lam = free.step(scores, nobody, lam)
        return worst(scores / lam.unsqueeze(-1), self.divergence).distribution.log()

    def _old(self, memory: dict[str, Tensor], index: Tensor, like: Tensor) -> Tensor:
        return torch.where(index >= 0, memory["lam"][index.clamp(min=0)], self.lam).to(like)

    def _most(self, classes: int) -> float:
        """D between one class and all of them."""
        one = torch.eye(classes, dtype=torch.float64)[0].log()
        return self.divergence(one, uniform(one)).item()


def check(method: LDR | ALDR, name: str) -> None:
    require_f_divergence(method.divergence, name)
    if not math.isfinite(method.margin):
        raise ValueError(f"margin is finite, got {method.margin!r}")
    if method.scores not in ("plain", "unit", "softplus"):
        raise ValueError(f"scores is 'plain', 'unit' or 'softplus', got {method.scores!r}")
