"""Discriminative f-divergence classification: a critic for each class, and the shifted log.

Novello and Tonello, "f-Divergence Based Classification: Beyond the Use of Cross-Entropy", arXiv 2401.01268.

    L = E[ -f'(r_y) + sum over classes k of u f*(f'(r_k)) ] = -E[ phi(z_y) + u sum_k psi(z_k) ],   z = log r

At the optimum r_k = p(k|x) / u and -L = D(p(.|x), u), each class having the reference mass u. The paper's D
is a function of r, another for each f; its class-wise discriminator is the head, its alpha `weight`, u =
weight / K for K classes (the authors' means over classes). With u = 1, weight = K, r is the posterior itself.

    shifted log       SkewReverseKL(0.5), KL(q, (p + q)/2)    D = 1/(1 + r)
    KL                KL()                                    D = r
    reverse KL        ReverseKL()                             D = 1/r
    Hellinger         SquaredHellinger()                      D = r^(-1/2)
    Pearson           Pearson()                               D = r
    GAN               2 * JS(0.5)                             D = 1/(1 + r)

The paper's f need not have f'(1) = 0, which moves L by a constant. The shifted log is f(u) = -log(1 + u) +
log 2; with (u - 1)/2 added it is the f of KL(q, (p + q)/2).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.skew import SkewReverseKL
from fdiv.methods._method import Consumes, Out, mean_over_tokens


def log_softplus(v: Tensor) -> Tensor:
    """log softplus(v), which is about v where e^v would vanish."""
    t = v.clamp(max=-10.0).exp()  # below -10 by the series of log(log(1 + t)/t)
    below = v - t / 2 + 5 * t**2 / 24 - t**3 / 8
    return torch.where(v < -10, below, (-logsigmoid(-v.clamp(min=-10.0))).log())


HEADS: dict[str, Callable[[Tensor], Tensor]] = {  # from scores to log-ratios
    "log-ratio": lambda v: v,
    "softplus": log_softplus,
    "sigmoid": lambda v: -v,
    "inverse softplus": lambda v: -log_softplus(v),
}


@dataclass(frozen=True)
class Discriminative:
    """-phi(z_y) - (weight / K) sum_k psi(z_k), averaged over examples; z [B, K] are log-ratios.

    weight: the reference's mass. The authors' code has 0.8 for the shifted log.
    head: what the network's scores v are. "log-ratio", z itself; "softplus", softplus(v) = r, the authors'
        for KL; "sigmoid", sigmoid(v) = 1/(1 + r), theirs for the shifted log and the GAN, or "inverse
        softplus", softplus(v) = 1/r, for reverse KL: under these two the class has the *smallest* score.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels")

    divergence: FDivergence = field(default_factory=lambda: SkewReverseKL(0.5))
    weight: float = 1.0
    head: Literal["log-ratio", "softplus", "sigmoid", "inverse softplus"] = "log-ratio"

    def __post_init__(self):
        require_f_divergence(self.divergence, "Discriminative")
        if not self.divergence.is_smooth:
            raise TypeError(
                f"the critic of {self.divergence!r} jumps at p = q, or is constant on either side of it, so "
                "that it tells no ratio; write SkewReverseKL(0.5), or another divergence without a kink"
            )
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight is the reference's mass, finite and > 0, got {self.weight!r}")
        if self.head not in HEADS:
            raise ValueError(f"head is one of {', '.join(map(repr, HEADS))}, got {self.head!r}")

    def __call__(self, *, logits: Tensor, labels: Tensor, count: Tensor | float | None = None) -> Out:
        """logits [B, K], labels [B]; count: examples of the global batch (default: here).

        The negative of the loss is a lower bound on the mean of D(p(.|x), u). metrics: `log_mass`, the mean
        log of the estimated posterior's mass, 0 where the head is right.
        """
        z = self.log_ratio(logits)
        reference = self.weight / z.shape[-1]
        phi = self.divergence.phi(z.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
        rows = -phi - reference * self.divergence.psi(z).sum(-1)
        loss = mean_over_tokens(rows, count=count)
        if not bool(loss.detach().isfinite()):
            raise FloatingPointError(
                f"the loss is {loss.item()}: log-ratios from {z.min().item():.4g} to {z.max().item():.4g} "
                f"are too far for {self.divergence!r} in {z.dtype}; write a smaller learning rate, or a "
                "divergence whose critic is bounded, such as SkewReverseKL(0.5)"
            )
        with torch.no_grad():
            log_mass = mean_over_tokens(z.logsumexp(-1) + math.log(reference))
        return Out(loss, {"log_mass": log_mass})

    def log_ratio(self, logits: Tensor) -> Tensor:
        """z = log p(k|x) - log u, of float32 or better; [B, K]."""
        return HEADS[self.head](*in_working_precision(logits))

    def log_probs(self, logits: Tensor) -> Tensor:
        """The posterior that the head states, normalised; [B, K]."""
        return self.log_ratio(logits).log_softmax(-1)
