"""WEAT: TRADES with examples weighted by the energy of their input.

Mirza, Briglia, Beadini and Masi, "Shedding More Light on Robust Classifiers under the lens of Energy-based
Models", arXiv 2407.06315.

    L = mean of w(x) (-log q(y | x or x') + beta D(q(.|x), q(.|x'))),   w(x) = 1/log(1 + e^|E(x)|)

E(x) = -logsumexp of the logits at the natural input x, and w has no gradient: 1/log 2 at E = 0, and less the
farther E is from it. `labels_at`: WEAT_nat takes the labels' term at x, WEAT_adv at x'.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import softplus

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.robust.attacks import Attack
from fdiv.methods.robust.trades import STEPS, check, farthest
from fdiv.methods.supervise._labels import of_label, scores_of

BETA = {"nat": 6.0, "adv": 7.0}


@dataclass(frozen=True)
class WEAT:
    """TRADES's two terms, weighted by the energy of the input; the attack is that of TRADES.

    labels_at: "nat", the labels' term at x, or "adv", at x'. beta: None is the authors', 6 and 7.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "inputs", "network")

    divergence: Divergence = field(default_factory=KL)
    labels_at: Literal["nat", "adv"] = "nat"
    beta: float | None = None
    attack: Attack = STEPS

    def __post_init__(self):
        if self.labels_at not in BETA:
            raise ValueError(f"labels_at is 'nat' (at x) or 'adv' (at x'), got {self.labels_at!r}")
        check(self.divergence, self.weight, self.attack)

    @property
    def weight(self) -> float:
        """Of the divergence."""
        return BETA[self.labels_at] if self.beta is None else self.beta

    def __call__(
        self,
        *,
        logits: Tensor,
        labels: Tensor,
        inputs: Tensor,
        network: nn.Module,
        count: Tensor | float | None = None,
    ) -> Out:
        """logits [B, C] = network(inputs), labels [B], inputs [B, ...]; count: as everywhere."""
        logits = scores_of(logits, labels)
        weight = energy_weight(energy(logits))
        log_p = logits.log_softmax(-1)
        worst = farthest(network, inputs, self.divergence, self.attack)
        log_q = scores_of(network(worst), labels).log_softmax(-1)
        nll = -of_label(log_p if self.labels_at == "nat" else log_q, labels)
        apart = self.divergence(log_p, log_q)
        loss = mean_over_tokens(weight * (nll + self.weight * apart), count=count)
        metrics = {"nll": nll, "divergence": apart, "weight": weight}
        return Out(loss, {name: mean_over_tokens(rows.detach()) for name, rows in metrics.items()})


def energy(logits: Tensor) -> Tensor:
    """-log sum_k e^(z_k), [B, C] -> [B]: low where the model finds the input likely."""
    return -logits.logsumexp(-1)


def energy_weight(energies: Tensor) -> Tensor:
    """1/log(1 + e^|E|), without gradient; 1/log 2 at E = 0."""
    return 1 / softplus(energies.detach().abs())
