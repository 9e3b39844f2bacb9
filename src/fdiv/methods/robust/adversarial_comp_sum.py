"""Smooth adversarial comp-sum losses: fit the labels, and keep score differences where they are in a ball.

Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", arXiv 2304.07288.

    L = mean of Phi( sum over y' != y of e^(-(h_y - h_y')/rho) ) + nu max over x' of |d(x', y) - d(x, y)|_2

h are the logits at x, d(x, y) = (h_y - h_y') over the classes y' != y, Phi that of `CompSum`, and x' is
where the attack may go; its epsilon is the paper's gamma. With nu >= sqrt(classes - 1)/rho the loss bounds
from above the worst comp-sum loss, in the ball, of margins min(1, (1 - d/rho)_+).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fdiv._divergence import FDivergence
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.robust.attacks import Attack, evaluated
from fdiv.methods.supervise._labels import of_label, scores_of
from fdiv.methods.supervise.comp_sum import CompSum, comp_sum


@dataclass(frozen=True)
class AdversarialCompSum:
    """A comp-sum loss of logits/rho, plus nu times how far the attack moves the score differences.

    attack: looks for x' with the network in eval mode; the term itself is taken in the mode of the training,
        with gradient through both of its scores. nu = 0 is `CompSum(tau)` at the temperature rho.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "inputs", "network")

    tau: float = 1.0
    rho: float = 1.0
    nu: float = 1.0
    attack: Attack = field(default_factory=Attack)

    def __post_init__(self):
        CompSum(self.tau)  # refuses what is no tau
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho is a margin, finite and > 0, got {self.rho!r}")
        if not 0 <= self.nu < math.inf:
            raise ValueError(f"nu is a finite weight >= 0, got {self.nu!r}")
        if self.attack.start == "none" and self.attack.epsilon:
            raise ValueError("a distance from x has no slope at x itself; write start='uniform' or 'normal'")

    @property
    def divergence(self) -> FDivergence:
        """That of the first term, see CompSum."""
        return CompSum(self.tau).divergence

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        inputs: Tensor,
        network: nn.Module,
        count: Tensor | float | None = None,
    ) -> Out:
        """logits [B, C] = network(inputs), labels [B], inputs [B, ...]; count: examples of the global batch.

        metrics: `moved`, the mean of the second term's norm.
        """
        scores = scores_of(logits, labels)
        rows = comp_sum(-of_label((scores / self.rho).log_softmax(-1), labels), self.tau)
        if not self.nu:
            return Out(mean_over_tokens(rows, count=count), {})
        with evaluated(network):
            still = network(inputs).detach()
            worst = self.attack(inputs, lambda x: shift(network(x) - still, labels))
        moved = shift(network(worst) - scores, labels)
        loss = mean_over_tokens(rows + self.nu * moved, count=count)
        return Out(loss, {"moved": mean_over_tokens(moved.detach())})


def shift(change: Tensor, labels: Tensor) -> Tensor:
    """|d(x', y) - d(x, y)|_2 from h(x') - h(x), [B, C] -> [B]; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(of_label(change, labels).unsqueeze(-1) - change, dim=-1)
