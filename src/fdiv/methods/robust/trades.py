"""TRADES: fit the labels where they are, and keep the prediction the same in a ball around.

Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan, "Theoretically Principled Trade-off between Robustness and
Accuracy", arXiv 1901.08573.

    L = mean of -log q(y|x) + beta D(q(.|x), q(.|x')),   x' = where in the ball D is largest

The paper's 1/lambda is `beta`, and its D the default, KL(q(x), q(x')): the prediction at x is fdiv's p, that
at x' its q. Both have a gradient. With the energies E(x, k) = -z_k and E(x) = -logsumexp z of the logits z,
KL = sum_k q_k(x) (E(x', k) - E(x, k)) + E(x) - E(x').
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.robust.attacks import Attack, evaluated
from fdiv.methods.supervise._labels import of_label, scores_of

STEPS = Attack(epsilon=0.031, steps=10, step_size=0.007, start="normal")  # the authors', on CIFAR-10


@dataclass(frozen=True)
class TRADES:
    """Cross-entropy at x, plus beta times the divergence to the prediction at the attacked x'.

    attack: ascends D with the network in eval mode and its prediction at x held. It must not start at x,
        where D is 0 and has no slope.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "inputs", "network")

    divergence: Divergence = field(default_factory=KL)
    beta: float = 6.0
    attack: Attack = STEPS

    def __post_init__(self):
        check(self.divergence, self.beta, self.attack)

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
        log_p = scores_of(logits, labels).log_softmax(-1)
        nll = -of_label(log_p, labels)
        if not self.beta:
            return Out(mean_over_tokens(nll, count=count), {})
        worst = farthest(network, inputs, self.divergence, self.attack)
        apart = self.divergence(log_p, scores_of(network(worst), labels).log_softmax(-1))
        metrics = {"nll": nll, "divergence": apart}
        loss = mean_over_tokens(nll + self.beta * apart, count=count)
        return Out(loss, {name: mean_over_tokens(rows.detach()) for name, rows in metrics.items()})


def farthest(network: nn.Module, inputs: Tensor, divergence: Divergence, attack: Attack) -> Tensor:
    """Where the attack takes the inputs to make the prediction differ most."""
    with evaluated(network):
        log_p = network(inputs).detach().log_softmax(-1)
        return attack(inputs, lambda x: divergence(log_p, network(x).log_softmax(-1)))


def check(divergence: Divergence, beta: float, attack: Attack) -> None:
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence is a divergence (KL(), JS(0.5), ...), got {divergence!r}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta is a finite weight >= 0, got {beta!r}")
    if not isinstance(attack, Attack):
        raise TypeError(f"attack is an Attack(...), got {attack!r}")
    if attack.start == "none" and attack.epsilon:
        raise ValueError("a divergence has no slope at x itself; write start='normal' or 'uniform'")
