"""ABKD: distillation under an alpha-beta divergence.

Wang, Yang, Wang, Wang, Xu and Huang, "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
Distillation via alpha-beta-Divergence", arXiv 2505.04560.

    L = < AlphaBeta(alpha, beta)(p, q) > over tokens

The paper's alpha is the exponent of the teacher and its beta that of the student, as in `AlphaBeta`; p is the
teacher and q the student. KL is (1, 0) and ReverseKL (0, 1). alpha says how much a large error counts, beta
how much a confident student's error does.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.alpha_beta import AlphaBeta
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out
from fdiv.methods.distill._writer import require_sampler
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Offline


@dataclass(frozen=True)
class ABKD:
    """The mean over response tokens of AlphaBeta(teacher, student): off-policy GKD under another divergence.

    AlphaBeta needs every atom of the vocabulary, hence Exact(); an f-divergence in its place may take any
    estimator of GKD.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: Divergence = field(default_factory=lambda: AlphaBeta(0.2, 0.7))
    estimator: Estimator = field(default_factory=Exact)
    sampler: Sampler = field(default_factory=Offline)

    def __post_init__(self):
        GKD(self.divergence, self.estimator)  # which refuses what it cannot train
        require_sampler(self.sampler)

    def __call__(
        self, *, mask: Tensor | None = None, count: Tensor | float | None = None, **evidence: Tensor
    ) -> Out:
        """`evidence`, `mask` and `count` as in GKD."""
        return GKD(self.divergence, self.estimator)(mask=mask, count=count, **evidence)
