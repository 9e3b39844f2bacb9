"""Learning with noisy labels by an f-divergence between what is predicted and what is labelled.

Wei and Liu, "When Optimizing f-divergence is Robust with Label Noise", arXiv 2011.03687.

    VD = E_{p(x, y)} g(h(x), y) - E_{p(x) p(y)} f*(g(h(x), y)),   L = -VD

a lower bound on D(p(x, y), p(x) p(y)) for any critic g. Where a label i turns into j != i with a chance e_j
that does not depend on i, and e = sum of e_j < 1,

    VD of noisy labels = (1 - e) VD of clean ones + sum_j e_j E_x[ g(h(x), j) - f*(g(h(x), j)) ]

TV has f*(v) = v where g lies, so that its last term is 0. The paper's f is of joint / product, as here, its h
the network; `rates` are the e_j, for its bias correction.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.tv import TV
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.unlearn.flat import FLAT


@dataclass(frozen=True)
class NoisyLabels:
    """-g(x, y) + sum_k prior_k f*(g(x, k)), averaged over examples; cross-entropy while progress < warmup.

    The product of marginals is exact: every class at every example, by the labels' frequencies in the
    training set. It is the mean over all pairings of the set's inputs with its labels, of which the authors'
    second batch is a draw.
    critic: "probability", the paper's g of v = q(k|x) by the rows of FLAT; or "log-ratio", phi and -psi of
        log q(k|x) - log prior_k, which makes L = -D at the true posterior, and cross-entropy of KL().
    rates: e_j of each class; L is then VD of clean labels in expectation. () leaves the noise alone.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "log_prior", "progress")

    divergence: FDivergence = field(default_factory=TV)
    critic: Literal["probability", "log-ratio"] = "probability"
    rates: tuple[float, ...] = ()
    warmup: float = 0.2

    def __post_init__(self):
        require_f_divergence(self.divergence, "NoisyLabels")
        if self.critic not in ("probability", "log-ratio"):
            raise ValueError(f"critic is 'probability' or 'log-ratio', got {self.critic!r}")
        if self.critic == "log-ratio" and not self.divergence.is_smooth:
            raise TypeError(
                f"the potentials of {self.divergence!r} jump where prediction and prior agree; write "
                "critic='probability'"
            )
        if any(not rate >= 0 for rate in self.rates) or not sum(self.rates) < 1:
            raise ValueError(
                "rates are chances >= 0 of a label turning into each class, with a sum below 1, got "
                f"{self.rates}"
            )
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a fraction of the training, in [0, 1], got {self.warmup!r}")

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        log_prior: Tensor,
        progress: float = 1.0,
        count: Tensor | float | None = None,
    ) -> Out:
        """logits [B, K], labels [B]; log_prior [K], of the noisy labels; count: as in mean_over_tokens."""
        log_q = in_working_precision(logits)[0].log_softmax(-1)
        self._check(log_q, labels, log_prior)
        chosen = labels.unsqueeze(-1)
        cross_entropy = -log_q.gather(-1, chosen).squeeze(-1)
        gain, price = self.terms(log_q, log_prior)
        rows = gain.gather(-1, chosen).squeeze(-1) - (log_prior.to(log_q).exp() * price).sum(-1)
        if self.rates:
            rates = log_q.new_tensor(self.rates)
            rows = (rows - ((gain - price) * rates).sum(-1)) / (1 - rates.sum())
        loss = mean_over_tokens(cross_entropy if progress < self.warmup else -rows, count=count)
        with torch.no_grad():
            metrics = {
                "variational": mean_over_tokens(rows),
                "cross_entropy": mean_over_tokens(cross_entropy),
            }
        return Out(loss, metrics)

    def terms(self, log_q: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
        """(g, f*(g)) at every class, [B, K] each."""
        if self.critic == "probability":
            return FLAT(self.divergence).terms(log_q.exp())
        empty = log_prior == -torch.inf  # a class that no label has: its price is multiplied by 0
        log_ratio = torch.where(empty, 0.0, log_q - torch.where(empty, 0.0, log_prior).to(log_q))
        phi, psi = self.divergence.potentials(log_ratio)
        return phi, -psi

    def _check(self, log_q: Tensor, labels: Tensor, log_prior: Tensor) -> None:
        classes = log_q.shape[-1]
        if log_prior.shape != (classes,):
            raise ValueError(
                f"log_prior has one number for each of {classes} classes, got {tuple(log_prior.shape)}"
            )
        if self.rates and len(self.rates) != classes:
            raise ValueError(f"rates has one number for each of {classes} classes, got {len(self.rates)}")
        if bool((log_prior[labels] == -torch.inf).any()):
            raise ValueError("a label has the prior probability 0; log_prior is that of the training labels")
