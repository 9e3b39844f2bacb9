"""PLD: the student chooses class after class in the teacher's order, the label first.

Bassam, Zhu and Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", arXiv 2506.12542.

    L = sum_k w_k [ log sum over l >= k of e^{z_l} - z_k ],   w = softmax(teacher's logits / tau)

Classes are numbered by their rank: the label, then the others by the teacher's logits, descending. z are the
student's logits, the bracket is the surprise of choosing class k out of those that are left
(Plackett and Luce), and w_k belongs to the class at rank k. All the weight on the label is cross-entropy,
equal weights are ListMLE over C. Nothing else is added, and there is nothing to mix.

The bracket is KL of the certain choice k from the student's (q_k, 1 - q_k); another divergence may take its
place where its f(0) is finite.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._classes import require_finite, require_temperature, tempered


@dataclass(frozen=True)
class PLD:
    """The teacher-weighted surprise at its own ranking, under KL() convex in the logits.

    temperature: the teacher's alone; the paper takes 1 on ImageNet, 4 on CIFAR. Classes that the teacher ties
    keep their order. Where it gives the label little, the label's term counts little: see `label_weight`.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "p_logits")

    divergence: FDivergence = field(default_factory=KL)
    temperature: float = 1.0

    def __post_init__(self):
        require_f_divergence(self.divergence, "PLD, which compares a choice with its probability,")
        require_temperature(self.temperature)
        if self.divergence.f_at_zero == math.inf:
            raise TypeError(
                f"{self.divergence!r} is infinite wherever the student leaves another choice possible; write "
                "KL(), or a divergence with a finite f(0), such as JS(0.5)"
            )

    def __call__(
        self, *, logits: Tensor, labels: Tensor, p_logits: Tensor, count: Tensor | float | None = None
    ) -> Out:
        """logits, p_logits [B, C] of the student and the teacher; labels [B]; count: of the global batch."""
        order = ranking(p_logits.detach(), labels)
        weight = tempered(p_logits.detach(), self.temperature).exp().gather(-1, order)
        (scores,) = in_working_precision(logits)
        surprise = self.surprise(scores.gather(-1, order))
        # A class that the teacher excludes costs nothing, even if the student excludes it as well.
        rows = torch.where(weight > 0, weight * surprise, 0.0).sum(-1)
        first = {"label_surprise": surprise[:, 0], "label_weight": weight[:, 0]}
        means = {name: mean_over_tokens(term.detach()) for name, term in first.items()}
        return Out(mean_over_tokens(require_finite(rows, self.divergence), count=count), means)

    def surprise(self, scores: Tensor) -> Tensor:
        """D of each choice, which is certain, from its probability among those that are left, [B, C].

        scores: the student's, in the order of the ranking.
        """
        left = scores.flip(-1).logcumsumexp(-1).flip(-1)  # of this choice and all later ones
        later = torch.nn.functional.pad(left[:, 1:], (0, 1), value=-math.inf)
        log_q = torch.stack([scores - left, later - left], -1)
        certain = log_q.new_tensor([0.0, -math.inf])
        return self.divergence(certain.expand_as(log_q), log_q)


def ranking(p_logits: Tensor, labels: Tensor) -> Tensor:
    """The classes [B, C] from first to last: the label, then the others by the teacher's logits."""
    label = torch.nn.functional.one_hot(labels, p_logits.shape[-1])
    descending = p_logits.argsort(dim=-1, descending=True, stable=True)
    # A second stable sort brings the label to the front of an order that it leaves alone.
    is_label = label.gather(-1, descending)
    return descending.gather(-1, is_label.argsort(dim=-1, descending=True, stable=True))
