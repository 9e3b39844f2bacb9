"""GKD: token-level distillation under any divergence, on any mix of the data's and the student's text.

Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist and Bachem, "On-Policy Distillation of Language Models:
Learning from Self-Generated Mistakes", arXiv 2306.13649.

    L = (1 - lambda) E_{y ~ data} D(p, q)(y|x) + lambda E_{y ~ student} D(p, q)(y|x)

D is averaged over the tokens of y, and no gradient flows through sampling. The paper's lambda is `lmbda`,
its D `divergence`; p is the teacher and q the student.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, check_mask, mean_over_tokens, named
from fdiv.methods.distill._rows import HEADS


@dataclass(frozen=True)
class GKD:
    """The mean over response tokens of D(teacher, student).

    lmbda: the fraction of steps whose responses the student writes; 0 is off-policy distillation.
    temperature: divides the logits of *both* models in the loss; sampling is at temperature 1.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: Divergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=Exact)
    lmbda: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        self.estimator.check(self.divergence)
        if self.estimator.sees not in ("logits", "heads"):
            raise TypeError(
                f"GKD sees the whole vocabulary of both models and {self.estimator!r} only a sampled token; "
                "write Exact(), FusedLinear(), TopK(k) or SampledLogits(n)"
            )
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda is a fraction between 0 and 1, got {self.lmbda!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature!r}")

    def __call__(
        self, *, mask: Tensor | None = None, count: Tensor | float | None = None, **evidence: Tensor
    ) -> Out:
        """`evidence`: the tensors that `estimator.evidence` names, the temperature already applied.

        mask [rows] selects response tokens; count is their number in the global batch (default: here).
        """
        tensors = named(evidence, self.estimator.evidence)
        if mask is not None:
            tensors = [
                # A head has no rows of tokens. Rows go before the estimator sees them, which saves their
                # work and keeps their infinities out of the gradient.
                t if name in HEADS else _select(t, mask)
                for name, t in zip(self.estimator.evidence, tensors, strict=True)
            ]
        return Out(mean_over_tokens(self.estimator(self.divergence, *tensors), count=count), {})


def _select(rows: Tensor, mask: Tensor) -> Tensor:
    check_mask(mask, rows.shape[:-1])
    return rows[mask]
