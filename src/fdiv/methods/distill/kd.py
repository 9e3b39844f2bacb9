"""KD: the labels and the teacher's tempered next-token distribution, weighted.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; token by token
for text, Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv 1606.07947 (its word-level form).

    L = (1 - weight) CE(labels, q) + weight tau^2 D(p_tau, q_tau),   p_tau = softmax(teacher logits / tau)

Hinton's T is `temperature`. tau^2 keeps the teacher's share of the gradient while tau is varied: logits are
divided by tau before the softmax and so is the gradient that returns through it, a factor 1/tau each.
tau^2 KL has the gradient tau (q_tau - p_tau), which tends to the difference of the centred logits over the
size of the vocabulary. p_tau and q_tau come close as tau grows, where every smooth f-divergence is
f''(1)/2 chi^2: tau^2 is its scale too, up to f''(1). TV has a kink there, and tau^2 TV grows with tau.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Offline


@dataclass(frozen=True)
class KD:
    """Cross-entropy with the labels at temperature 1, and tau^2 times a divergence from the teacher at tau.

    weight: the share of the teacher's term; 1 leaves the labels out, and is GKD's loss where tau is 1.
    """

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = ("log_q_label",)
    sampler: ClassVar[Sampler] = Offline()

    divergence: Divergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=Exact)
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self):
        GKD(self.divergence, self.estimator, temperature=self.temperature)  # refuses what it cannot train
        if not 0 < self.weight <= 1:
            raise ValueError(
                f"weight is the teacher's share, in (0, 1], got {self.weight!r}; write SFT() for labels alone"
            )

    def __call__(
        self,
        *,
        log_q_label: Tensor,
        mask: Tensor | None = None,
        count: Tensor | float | None = None,
        **evidence: Tensor,
    ) -> Out:
        """log_q_label [rows]: the student's log-probability of each label, at temperature 1.

        evidence, mask and count are GKD's: the temperature is already applied to both models. metrics: both
        terms as they are, means over the tokens of this call.
        """
        soft = GKD(self.divergence, self.estimator)(mask=mask, **evidence).loss
        hard = mean_over_tokens(-log_q_label, mask)
        mean = (1 - self.weight) * hard + self.weight * self.temperature**2 * soft
        share = mean_over_tokens(torch.ones_like(log_q_label), mask, count)  # of the global batch
        return Out(share * mean, {"cross_entropy": hard.detach(), "divergence": soft.detach()})
