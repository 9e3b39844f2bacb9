"""DIST: a student whose scores go with the teacher's, class by class and example by example.

Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher", arXiv 2205.10536.

    L = cross_entropy CE + beta (1 - mean_b rho(q_b, p_b)) + gamma (1 - mean_c rho(q_c, p_c))

rho is Pearson's correlation, of an example's probabilities over the classes (`beta`, the paper's inter-class
relation) and of a class's probabilities over the batch (`gamma`, its intra-class relation); p is the teacher
and q the student at the temperature tau. Each row may be stretched and shifted at no price.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.linalg import vector_norm

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._classes import cross_entropy, require_temperature, require_weights, tempered


@dataclass(frozen=True)
class DIST:
    """Cross-entropy, and one minus the two correlations of the teacher's probabilities and the student's.

    eps: added to the product of the two lengths. What varies less than that counts as constant: it correlates
    with nothing, costs 1 and has no gradient; so does every class in a batch of one example.
    rho has no units, so that tau^2 is not called for: for large tau it is the correlation of the logits.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "p_logits")
    unit: ClassVar[Literal["batch"]] = "batch"
    divergence: ClassVar[Divergence] = KL()  # from the labels; from the teacher there is a correlation

    beta: float = 2.0
    gamma: float = 2.0
    temperature: float = 1.0
    cross_entropy: float = 1.0
    eps: float = 1e-8

    def __post_init__(self):
        require_weights(beta=self.beta, gamma=self.gamma, cross_entropy=self.cross_entropy)
        require_temperature(self.temperature)
        if not self.beta + self.gamma > 0:
            raise ValueError("beta=0 and gamma=0 leave the teacher out; write SFT() for labels alone")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps keeps the correlation of a constant from 0/0, > 0, got {self.eps!r}")

    def __call__(
        self, *, logits: Tensor, labels: Tensor, p_logits: Tensor, count: Tensor | float | None = None
    ) -> Out:
        """logits, p_logits [B, C] of the student and the teacher, of the whole batch; labels [B].

        count: the examples of the global batch, which are these.
        """
        p, q = (tempered(t, self.temperature).exp() for t in (p_logits.detach(), logits))
        labelled = mean_over_tokens(cross_entropy(logits, labels), count=count)
        inter, intra = (1 - mean_over_tokens(correlation(p, q, dim, self.eps)) for dim in (1, 0))
        loss = self.cross_entropy * labelled + self.beta * inter + self.gamma * intra
        metrics = {"cross_entropy": labelled, "inter": inter, "intra": intra}
        return Out(loss, {name: value.detach() for name, value in metrics.items()})


def correlation(x: Tensor, y: Tensor, dim: int, eps: float) -> Tensor:
    """Pearson's, along `dim`: <x, y> / (|x| |y| + eps) of what is left when the means are taken off."""
    x, y = (t - t.mean(dim, keepdim=True) for t in (x, y))
    return (x * y).sum(dim) / (vector_norm(x, dim=dim) * vector_norm(y, dim=dim) + eps)
