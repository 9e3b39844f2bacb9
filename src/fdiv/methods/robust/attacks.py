"""Inputs moved within a small ball, where an objective is largest: projected gradient ascent.

Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks",
arXiv 1706.06083.

    x' <- project(x' + step_size * direction),   direction = sign(gradient), or gradient/|gradient| under "l2"

`project` goes to the nearest point of the ball around x that also lies within `bounds`. The paper's training,
cross-entropy at x', is `AdversarialTraining`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fdiv._divergence import FDivergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.supervise._labels import of_label, scores_of

NORMS = ("linf", "l2")
STARTS = ("uniform", "normal", "none")


@dataclass(frozen=True)
class Attack:
    """Ascent on an objective within the ball of radius epsilon around each input.

    step_size: None is 2.5 epsilon / steps. bounds: what an input's places may hold; None is all numbers.
    start: "uniform" in the ball; "normal", the input with normal noise of deviation `noise`; "none", the
    input itself, where the gradient of a divergence from it is 0. Drawn by torch's global generator.
    """

    epsilon: float = 0.1
    steps: int = 10
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    start: Literal["uniform", "normal", "none"] = "uniform"
    noise: float = 0.001

    def __post_init__(self):
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon, the radius of the ball, is finite and >= 0, got {self.epsilon!r}")
        if not (isinstance(self.steps, int) and self.steps >= 0):
            raise ValueError(f"steps is a whole number >= 0, got {self.steps!r}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(
                f"step_size is finite and > 0, or None for 2.5 epsilon / steps, got {self.step_size!r}"
            )
        if self.norm not in NORMS:
            raise ValueError(f"norm is 'linf' or 'l2', got {self.norm!r}")
        if self.start not in STARTS:
            raise ValueError(f"start is 'uniform', 'normal' or 'none', got {self.start!r}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise is finite and >= 0, got {self.noise!r}")
        if self.bounds is not None and not (len(self.bounds) == 2 and self.bounds[0] < self.bounds[1]):
            raise ValueError(f"bounds is (lowest, highest), or None for no bounds, got {self.bounds!r}")

    def __call__(self, inputs: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """The inputs [B, ...] moved to where objective(inputs) -> rows [B] is larger; detached.

        Parameters get no gradient. The network's mode is left alone: see `evaluated`.
        """
        inputs = inputs.detach()
        self._check(inputs)
        moved = self.begin(inputs)
        for _ in range(self.steps):
            moved = self.project(moved + self.length * self.direction(slope(moved, objective)), inputs)
        return moved

    @property
    def length(self) -> float:
        """The step's size."""
        return 2.5 * self.epsilon / max(1, self.steps) if self.step_size is None else self.step_size

    def begin(self, inputs: Tensor) -> Tensor:
        """Where the ascent starts, within ball and bounds."""
        if self.start == "none":
            return inputs.clone()
        if self.start == "normal":
            return self.project(inputs + self.noise * torch.randn_like(inputs), inputs)
        if self.norm == "linf":
            return self.project(inputs + self.epsilon * (2 * torch.rand_like(inputs) - 1), inputs)
        places = max(1, inputs[:1].numel())
        radius = torch.rand(len(inputs), dtype=inputs.dtype, device=inputs.device) ** (1 / places)
        return self.project(inputs + self.epsilon * scaled(unit(torch.randn_like(inputs)), radius), inputs)

    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest direction of length 1 in the norm; 0 where the gradient is 0."""
        return gradient.sign() if self.norm == "linf" else unit(gradient)

    def project(self, moved: Tensor, inputs: Tensor) -> Tensor:
        """The nearest point within ball and bounds (in the Euclidean sense; under "linf" in both)."""
        low, high = (-math.inf, math.inf) if self.bounds is None else self.bounds
        if self.norm == "linf":
            least, most = (inputs - self.epsilon).clamp(min=low), (inputs + self.epsilon).clamp(max=high)
            return moved.clamp(least, most)
        away = moved - inputs
        room = torch.where(away > 0, high - inputs, inputs - low)  # up to the bound, >= 0
        return inputs + away.sign() * shrunk(away.abs(), room, self.epsilon)

    def _check(self, inputs: Tensor) -> None:
        if not inputs.is_floating_point():
            raise TypeError(f"inputs are floating point numbers, got {inputs.dtype}; write inputs.float()")
        if self.bounds is None or not inputs.numel():
            return
        low, high = inputs.amin().item(), inputs.amax().item()
        if not (self.bounds[0] <= low and high <= self.bounds[1]):
            raise ValueError(
                f"inputs from {low:.6g} to {high:.6g} leave bounds={self.bounds!r}; state what inputs may "
                "hold, or bounds=None"
            )


def slope(inputs: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of each row of the objective in its own input, [B, ...]."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        rows = objective(inputs)
        if rows.shape != inputs.shape[:1]:
            raise ValueError(f"the objective gives rows [{len(inputs)}], got {tuple(rows.shape)}")
        (gradient,) = torch.autograd.grad(rows.sum(), inputs)
    if not bool(gradient.isfinite().all()):
        raise ValueError("the objective has a gradient that is not finite at one of the inputs")
    return gradient


def scaled(rows: Tensor, by: Tensor) -> Tensor:
    """rows [B, ...] times by [B]."""
    return rows * by.reshape(-1, *[1] * (rows.ndim - 1))


def unit(rows: Tensor) -> Tensor:
    """rows [B, ...], each of Euclidean length 1; 0 stays 0."""
    flat = rows.flatten(1)
    flat = flat / flat.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)  # no underflow
    length = flat.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, flat / length, 0.0).reshape(rows.shape)


def shrunk(size: Tensor, room: Tensor, radius: float) -> Tensor:
    """The nearest to `size` >= 0, [B, ...], in the ball of this radius and below `room`: min(s size, room).

    s is 1 where that fits into the ball. Otherwise the squared length is quadratic in s between the values
    room/size, at each of which one place stops growing: sorted, one of them is the last below the radius.
    """
    shape, size, room = size.shape, size.flatten(1), room.flatten(1)
    stop, order = torch.where(size > 0, room / size, math.inf).sort(-1)
    stopped = room.gather(-1, order).square().where(stop < math.inf, 0.0).cumsum(-1)
    squares = size.gather(-1, order).square()
    growing = squares.flip(-1).cumsum(-1).flip(-1)  # of this place and all that stop later
    before = torch.cat([torch.zeros_like(stopped[:, :1]), stopped[:, :-1]], -1)
    # The share s at which the length is the radius, if it is not beyond this place's stop.
    share = torch.where(growing > 0, ((radius**2 - before).clamp(min=0.0) / growing).sqrt(), math.inf)
    found = share <= stop
    first = found.to(torch.int8).argmax(-1, keepdim=True)
    share = torch.where(found.any(-1, keepdim=True), share.gather(-1, first), 1.0).clamp(max=1.0)
    return torch.minimum(share * size, room).reshape(shape)


@contextmanager
def evaluated(network: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode, as an attack needs it; after that each of its modules is as it was."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield network
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class AdversarialTraining:
    """Cross-entropy of inputs that an attack has moved to where it is large."""

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("labels", "inputs", "network")
    divergence: ClassVar[FDivergence] = KL()

    attack: Attack = field(default_factory=Attack)

    def __call__(
        self, *, labels: Tensor, inputs: Tensor, network: nn.Module, count: Tensor | float | None = None
    ) -> Out:
        """labels [B], inputs [B, ...]; the attack sees the network in eval mode. count: as everywhere."""

        def surprise(x: Tensor) -> Tensor:
            return -of_label(scores_of(network(x), labels).log_softmax(-1), labels)

        with evaluated(network):
            worst = self.attack(inputs, surprise)
        return Out(mean_over_tokens(surprise(worst), count=count), {})
