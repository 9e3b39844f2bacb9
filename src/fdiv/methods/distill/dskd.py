"""DSKD: distillation in both models' spaces, each seen through the other's head.

Zhang, Zhang, Sun, Chen and Xu, "Dual-Space Knowledge Distillation for Large Language Models", arXiv
2406.17328.

With h and H the hidden states of student and teacher at their response tokens, W and V their heads:

    h' = A t2s(N(H) + N(E_target)),   A = softmax_j( query(e_i) . N(E_j) / sqrt(width of E) )
    H' = B s2t(h),                    B = softmax_i of the same scores
    L  = (1 - w) CE(y, W h)
         + w [ CE(y, sg(W) h') + 1{argmax W h' = y} D(sg softmax(W h' / tau), softmax(W h / tau))
               + KL(softmax(V H / tau), softmax(V H' / tau)) ]

e_i is the embeddings of the token before and of the label of student's row i, side by side, E_j the
teacher's; N divides by the standard deviation of all its entries in a sequence; sg stops the gradient. The
attention stays within a sequence. Without it (`attention=False`, one tokenizer) h' = t2s(H), H' = s2t(h), and
every row counts.
The authors' kd_rate is `weight`, their kd_temperature tau is `tau`, their KD objective D `divergence`.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fdiv._divergence import Divergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import KL
from fdiv.estimate._heads import Head, as_head
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Offline

STATES = ("q_hidden", "q_weight", "q_labels", "p_hidden", "p_weight", "p_labels", "projectors", "p_count")
ATTENDED = ("q_inputs", "q_embedding", "q_sequence", "p_inputs", "p_embedding", "p_sequence")


class DualSpace(nn.Module):
    """The projectors of DSKD, to be trained beside the student: t2s, s2t and the attention's query."""

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__()
        self.to_student = nn.Linear(teacher_width, student_width)
        self.to_teacher = nn.Linear(student_width, teacher_width)
        self.query = nn.Linear(2 * student_width, 2 * teacher_width)


@dataclass(frozen=True)
class DSKD:
    """Cross-entropy of student and projectors, D in the student's space and KL in the teacher's.

    weight: of all but the student's own cross-entropy. tau: divides all logits in D and KL.
    attention: whether tokens are aligned by attention, for two tokenizers; else row by row.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: Divergence = field(default_factory=KL)
    weight: float = 0.5
    tau: float = 2.0
    attention: bool = True
    sampler: Sampler = field(default_factory=Offline)

    def __post_init__(self):
        Exact().check(self.divergence)
        if not isinstance(self.sampler, Sampler):
            raise TypeError(f"a sampler says who writes, got {self.sampler!r}; write Offline() or Mix(lmbda)")
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight is in (0, 1], got {self.weight!r}; write SFT() for labels alone")
        if not self.tau > 0:
            raise ValueError(f"tau is a temperature > 0, got {self.tau!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        return STATES + ATTENDED if self.attention else STATES

    def __call__(
        self,
        *,
        q_hidden: Tensor,
        q_weight: Tensor | Head,
        q_labels: Tensor,
        p_hidden: Tensor,
        p_weight: Tensor | Head,
        p_labels: Tensor,
        projectors: DualSpace,
        count: Tensor | float | None = None,
        p_count: Tensor | float | None = None,
        **tokens: Tensor,
    ) -> Out:
        """Student's rows q_hidden [Rs, width], q_labels [Rs]; teacher's p_hidden [Rt, width'], p_labels [Rt].

        tokens, for the attention: q_inputs and q_sequence [Rs], the token before each and the number of its
        sequence, q_embedding [Vs, width], the table of input embeddings; and the teacher's, p_.
        count, p_count: the tokens of student and teacher in the global batch (default: here).
        """
        wanted = ATTENDED if self.attention else ()
        if tokens.keys() != set(wanted):
            raise TypeError(f"{self!r} also reads {', '.join(wanted) or 'nothing'}; got {', '.join(tokens)}")
        p_hidden = p_hidden.detach()
        if self.attention:
            to_student, to_teacher = _attended(projectors, q_hidden, q_labels, p_hidden, p_labels, **tokens)
        else:
            if not torch.equal(q_labels, p_labels):
                raise ValueError(
                    "without attention a row of the teacher's is the student's token itself, and the labels "
                    "differ; write DSKD(attention=True) for two tokenizers"
                )
            to_student, to_teacher = projectors.to_student(p_hidden), projectors.to_teacher(q_hidden)
        q_head, p_head = as_head(q_weight, "q_weight"), as_head(p_weight, "p_weight")
        student, projected = _logits(q_hidden, q_head), _logits(to_student, _frozen(q_head))
        teacher, reached = _logits(p_hidden, _frozen(p_head)), _logits(to_teacher, _frozen(p_head))
        right = projected.argmax(-1) == q_labels
        kept = right if self.attention else torch.ones_like(right)
        rows = {
            "cross_entropy": -_of(student, q_labels),
            "projected_cross_entropy": -_of(projected, q_labels),
            "student_space": self._soft(self.divergence, projected.detach()[kept], student[kept]),
            "teacher_space": self._soft(KL(), teacher, reached),
        }
        weights = dict.fromkeys(rows, self.weight) | {"cross_entropy": 1 - self.weight}
        here = dict.fromkeys(rows, len(q_labels)) | {"teacher_space": len(p_labels)}
        over = dict.fromkeys(rows, count) | {"teacher_space": p_count}
        over = {name: here[name] if number is None else number for name, number in over.items()}
        loss = torch.stack([weights[n] * mean_over_tokens(r, count=over[n]) for n, r in rows.items()]).sum()
        metrics = {n: mean_over_tokens(r.detach(), count=here[n]) for n, r in rows.items()}
        return Out(loss, metrics | {"projected_accuracy": mean_over_tokens(right.to(loss.dtype))})

    def _soft(self, divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Of logits, a row each."""
        return divergence((log_p / self.tau).log_softmax(-1), (log_q / self.tau).log_softmax(-1))


def _attended(
    projectors: DualSpace,
    q_hidden: Tensor,
    q_labels: Tensor,
    p_hidden: Tensor,
    p_labels: Tensor,
    *,
    q_inputs: Tensor,
    q_embedding: Tensor,
    q_sequence: Tensor,
    p_inputs: Tensor,
    p_embedding: Tensor,
    p_sequence: Tensor,
) -> tuple[Tensor, Tensor]:
    """(h' [Rs, width], H' [Rt, width'])."""
    query = torch.cat([q_embedding[q_inputs], q_embedding[q_labels]], -1).detach()
    target = p_embedding[p_labels].detach()
    key = _unit(torch.cat([p_embedding[p_inputs].detach(), target], -1), p_sequence)
    scores = projectors.query(query.to(key.dtype)) @ key.T / math.sqrt(key.shape[-1])
    apart = q_sequence.unsqueeze(1) != p_sequence
    if bool(apart.all(1).any()) or bool(apart.all(0).any()):
        raise ValueError("a sequence has tokens on one side only; leave it out of the micro-batch")
    scores = scores.masked_fill(apart, -math.inf)
    value = projectors.to_student(_unit(p_hidden, p_sequence) + _unit(target, p_sequence))
    return scores.softmax(1) @ value, scores.T.softmax(1) @ projectors.to_teacher(q_hidden.to(key.dtype))


def _unit(rows: Tensor, sequence: Tensor) -> Tensor:
    """Rows [R, width] over the standard deviation of all the numbers of their sequence."""
    (rows,) = in_working_precision(rows)
    entries = rows.shape[1] * sequence.bincount()
    mean = rows.new_zeros(len(entries)).index_add(0, sequence, rows.sum(1)) / entries
    squares = (rows - mean[sequence].unsqueeze(1)).square().sum(1)
    variance = rows.new_zeros(len(entries)).index_add(0, sequence, squares) / (entries - 1)
    return rows / variance.sqrt()[sequence].unsqueeze(1)


def _logits(hidden: Tensor, head: Head) -> Tensor:
    hidden, weight = in_working_precision(hidden, head.weight)
    bias = None if head.bias is None else head.bias.to(weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden, weight, bias) * head.scale
        if head.softcap:
            logits = head.softcap * (logits / head.softcap).tanh()
        return logits / head.temperature


def _frozen(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return head._replace(weight=head.weight.detach(), bias=bias)


def _of(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of each row's label."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
