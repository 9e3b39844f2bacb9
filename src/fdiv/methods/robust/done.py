"""DONE: adversarial training with the worst weights over examples, and an attack that can be differentiated.

Sow, Lin, Wang and Liang, "Doubly Robust Instance-Reweighted Adversarial Training", arXiv 2308.00311.

    min over theta of lam log mean_i exp(l_i(theta, x_i')/lam),   l_i = -log q(y_i | x_i')
    x_i' = argmax over the box of l_i(theta, x') + barrier sum_j log(x_j' - low_j) + log(high_j - x_j')

The weights e^(l_i/lam), normalised, are those of `DRO(KL(), lam)`; the paper's r is `lam`. [low, high] is the
ball |x' - x|_inf <= epsilon within the bounds of the inputs. The smooth barrier keeps x' off its walls, so
that x' moves with theta, and l_i with it, also through x' (the paper's implicit differentiation):

    dl/dtheta = grad_theta l - (d^2 l/dtheta dx') H^{-1} grad_x' l,   H = d^2 (l + barrier terms)/dx'^2

`linear` solves with H, known by its products; None leaves that term out, the first-order variant. The mean
over all examples is a running estimate, see dro.py. The inner ascent is ours: where l is replaced by its
tangent the smooth problem has a closed form, place by place, which is taken `steps` times; where l is
convex in x', as that of a ReLU network is between its kinks, each of them goes up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fdiv._divergence import FDivergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out
from fdiv.methods.robust.attacks import Attack, evaluated, slope
from fdiv.methods.robust.dro import State, advanced, check_rate, empty, required, running
from fdiv.methods.supervise._labels import of_label, scores_of
from fdiv.operators.implicit import implicit
from fdiv.operators.linear import GMRES, LinearSolver


@dataclass(frozen=True)
class DONE:
    """KL-robust cross-entropy over examples, each attacked within its box by a smooth inner problem.

    lam: the price of unequal weights. rate: of the running estimate; 1 is the batch alone. attack: the start,
    by projected ascent, under "linf". barrier: of the smooth problem. steps: of its ascent.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("labels", "inputs", "network", "state")
    unit: ClassVar[str] = "batch"
    divergence: ClassVar[FDivergence] = KL()

    lam: float = 1.0
    rate: float = 0.1
    attack: Attack = Attack()
    barrier: float = 0.001
    steps: int = 10
    linear: LinearSolver | None = GMRES(tolerance=1e-3)

    def __post_init__(self):
        for name in ("lam", "barrier"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is finite and > 0, got {getattr(self, name)!r}")
        if self.rate is None:
            raise ValueError("rate is in (0, 1]; 1 is the batch alone")
        check_rate(self.rate)
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"steps is a whole number >= 1, got {self.steps!r}")
        if self.attack.norm != "linf" or not self.attack.epsilon:
            raise ValueError(
                "the barrier is of a box: write an Attack with norm='linf' and epsilon > 0, got "
                f"{self.attack!r}"
            )

    def __call__(
        self,
        *,
        labels: Tensor,
        inputs: Tensor,
        network: nn.Module,
        state: State | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """labels [B], inputs [B, ...] of one whole batch. The attack sees the network in eval mode.

        metrics: those of DRO with a rate, and `off`, how far x' is from where one more step would take it, as
        a share of the half-width.
        """
        if count is not None and int(count) != len(inputs):
            raise ValueError(
                f"weights are of a whole batch of {int(count)}, got {len(inputs)} examples of it"
            )
        if not len(inputs):
            return empty(network(inputs))
        worst, off = self.worst(inputs, labels, network)
        out = running(surprise(network(worst), labels), self.lam, self.rate, required(state))
        return Out(out.loss, out.metrics | {"off": off})

    def worst(self, inputs: Tensor, labels: Tensor, network: nn.Module) -> tuple[Tensor, Tensor]:
        """(x' [B, ...], with a gradient to the network's weights unless `linear` is None; `off`)."""
        box = box_of(inputs, self.attack)
        names, weights = zip(*network.named_parameters(), strict=True)

        def rows(x: Tensor) -> Tensor:
            return surprise(network(x), labels)

        def pull(x: Tensor) -> Tensor:
            return box.half * slope(x, rows) / self.barrier

        def ascend(*_weights: Tensor) -> Tensor:
            with evaluated(network):
                x = self.attack(inputs, rows)
                for _step in range(self.steps - 1):
                    x = box.at(highest(pull(x)))
                return highest(pull(x))

        def stationary(place: Tensor, *weights: Tensor) -> Tensor:
            def total(place: Tensor) -> Tensor:
                scores = functional_call(network, dict(zip(names, weights, strict=True)), (box.at(place),))
                return surprise(scores, labels).sum()

            with evaluated(network):  # backward comes back here, when the network trains again
                return torch.func.grad(total)(place) / (2 * self.barrier) - place.tanh()

        ascent: Callable[..., Tensor] = ascend
        if self.linear is not None:
            ascent = implicit(ascend, stationary, self.linear, batched=True)
        place = ascent(*weights)
        with evaluated(network):
            again = highest(pull(box.at(place.detach())))
        return box.at(place), (again.tanh() - place.detach().tanh()).abs().mean()

    def initial_state(self) -> State:
        return {"log_moment": 0.0, "steps": 0.0}

    def advance(self, state: State, metrics: dict[str, float], progress: float) -> State:
        return advanced(state, metrics)


class Box(NamedTuple):
    """The ball within the bounds: a place u, any real number, stands for middle + half tanh u.

    In u the barrier is -2 barrier log cosh u, of which the curvature at a solution stays between 2 and 4
    barrier all the way to the walls, so that systems with H are well scaled.
    """

    middle: Tensor
    half: Tensor

    def at(self, place: Tensor) -> Tensor:
        return self.middle + self.half * place.tanh()


def box_of(inputs: Tensor, attack: Attack) -> Box:
    inputs = inputs.detach()
    low, high = (-math.inf, math.inf) if attack.bounds is None else attack.bounds
    low, high = (inputs - attack.epsilon).clamp(min=low), (inputs + attack.epsilon).clamp(max=high)
    return Box((low + high) / 2, (high - low) / 2)


def highest(pull: Tensor) -> Tensor:
    """The u of argmax over z = tanh u in (-1, 1) of pull z + log(1 - z^2), elementwise: sinh 2u = pull."""
    return pull.asinh() / 2


def surprise(logits: Tensor, labels: Tensor) -> Tensor:
    return -of_label(scores_of(logits, labels).log_softmax(-1), labels)
