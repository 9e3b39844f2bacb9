"""Source-free adaptation: certain predictions whose classes keep known ratios.

Bateson, Kervadec, Dolz, Lombaert and Ben Ayed, "Source-Free Domain Adaptation for Image Segmentation", arXiv
2108.03152.

    L = E_x[ -sum_k w_k q(k|x) log q(k|x) ] + lambda KL(q(k), prior),   q(k) = E_x q(k|x)

No label and nothing of the source but the network is read. The paper's tau_e is the prior, its w the field
`class_weights`, its lambda `weight`. Here p is the prior and q the prediction, so that its KL(prediction,
prior) is ReverseKL(). With equal weights, lambda = 1 and a uniform prior over K classes, L = log K - I(x; k).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import ReverseKL
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out


@dataclass(frozen=True)
class ClassRatio:
    """The mean entropy of the predictions, plus weight D(prior, mean prediction of the batch).

    class_weights: of the entropy's terms, one for each class; () weighs them alike, and background may weigh
    less. floor: added to every class of the prior, which is normalised again, so that a class that the prior
    leaves out has a finite price under ReverseKL().
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "log_prior")
    unit: ClassVar[str] = "batch"  # the mean prediction is that of the whole batch

    divergence: Divergence = field(default_factory=ReverseKL)
    weight: float = 1.0
    class_weights: tuple[float, ...] = ()
    floor: float = 1e-10

    def __post_init__(self):
        Exact().check(self.divergence)
        for name in ("weight", "floor"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} is finite and >= 0, got {getattr(self, name)!r}")
        if any(not (weight >= 0 and math.isfinite(weight)) for weight in self.class_weights):
            raise ValueError(f"class_weights are finite and >= 0, got {self.class_weights}")

    def __call__(self, *, logits: Tensor, log_prior: Tensor, count: Tensor | float | None = None) -> Out:
        """logits [B, K], of the whole global batch; log_prior [K], of the data that is adapted to.

        metrics: the entropy without weights, the divergence, and the batch's mutual information in nats.
        """
        log_q = in_working_precision(logits)[0].log_softmax(-1)
        self._check(log_q, log_prior, count)
        if not len(log_q):
            return Out(log_q.sum(), {})
        terms = entropy_terms(log_q)
        weights = log_q.new_tensor(self.class_weights or [1.0])
        log_mean = log_q.logsumexp(0) - math.log(len(log_q))
        value = self.divergence(self.log_target(log_prior.to(log_q)), log_mean)
        if self.weight and bool(value.detach().isinf()):
            raise ValueError(
                f"{self.divergence!r} is infinite: the prior or the mean prediction leaves a class out that "
                "the other one has; write floor=1e-6, or JS(0.5)"
            )
        loss = (weights * terms).sum(-1).mean() + (self.weight * value if self.weight else 0.0)
        with torch.no_grad():
            entropy = terms.sum(-1).mean()
            information = entropy_terms(log_mean).sum() - entropy
            metrics = {"entropy": entropy, "divergence": value.detach(), "information": information}
        return Out(loss, metrics)

    def log_target(self, log_prior: Tensor) -> Tensor:
        """The prior with the floor, normalised; [K]."""
        prior = log_prior.exp() + self.floor
        return (prior / prior.sum()).log()

    def _check(self, log_q: Tensor, log_prior: Tensor, count: Tensor | float | None) -> None:
        examples, classes = log_q.shape
        if log_prior.shape != (classes,):
            raise ValueError(
                f"log_prior has one number for each of {classes} classes, got {tuple(log_prior.shape)}"
            )
        if self.class_weights and len(self.class_weights) != classes:
            raise ValueError(
                f"class_weights has one number for each of {classes} classes, got {len(self.class_weights)}"
            )
        if count is not None and float(count) != examples:
            raise ValueError(
                f"the class ratio is one of the whole batch: got {examples} examples of {float(count):g}; "
                "leave micro_batch out"
            )


def entropy_terms(log_q: Tensor) -> Tensor:
    """-q log q, 0 where q is 0, with the gradient 0 there."""
    return -log_q.exp() * torch.where(log_q == -math.inf, 0.0, log_q)
