"""DHKD: a second head learns the teacher's logits, so that the first need not.

Yang, Zong, Huang, Feng and An, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an
Auxiliary Head", arXiv 2411.08937.

    L = cross_entropy CE(labels, z) + weight tau^2 sum_c D( Bern(1/2), Bern(sigmoid((a_c - t_c) / tau)) )

z are the logits of the student's own head, a those of an auxiliary head on the same features, which is thrown
away after training; t are the teacher's. D = KL is the paper's BinaryKL-Norm, tau^2 times
log cosh((a_c - t_c) / (2 tau)) for every class; with compare="probabilities" it is its BinaryKL, of
Bern(sigmoid(a_c / tau)) from Bern(sigmoid(t_c / tau)). Neither knows of a softmax: the logits themselves are
matched, not their differences.

Gradient alignment (`align`): where the gradients g of the labels' term and h of the teacher's meet at an
obtuse angle, h is replaced by its part that is orthogonal to g,

    g + h - c g,   c = min(0, <h, g> / |g|^2)

which is the gradient of (1 - c) CE + teacher's term with c held fixed, and is computed like that.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._classes import (
    cross_entropy,
    require_finite,
    require_temperature,
    require_weights,
)

COMPARE = ("difference", "probabilities")


@dataclass(frozen=True)
class DHKD:
    """Cross-entropy of the student's head, and class by class the divergence of an auxiliary head's logits.

    hidden: units of the auxiliary head, or None for a linear one, as the paper has it on ImageNet.
    align: project conflicting gradients, over all parameters of the student; the batch is then kept whole.
    """

    consumes: ClassVar[Consumes] = "examples"

    divergence: FDivergence = field(default_factory=KL)
    weight: float = 1.0
    temperature: float = 2.0
    compare: Literal["difference", "probabilities"] = "difference"
    hidden: int | None = 200
    align: bool = True
    cross_entropy: float = 1.0

    def __post_init__(self):
        require_f_divergence(self.divergence, "DHKD, which compares coins,")
        require_weights(weight=self.weight, cross_entropy=self.cross_entropy)
        require_temperature(self.temperature)
        if self.compare not in COMPARE:
            raise ValueError(f"compare is one of {', '.join(map(repr, COMPARE))}, got {self.compare!r}")
        if self.hidden is not None and not (isinstance(self.hidden, int) and self.hidden >= 1):
            raise ValueError(f"hidden is a number of units, or None for a linear head, got {self.hidden!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        names = ("logits", "labels", "p_logits", "features", "module")
        return (*names, "network") if self.align else names

    @property
    def unit(self) -> Literal["batch", "example"]:
        return "batch" if self.align else "example"

    def module(self, shapes: Any) -> nn.Module:
        """The auxiliary head, from features of `shapes.width` to `shapes.classes` logits."""
        if self.hidden is None:
            return nn.Linear(shapes.width, shapes.classes)
        return nn.Sequential(
            nn.Linear(shapes.width, self.hidden),
            nn.Dropout(0.1),
            nn.BatchNorm1d(self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, shapes.classes),
        )

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        p_logits: Tensor,
        features: Tensor,
        module: nn.Module,
        network: nn.Module | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """logits, p_logits [B, C]; labels [B]; features [B, width], which `module` reads.

        network: the student, whose parameters' gradients are aligned. count: examples of the global batch.
        """
        if self.align and network is None:
            raise TypeError(
                "align=True compares gradients of the student: pass network=, or write align=False"
            )
        labelled, taught = cross_entropy(logits, labels), self.rows(p_logits.detach(), module(features))
        hard = self.cross_entropy * mean_over_tokens(labelled, count=count)
        soft = self.weight * self.temperature**2 * mean_over_tokens(taught, count=count)
        metrics = {
            "cross_entropy": mean_over_tokens(labelled.detach()),
            "divergence": mean_over_tokens(taught.detach()),
        }
        loss = hard + soft
        if self.align and network is not None and torch.is_grad_enabled():
            cosine, correction = alignment(hard, soft, network.parameters())
            loss = loss + correction * (hard - hard.detach())  # a gradient alone
            metrics |= {"cosine": cosine, "correction": correction}
        return Out(loss, metrics)

    def rows(self, p_logits: Tensor, logits: Tensor) -> Tensor:
        """The sum over classes of D between two coins, [B]."""
        p_logits, logits = (t / self.temperature for t in in_working_precision(p_logits, logits))
        if self.compare == "difference":
            p_logits, logits = torch.zeros_like(p_logits), logits - p_logits
        values = self.divergence(coins(p_logits), coins(logits)).sum(-1)
        return require_finite(values, self.divergence)


def coins(logits: Tensor) -> Tensor:
    """Log-probabilities of heads and tails, [...] -> [..., 2]."""
    return torch.stack([logsigmoid(logits), logsigmoid(-logits)], -1)


def alignment(hard: Tensor, soft: Tensor, parameters: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(the cosine of the two gradients, max(0, -<soft, hard> / |hard|^2)).

    The second is how much of `hard`'s gradient makes that of `soft` orthogonal to it. The graph is kept.
    """
    trained = [p for p in parameters if p.requires_grad]
    g, h = (_flat_gradient(loss, trained) for loss in (hard, soft))
    product, square = h @ g, g @ g
    cosine = product / (square.sqrt() * h.norm()).clamp(min=torch.finfo(g.dtype).tiny)
    share = torch.where(square > 0, -product / torch.where(square > 0, square, 1.0), 0.0)
    return cosine, share.clamp(min=0.0)


def _flat_gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
