"""f-DISTILL: an f-divergence between whole sequences, as a sum over the steps of both models' text.

Wen, Li, Du and Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", arXiv 2307.15190.
With P, Q over sequences and p_t, q_t over the next token, m_t = beta p_t + (1 - beta) q_t:

    KL(P, Q)     = sum_t E_{y ~ P} KL(p_t, q_t)           ReverseKL(P, Q) = sum_t E_{y ~ Q} KL(q_t, p_t)
    JS(P, Q)    <= sum_t beta E_{y ~ P} KL(p_t, m_t) + (1 - beta) E_{y ~ Q} KL(q_t, m_t)
    TV(P, Q)    <= sum_t 1/2 E_{y ~ P} TV(p_t, q_t) + 1/2 E_{y ~ Q} TV(p_t, q_t)

That is mixture="half", the paper's at beta = 1/2. mixture="posterior" is ours, and an equation for every f:
with g(p, q) = q f(p/q), and w the chance that the text before t is the teacher's when either wrote it,

    D(P, Q) = sum_t E_{y ~ (P + Q)/2} 2 [ sum_v g(w p_t, (1 - w) q_t) - g(w, 1 - w) ],
    w = P(y_<t) / (P(y_<t) + Q(y_<t))

since g is homogeneous and its sums over all prefixes telescope; for JS it mixes p_t and q_t by w. No gradient
flows through sampling or w. P is the teacher and Q the student.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from fdiv._divergence import FDivergence, Sum, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.jeffreys import Jeffreys
from fdiv.divergences.js import JS
from fdiv.divergences.kl import KL, ReverseKL
from fdiv.divergences.skew import SkewKL, SkewReverseKL
from fdiv.divergences.tv import TV
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, earlier, mean_over_tokens, named
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Both


@dataclass(frozen=True)
class SequenceFDistill:
    """The divergence between sequences, a mean over them, from as many of the teacher's as of the student's.

    mixture: "half" for KL, ReverseKL, Jeffreys, JS(beta), TV and weighted sums of these; "posterior" for
    every f-divergence, with Exact(). On long text w is nearly 0 or 1 and a bounded divergence near its bound:
    that is the truth about sequences, and a weak signal.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: FDivergence = field(default_factory=JS)
    estimator: Estimator = field(default_factory=Exact)
    sampler: Sampler = field(default_factory=Both)
    mixture: Literal["half", "posterior"] = "half"

    def __post_init__(self):
        require_f_divergence(self.divergence, "SequenceFDistill")
        if not isinstance(self.sampler, Both):
            raise TypeError(
                f"SequenceFDistill takes half of its sequences from the teacher and half from the student, "
                f"got {self.sampler!r}; write Both()"
            )
        if self.mixture == "half":
            for term in filter(None, by_writer(self.divergence)):
                GKD(term, self.estimator)  # which refuses what cannot be estimated
        elif self.mixture != "posterior":
            raise ValueError(f"mixture is 'half' or 'posterior', got {self.mixture!r}")
        elif self.estimator != Exact():
            raise TypeError(f"mixture='posterior' weighs whole rows, got {self.estimator!r}; write Exact()")

    @property
    def reads(self) -> tuple[str, ...]:
        prefix = ("log_p_label", "log_q_label") if self.mixture == "posterior" else ()
        return ("by_student", "sequence", "sequences", *prefix)

    def __call__(
        self,
        *,
        by_student: Tensor,
        sequence: Tensor,
        sequences: Tensor | float | None = None,
        count: Tensor | float | None = None,
        **evidence: Tensor,
    ) -> Out:
        """by_student, sequence [R]; `sequences` of the global batch, half of them the student's.

        `evidence`: what the estimator names; for "posterior" also log_p_label and log_q_label [R].
        `count` divides nothing here; it only asks for `sequences`, as micro-batches do.
        """
        if sequences is None:
            if count is not None:
                raise TypeError("SequenceFDistill is a mean over sequences: beside count= give sequences=")
            sequences = int((sequence.bincount() > 0).sum())
        if self.mixture == "posterior":
            return self._posterior(sequence, sequences, evidence)
        sides = zip(by_writer(self.divergence), (~by_student, by_student), strict=True)
        losses = [
            GKD(term, self.estimator)(mask=rows, count=sequences, **evidence).loss
            for term, rows in sides
            if term is not None
        ]
        return Out(2 * sum(losses[1:], start=losses[0]), {})  # 2: either wrote half of the sequences

    def _posterior(self, sequence: Tensor, sequences: Tensor | float, evidence: dict[str, Tensor]) -> Out:
        names = (*self.estimator.evidence, "log_p_label", "log_q_label")
        log_p, log_q, p_label, q_label = in_working_precision(*named(evidence, names))
        odds = earlier((p_label - q_label).detach(), sequence)  # log P(y_<t) - log Q(y_<t)
        log_w, log_rest = logsigmoid(odds), logsigmoid(-odds)
        joint = self.estimator(self.divergence, log_p + log_w[:, None], log_q + log_rest[:, None])
        rows = 2 * (joint - self.divergence.perspective(log_w, log_rest))
        told_apart = mean_over_tokens((odds / 2).tanh().abs())
        return Out(mean_over_tokens(rows, count=sequences), {"told_apart": told_apart})


def by_writer(divergence: FDivergence) -> tuple[FDivergence | None, FDivergence | None]:
    """What is summed over the steps of the teacher's text, and of the student's."""
    match divergence:
        case KL():
            return divergence, None
        case ReverseKL():
            return None, divergence
        case Jeffreys():
            return KL(), ReverseKL()
        case JS(beta):
            return beta * SkewKL(beta), (1 - beta) * SkewReverseKL(1 - beta)
        case TV():
            return 0.5 * divergence, 0.5 * divergence
        case Sum(terms):
            pairs = [(weight, by_writer(term)) for weight, term in terms]
            return _total([(w, a) for w, (a, _) in pairs]), _total([(w, b) for w, (_, b) in pairs])
    raise TypeError(
        f"mixture='half' has no sum over steps for {divergence!r}, only for KL, ReverseKL, Jeffreys, JS, TV "
        "and weighted sums of these; write mixture='posterior', which is exact for every f-divergence"
    )


def _total(pairs: list[tuple[float, FDivergence | None]]) -> FDivergence | None:
    terms = [weight * term for weight, term in pairs if term is not None]
    return sum(terms[1:], start=terms[0]) if terms else None
