"""OFA-KD: every stage of the student says what the teacher says, whatever either is built of.

Hao, Guo, Han, Tang, Hu, Wang and Xu, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in
Knowledge Distillation", arXiv 2310.19444.

    L = cross_entropy CE + weight l(q; gamma_0) + branch_weight sum_i l(q_i; gamma_i)
    l(q; gamma) = - sum_c w_c log q_c,   w_c = (p_c + 1_{c = y})^gamma - 1_{c = y}

p is the teacher, y the label, q the student and q_i what a branch on its stage i makes of it: features of
different architectures cannot be compared, predictions can. With the paper's gamma (`gamma`) above 1 the
target counts at least gamma times as much and the other classes less; gamma = 1 is w = p. w does not sum to
one: with W = sum w and v = w / W, l is W KL(v, q) up to what does not depend on q, and W D(v, q) is what
other divergences make of it.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._branches import branch, layout_of
from fdiv.methods.distill._classes import (
    cross_entropy,
    of_label,
    require_finite,
    require_temperature,
    require_weights,
    tempered,
)

LAYOUTS = ("auto", "channels", "tokens")


@dataclass(frozen=True)
class OFA:
    """Cross-entropy, and the divergence from the enhanced teacher, of the student and of each branch.

    stages: the numbers of the stages that get a branch; None are all but the last, which the student's own
    head reads. gamma: one for all, or one for each branch and then the student's. layout of stages [a, b]:
    [channels, places] or [tokens, width]; "auto" knows it by the width of the features.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "p_logits", "stages", "module")

    divergence: FDivergence = field(default_factory=KL)
    gamma: float | tuple[float, ...] = 1.5
    stages: tuple[int, ...] | None = None
    weight: float = 1.0
    branch_weight: float = 1.0
    temperature: float = 1.0
    cross_entropy: float = 1.0
    layout: Literal["auto", "channels", "tokens"] = "auto"

    def __post_init__(self):
        require_f_divergence(self.divergence, "OFA")
        require_temperature(self.temperature)
        require_weights(
            weight=self.weight, branch_weight=self.branch_weight, cross_entropy=self.cross_entropy
        )
        if not all(1 <= gamma < math.inf for gamma in self._gammas()):
            raise ValueError(f"gamma is an exponent >= 1, got {self.gamma!r}; 1 leaves the teacher as it is")
        if self.stages is not None:
            self._check_gammas(len(self.stages))
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is one of {', '.join(map(repr, LAYOUTS))}, got {self.layout!r}")

    def module(self, shapes: Any) -> nn.ModuleDict:
        """A branch for each chosen stage, by its number, from its output to `shapes.classes` logits."""
        numbers = self._chosen(len(shapes.stages))
        self._check_gammas(len(numbers))
        layout = layout_of(shapes) if self.layout == "auto" else self.layout
        return nn.ModuleDict({str(n): branch(shapes, n, layout) for n in numbers})

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        p_logits: Tensor,
        stages: list[Tensor],
        module: nn.ModuleDict,
        count: Tensor | float | None = None,
    ) -> Out:
        """logits, p_logits [B, C] of the student and the teacher; labels [B]; stages: the student's outputs.

        module: what `module` made of their shapes. count: examples of the global batch.
        """
        log_p = tempered(p_logits.detach(), self.temperature)
        exits = [branch(stages[int(n)]) for n, branch in module.items()]
        rows = [
            self.rows(log_p, tempered(scores, self.temperature), labels, gamma)
            for scores, gamma in zip([*exits, logits], self._gammas(len(exits) + 1), strict=True)
        ]
        labelled, final = cross_entropy(logits, labels), rows[-1]
        branches = sum(rows[:-1], start=torch.zeros_like(final))
        taught = self.temperature**2 * (self.weight * final + self.branch_weight * branches)
        loss = mean_over_tokens(self.cross_entropy * labelled + taught, count=count)
        terms = {"cross_entropy": labelled, "divergence": final, "branches": branches}
        return Out(loss, {name: mean_over_tokens(term.detach()) for name, term in terms.items()})

    def rows(self, log_p: Tensor, log_q: Tensor, labels: Tensor, gamma: float) -> Tensor:
        """W D(v, q) for the enhanced teacher W v, [B]."""
        log_weight = enhanced(log_p, labels, gamma)
        log_total = log_weight.logsumexp(-1, keepdim=True)
        value = self.divergence(log_weight - log_total, log_q)
        return require_finite(log_total.squeeze(-1).exp() * value, self.divergence)

    def _chosen(self, stages: int) -> list[int]:
        numbers = list(range(stages - 1)) if self.stages is None else list(self.stages)
        if not all(0 <= n < stages for n in numbers) or len(set(numbers)) < len(numbers):
            raise ValueError(f"stages are numbers from 0 to {stages - 1}, each once, got {self.stages!r}")
        return numbers

    def _check_gammas(self, branches: int) -> None:
        if isinstance(self.gamma, tuple) and len(self.gamma) != branches + 1:
            raise ValueError(
                f"{branches} stages have a branch: gamma is one number, or {branches + 1} of them with the "
                f"student's at the end, got {self.gamma!r}"
            )

    def _gammas(self, size: int = 1) -> tuple[float, ...]:
        return self.gamma if isinstance(self.gamma, tuple) else (self.gamma,) * size


def enhanced(log_p: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """log of (p_c + 1_{c = y})^gamma - 1_{c = y}, [B, C]."""
    log_target = of_label(log_p, labels)
    target = log_target.exp()
    # Small probabilities are multiplied by gamma; the quotient keeps those that underflow apart from 0.
    safe = torch.where(target > 0, target, 1.0)
    growth = torch.where(target > 0, torch.expm1(gamma * safe.log1p()) / safe, gamma)
    return (gamma * log_p).scatter(-1, labels.unsqueeze(-1), (log_target + growth.log()).unsqueeze(-1))
