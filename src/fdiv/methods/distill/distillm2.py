"""DistiLLM-2: skewed KL on the teacher's answers and skewed reverse KL on the student's, to the same prompts.

Ko, Chen, Kim, Ding, Liang, Zharkov and Yun, "DistiLLM-2: A Contrastive Approach Boosts the Distillation of
LLMs", arXiv 2503.07067. With y_t the teacher's answer to a prompt, y_s the student's, B the prompts of a
batch, and the mean of a divergence over the tokens of an answer taken first:

    L = 1/(2|B|) sum [ (2 - b) KL(p, a_t p + (1 - a_t) q)(y_t) + b KL(q, a_s q + (1 - a_s) p)(y_s) ]

b grows from `beta` by `growth` over the first half of training. The paper weighs by 1 - beta and beta, so its
beta is b/2 and its loss half of this one; the authors' code weighs as here and divides by |B|.

Each answer has its own skew. log(p / (a p + (1 - a) q)) is about (1 - a)(p - q), and the product is kept at
(1 - a0) m, where m is the gap p(y) - q(y) that answers of its kind had at first:

    paper   a = 1 - (1 - a0) m / gap
    code    a = clip(1 - (1 - a0) m / (gap + 1e-5), 0.01, a0), so that a only falls

p(y) and q(y) are exp of the mean log-probability of a token; for y_s gap and m are q(y) - p(y). The paper's
alpha_0 is the skew of `divergence`.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import Divergence, FDivergence, Sum
from fdiv._math import bregman_exp, in_working_precision, log_mixture
from fdiv.divergences.skew import SkewKL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_sequences, mean_over_tokens
from fdiv.sample.fixed import Both

LEAST = 0.01  # the code's least skew


@dataclass(frozen=True)
class DistiLLM2:
    """Pulls the student to what the teacher says, pushes it from what only the student says.

    divergence: SkewKL(a0), or w * SkewKL(a0); the student's answers are judged under its reverse.
    curriculum: how an answer's skew follows its gap, by the "code" or the "paper", or "none": always a0.
    The paper's formula is cut to [0.01, 0.99], and has no solution where gap and m differ in sign: a0.
    reference_steps: m is the mean over so many first steps, whose skew is a0.
    detach_mixture: no gradient through the student's part of its own mixture, as in the authors' code.
    """

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = (
        "by_student", "sequence", "sequences", "log_p_label", "log_q_label", "progress", "state",
    )  # fmt: skip
    estimator: ClassVar[Estimator] = Exact()  # others take one divergence for all rows

    divergence: Divergence = field(default_factory=lambda: SkewKL(0.1))
    sampler: Both = field(default_factory=Both)
    curriculum: Literal["code", "paper", "none"] = "code"
    reference_steps: int = 100
    beta: float = 1.0
    growth: float = 0.5
    detach_mixture: bool = False

    def __post_init__(self):
        skew, _ = _skew_and_weight(self.divergence)
        if self.curriculum not in ("code", "paper", "none"):
            raise ValueError(f"curriculum is 'code', 'paper' or 'none', got {self.curriculum!r}")
        if self.curriculum != "none" and not LEAST <= skew <= 1 - LEAST:
            raise ValueError(f"the curriculum keeps a skew in [0.01, 0.99], got {self.divergence!r}")
        if self.reference_steps < 1:
            raise ValueError(f"reference_steps is a number of steps >= 1, got {self.reference_steps!r}")
        if not 0 <= self.beta <= self.beta + self.growth <= 2:
            raise ValueError(
                "the answers of teacher and student weigh 2 - b and b, b from beta to beta + growth within "
                f"[0, 2]; got beta {self.beta!r} and growth {self.growth!r}"
            )
        if not isinstance(self.sampler, Both):
            raise TypeError(f"DistiLLM2 needs two answers to a prompt, write Both(), got {self.sampler!r}")

    def __call__(
        self,
        *,
        log_p: Tensor,
        log_q: Tensor,
        by_student: Tensor,
        sequence: Tensor,
        log_p_label: Tensor,
        log_q_label: Tensor,
        progress: float,
        state: dict[str, float],
        sequences: Tensor | float | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """log_p, log_q [rows, vocab], the others [rows]; a sequence is in one micro-batch as a whole.

        sequences, count: sequences and tokens of the global batch (default: here). metrics: `skew`, and the
        mean gaps; their means over micro-batches, weighted by tokens, are those of the global batch.
        """
        with torch.no_grad():
            gap, of_student = _gaps(log_p_label, log_q_label, sequence, by_student)
            skew = self._skews(gap, of_student, state)[sequence]
        rows = self._rows(log_p, log_q, by_student, skew)
        b = self.beta + self.growth * min(1.0, 2 * progress)
        rows = torch.where(by_student, b * rows, (2 - b) * rows)
        loss = mean_over_sequences(rows, sequence, sequences)
        share = 1.0 if count is None else len(rows) / float(count)
        half = float(len(sequence.unique()) if sequences is None else sequences) / 2  # Both() halves a batch
        teacher, student = (torch.where(kind, gap, 0.0).sum() for kind in (~of_student, of_student))
        gaps = {"teacher_gap": teacher, "student_gap": student}
        numbers = {"skew": mean_over_tokens(skew)} | {n: g / (share * half or 1.0) for n, g in gaps.items()}
        return Out(loss, numbers)

    def _rows(self, log_p: Tensor, log_q: Tensor, by_student: Tensor, skew: Tensor) -> Tensor:
        """The teacher's rows under SkewKL and the student's under its reverse, p and q changing places."""
        _, weight = _skew_and_weight(self.divergence)
        swap = by_student.unsqueeze(-1)
        first, second = torch.where(swap, log_q, log_p), torch.where(swap, log_p, log_q)
        return weight * RowwiseSkewKL(skew.unsqueeze(-1), self.detach_mixture)(first, second)

    def _skews(self, gap: Tensor, of_student: Tensor, state: dict[str, float]) -> Tensor:
        start, _ = _skew_and_weight(self.divergence)
        if self.curriculum == "none" or state["gap_steps"] < self.reference_steps:
            return torch.full_like(gap, start)
        teacher, student = (gap.new_tensor(state[f"{who}_gap"]) for who in ("teacher", "student"))
        reference = torch.where(of_student, student, teacher)
        if self.curriculum == "code":
            return (1 - (1 - start) * reference / (gap + 1e-5)).clip(LEAST, start)
        skew = (1 - (1 - start) * reference / gap).clip(LEAST, 1 - LEAST)
        return torch.where(gap * reference > 0, skew, start)

    def initial_state(self) -> dict[str, float]:
        return {"teacher_gap": 0.0, "student_gap": 0.0, "gap_steps": 0.0}

    def advance(
        self, state: dict[str, float], metrics: dict[str, float], progress: float
    ) -> dict[str, float]:
        """The running means of the gaps, fixed after `reference_steps`."""
        if state["gap_steps"] >= self.reference_steps:
            return state
        steps = state["gap_steps"] + 1
        means = {n: state[n] + (metrics[n] - state[n]) / steps for n in ("teacher_gap", "student_gap")}
        return state | means | {"gap_steps": steps}


@dataclass(frozen=True, eq=False)
class RowwiseSkewKL(FDivergence):
    """SkewKL with a skew for each row, [rows, 1]; `detach`: p is a constant in the mixture."""

    skew: Tensor
    detach: bool

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        in_mixture = log_p.detach() if self.detach else log_p
        # An even mixture of the masses 2 skew p and 2 (1 - skew) q, for log_mixture's weight is one number.
        p_part, q_part = in_mixture + (2 * self.skew).log(), log_q + (2 - 2 * self.skew).log()
        return bregman_exp(log_mixture(p_part, q_part, 0.5), log_p)


def _gaps(
    log_p_label: Tensor, log_q_label: Tensor, sequence: Tensor, by_student: Tensor
) -> tuple[Tensor, Tensor]:
    """(how much likelier each sequence is to its writer than to the other, whether the student wrote it)."""
    log_p_label, log_q_label = in_working_precision(log_p_label, log_q_label)
    lengths = sequence.bincount()
    of_student = torch.zeros_like(lengths, dtype=torch.bool).index_put((sequence,), by_student)

    def likelihood(rows: Tensor) -> Tensor:
        total = rows.new_zeros(len(lengths)).index_add(0, sequence, rows)
        return (total / lengths.clamp(min=1)).exp()

    gap = likelihood(log_p_label) - likelihood(log_q_label)
    return torch.where(of_student, -gap, gap), of_student


def _skew_and_weight(divergence: object) -> tuple[float, float]:
    match divergence:
        case SkewKL():
            return divergence.skew, 1.0
        case Sum(terms=((weight, SkewKL() as skewed),)):
            return skewed.skew, weight
    raise TypeError(
        f"DistiLLM2 moves the skew of a SkewKL answer by answer, got {divergence!r}; write SkewKL(0.1), or "
        "GKD(divergence=..., lmbda=...) for another divergence"
    )
