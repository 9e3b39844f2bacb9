"""SeqKD: maximum likelihood on what the teacher wrote.

Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv 1606.07947.

    L = - E_{y ~ teacher} log q(y|x) = KL(teacher, student) over whole responses + the teacher's entropy

so the divergence is KL by construction, of sequences where KD compares tokens. The paper puts the teacher's
mode, found by beam search, in place of the samples: `TeacherWritten(Decoding(temperature=0))` is the greedy
one, whose optimum is a point and no longer the teacher's distribution.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.sample.fixed import TeacherWritten


@dataclass(frozen=True)
class SeqKD:
    """Mean negative log-likelihood of the tokens of the teacher's own responses."""

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = ("log_q_label",)
    estimator: ClassVar[None] = None  # what the teacher thinks of each token is not asked

    divergence: Divergence = field(default_factory=KL)
    sampler: TeacherWritten = field(default_factory=TeacherWritten)

    def __post_init__(self):
        if self.divergence != KL():
            raise TypeError(
                f"the likelihood of the teacher's samples is KL(teacher, student), got {self.divergence!r}: "
                "for another divergence write GKD(divergence=...), which asks the teacher about each token"
            )
        if not isinstance(self.sampler, TeacherWritten):
            raise TypeError(
                f"SeqKD trains on the teacher's responses, got {self.sampler!r}: write TeacherWritten(), or "
                "SFT() for likelihood on other text"
            )

    def __call__(
        self, *, log_q_label: Tensor, mask: Tensor | None = None, count: Tensor | float | None = None
    ) -> Out:
        """log_q_label: the student's log-probability of each token that the teacher wrote, [rows]."""
        return Out(mean_over_tokens(-log_q_label, mask, count), {})
