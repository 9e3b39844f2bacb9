"""Samples of a generator, and numbers about samples that come with their standard errors."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv.adapters.classifier import Classifier
from fdiv.methods.robust.attacks import evaluated
from fdiv.networks.affine import AffineNetwork

AT_ONCE = 1024  # samples that a network makes in one go
GROUPS = 8  # of samples, for the error of a number that compares whole clouds


class Drawn(NamedTuple):
    """points [N, ...] float32 on the CPU; calls of the network and seconds, both for one sample."""

    points: Tensor
    evaluations: float
    seconds: float


@torch.no_grad()
def drawn(model: Classifier, default: Any, noise: Tensor, condition: Tensor | None = None) -> Drawn:
    """What the model's method, or `default` of a model without one, makes of `noise` [N, ...].

    condition [N, ...]: handed on to a network that states `conditional`.
    """
    network: Any = model.model
    device = _device(network)
    wanted = condition if getattr(network, "conditional", False) else None
    sampler, rows, made = _sampler(model, default), 0, []

    def count(_: Any, arguments: tuple) -> None:
        nonlocal rows
        rows += len(arguments[0])

    hook = network.register_forward_pre_hook(count)
    started = time.perf_counter()
    with evaluated(network):
        for some in torch.arange(len(noise)).split(AT_ONCE):
            told = None if wanted is None else wanted[some].to(device)
            made.append(sampler(network, noise[some].to(device), told).float().cpu())
    seconds = time.perf_counter() - started
    hook.remove()
    return Drawn(finite(torch.cat(made)), rows / len(noise), seconds / len(noise))


def _device(network: Any) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _sampler(model: Classifier, default: Any) -> Callable[..., Tensor]:
    if hasattr(model.method, "sample"):
        return model.method.sample
    if isinstance(model.model, AffineNetwork):  # a generator that nobody has trained
        return lambda network, noise, condition: network(noise, 1.0)
    return default.sample


def finite(points: Tensor) -> Tensor:
    """The samples; raise where some are not numbers."""
    wrong = len(points) - int(points.flatten(1).isfinite().all(1).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {len(points)} samples are not finite: the training has diverged; lower "
            "train.learning_rate"
        )
    return points


def grouped(measure: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[float, float]:
    """(mean, standard error) of a measure between clouds over GROUPS parts of x and of y.

    The parts are independent, and as many pairs of points are compared in an eighth of the time.
    """
    size = min(len(x), len(y)) // GROUPS
    parts = (t[: size * GROUPS].double().flatten(1).unflatten(0, (GROUPS, size)) for t in (x, y))
    values = measure(*parts)
    return values.mean().item(), values.std().item() / math.sqrt(GROUPS)


def jackknifed(measure: Callable[[Tensor], Tensor], parts: Tensor) -> tuple[float, float]:
    """(value, standard error) of a measure of all `parts` [B, ...], by leaving one out at a time."""
    count = len(parts)
    left = [measure(torch.cat([parts[:n], parts[n + 1 :]])).item() for n in range(count)]
    spread = torch.tensor(left).var(correction=0).item() * (count - 1)
    return measure(parts).item(), math.sqrt(spread)
