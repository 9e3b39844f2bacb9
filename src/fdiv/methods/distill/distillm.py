"""DistiLLM: skewed KL on data that the student writes more of as it improves less.

Ko, Kim, Chen and Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv
2402.03898.

    SKL  = KL(p, alpha p + (1 - alpha) q)        SRKL = KL(q, alpha q + (1 - alpha) p)

averaged over the response tokens. The paper's alpha is the `skew` of `divergence`: SkewKL(0.1) for SKL,
SkewReverseKL(0.1) for SRKL; both are bounded by -log alpha. Its adaptive scheduler with off-policy replay
is `sampler` (fdiv.sample.replay), whose `start` is the first phi. p is the teacher, q the student.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.skew import SkewKL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Sampler
from fdiv.sample.replay import AdaptiveReplay


@dataclass(frozen=True)
class DistiLLM:
    """GKD's loss, whose divergence is skewed and whose text comes from an adaptive sampler.

    divergence: the paper's SKL or SRKL; any other is taken too, and compared on the same text.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: Divergence = field(default_factory=lambda: SkewKL(0.1))
    estimator: Estimator = field(default_factory=Exact)
    sampler: Sampler = field(default_factory=AdaptiveReplay)

    def __post_init__(self):
        GKD(self.divergence, self.estimator)  # refuses what it cannot train
        if not isinstance(self.sampler, Sampler):
            raise TypeError(
                f"a sampler says who writes the responses, got {self.sampler!r}; write AdaptiveReplay(), "
                "Mix(lmbda) or Offline()"
            )

    def __call__(
        self, *, mask: Tensor | None = None, count: Tensor | float | None = None, **evidence: Tensor
    ) -> Out:
        """The tensors that `estimator.evidence` names; mask and count as GKD's."""
        return GKD(self.divergence, self.estimator)(mask=mask, count=count, **evidence)
