"""BD-KD for classifiers: two networks learn from the labels and from each other.

Amara, Sepahvand, Meyer, Gross and Clark, "BD-KD: Balancing the Divergences for Online Knowledge
Distillation", arXiv 2212.12965; Zhang, Xiang, Hospedales and Lu, "Deep Mutual Learning", arXiv 1706.00384.

    student:  CE(y, q) + share tau^2 [ w_F D(p, q) + w_R D'(p, q) ],  p fixed
    teacher:  CE(y, p) + share tau^2 D''(p, q),                       q fixed
    w_F = weight where H(p) > H(q), else 1;   w_R = weight where H(q) > H(p), else 1

p is the teacher and q the student at the temperature tau. D is `divergence`, D' `sharpening` and D''
`of_teacher`. BD-KD has D = KL and D' = D'' = ReverseKL: the student is spread where it is too sure and
sharpened where it is not sure enough; the teacher is asked to keep some mass where the student has it. DML
has D = KL, D'' = ReverseKL and no D': each minimises KL from the other. BD-KD's own weights are not public;
these are those that ABKD and AMiD compare with.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import KL, ReverseKL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._classes import (
    cross_entropy,
    require_finite,
    require_temperature,
    require_weights,
    tempered,
)
from fdiv.methods.distill.bdkd import surplus_certainty


@dataclass(frozen=True)
class MutualKD:
    """The student's loss and, if `online`, the teacher's, which share no gradient.

    All three divergences are of (teacher, student). divergence, sharpening: what the student minimises, the
    one that is needed more `weight` times; sharpening=None leaves the second out. of_teacher: what the
    teacher minimises. online: whether it does; else it stays as it is.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "p_logits")

    divergence: FDivergence = field(default_factory=KL)
    sharpening: FDivergence | None = field(default_factory=ReverseKL)
    of_teacher: FDivergence = field(default_factory=ReverseKL)
    weight: float = 2.0
    share: float = 1.0
    temperature: float = 1.0
    online: bool = True

    def __post_init__(self):
        for divergence in (self.divergence, self.sharpening, self.of_teacher):
            if divergence is not None:
                require_f_divergence(divergence, "MutualKD")
        require_temperature(self.temperature)
        require_weights(share=self.share)
        if not 1 <= self.weight < math.inf:
            raise ValueError(
                f"weight is the factor >= 1 of the divergence that is needed more, got {self.weight!r}; "
                "1 is the plain sum of both"
            )
        if self.sharpening is None and self.weight != 1:
            raise ValueError(
                f"weight={self.weight!r} weighs two divergences against each other; without `sharpening` "
                "write weight=1.0"
            )

    @classmethod
    def dml(cls, divergence: FDivergence | None = None, temperature: float = 1.0) -> "MutualKD":
        """Deep mutual learning: each network minimises one divergence from the other, the paper's KL()."""
        divergence = divergence or KL()
        return cls(divergence, None, divergence.reverse, weight=1.0, temperature=temperature)

    @property
    def teaches(self) -> Literal["both", "student"]:
        return "both" if self.online else "student"

    def __call__(
        self, *, logits: Tensor, labels: Tensor, p_logits: Tensor, count: Tensor | float | None = None
    ) -> Out:
        """logits, p_logits [B, C] of the student and the teacher, each with its gradient; labels [B].

        count: examples of the global batch.
        """
        log_p, log_q = (tempered(t, self.temperature) for t in (p_logits, logits))
        surer = surplus_certainty(log_p, log_q)
        taught = self.student(log_p.detach(), log_q, surer)
        labelled = cross_entropy(logits, labels)
        scale = self.share * self.temperature**2
        rows = labelled + scale * taught
        terms = {"cross_entropy": labelled, "divergence": taught, "student_surer": (surer > 0).to(rows)}
        if self.online:
            learnt = require_finite(self.of_teacher(log_p, log_q.detach()), self.of_teacher)
            teachers = cross_entropy(p_logits, labels)
            rows = rows + teachers + scale * learnt
            terms |= {"teacher_cross_entropy": teachers, "teacher_divergence": learnt}
        loss = mean_over_tokens(rows, count=count)
        return Out(loss, {name: mean_over_tokens(term.detach()) for name, term in terms.items()})

    def student(self, log_p: Tensor, log_q: Tensor, surer: Tensor) -> Tensor:
        """w_F D(p, q) + w_R D'(p, q), [B]; surer: H(p) - H(q)."""
        covering, sharpening = (1 + (self.weight - 1) * side for side in (surer > 0, surer < 0))
        rows = covering * require_finite(self.divergence(log_p, log_q), self.divergence)
        if self.sharpening is None:
            return rows
        return rows + sharpening * require_finite(self.sharpening(log_p, log_q), self.sharpening)
