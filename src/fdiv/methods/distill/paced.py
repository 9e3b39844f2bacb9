"""PACED: distil most where the student sometimes succeeds.

Xu, Sang, Zhou, He and Wang, "PACED: Distillation and On-Policy Self-Distillation at the Frontier of Student
Competence", arXiv 2603.11178.

    L = scale mean over tokens of w(pass rate of the prompt) D(p, q)(.|y_<t),   w(r) = r^a (1 - r)^b

The paper's alpha and beta are `a` and `b`. Its two stages are `divergence`, until the fraction `switch` of
the steps is done, and `second` after it. The pass rate is known from `tries` answers, of which k = `passes`
are right. w(k / tries) is biased; `rate` offers an unbiased weight, and one that gives up no prompt.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL, ReverseKL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_tokens, named
from fdiv.methods.distill._rows import some_rows
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Mix

RATES = ("plug-in", "unbiased", "smoothed")


@dataclass(frozen=True)
class PACED:
    """The mean over response tokens of D(teacher, student), weighted by how often the prompt is solved.

    rate: "plug-in", w(k / tries), 0 for prompts that always or never succeed; "smoothed", w at
    (k + 1/2) / (tries + 1); "unbiased", k (tries - k) / (tries (tries - 1)) for a = b = 1, and its like for
    other integers.
    scale: what the weight is multiplied by; None for 1 / max w, so that the heaviest prompt weighs 1. It is a
    constant, for a mean weight of 1 would need the whole global batch.
    """

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = ("passes", "tries", "progress")

    divergence: Divergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=Exact)
    a: float = 1.0
    b: float = 1.0
    second: Divergence = field(default_factory=ReverseKL)
    switch: float = 0.5
    rate: Literal["plug-in", "unbiased", "smoothed"] = "plug-in"
    scale: float | None = None
    sampler: Sampler = field(default_factory=Mix)

    def __post_init__(self):
        for divergence in (self.divergence, self.second):
            GKD(divergence, self.estimator)  # refuses what it cannot train
        if self.a < 0 or self.b < 0:
            raise ValueError(f"a and b are exponents >= 0, got {self.a!r} and {self.b!r}")
        if self.rate not in RATES:
            raise ValueError(f"rate is one of {', '.join(RATES)}, got {self.rate!r}")
        if self.rate == "unbiased" and (self.a % 1 or self.b % 1):
            raise ValueError(
                "only a polynomial of the pass rate has an unbiased estimate: write integers or "
                f"rate='smoothed', got a={self.a!r}, b={self.b!r}"
            )
        if not 0 <= self.switch <= 1:
            raise ValueError(f"switch is a fraction of the steps between 0 and 1, got {self.switch!r}")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale is > 0, or None for 1 / max w, got {self.scale!r}")

    def __call__(
        self,
        *,
        passes: Tensor,
        tries: Tensor,
        progress: float,
        count: Tensor | float | None = None,
        **evidence: Tensor,
    ) -> Out:
        """`evidence`: the tensors that `estimator.evidence` names; passes and tries [R], of the row's prompt.

        count: the tokens of the global batch, those of weight 0 included (default: here).
        """
        weight = self.weight(passes, tries)
        some = weight > 0
        tensors = named(some_rows(evidence, some), self.estimator.evidence)
        rows = self.estimator(self.divergence if progress < self.switch else self.second, *tensors)
        rows = rows * weight[some].to(rows.dtype)
        loss = mean_over_tokens(rows, count=len(weight) if count is None else count)
        return Out(loss, {"weight": mean_over_tokens(weight)})

    def weight(self, passes: Tensor, tries: Tensor) -> Tensor:
        """Of a prompt that `passes` of `tries` answers solved; any shape, kept."""
        fewest = int(self.a + self.b) if self.rate == "unbiased" else 1
        if ((tries < max(1, fewest)) | (passes < 0) | (passes > tries)).any():
            raise ValueError(f"{self!r} needs tries >= {max(1, fewest)} and 0 <= passes <= tries")
        if self.rate == "unbiased":
            return self._scale * _unbiased(passes, tries, int(self.a), int(self.b))
        smoothing = 0.5 if self.rate == "smoothed" else 0.0
        rate = (passes + smoothing) / (tries + 2 * smoothing)
        return self._scale * rate**self.a * (1 - rate) ** self.b

    @property
    def _scale(self) -> float:
        if self.scale is not None:
            return self.scale
        peak = self.a / (self.a + self.b) if self.a + self.b else 0.5
        return 1 / (peak**self.a * (1 - peak) ** self.b)


def _unbiased(passes: Tensor, tries: Tensor, a: int, b: int) -> Tensor:
    """The chance that a + b tries, drawn without replacement, are first a right and then b wrong ones."""
    weight = torch.ones_like(passes / tries)
    for i in range(a):
        weight = weight * (passes - i) / (tries - i)
    for j in range(b):
        weight = weight * (tries - passes - j) / (tries - a - j)
    return weight
