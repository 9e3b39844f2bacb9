"""What all one-step students share: how they are called, told a condition, checked and weighed."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fdiv.diffusion.edm import Denoiser, denoised, spread_to
from fdiv.methods.generate.levels import Drawn, Levels, stretch

Weight = Literal["distance", "denoiser", "score", "expansion"]


def generated(network: Denoiser, noise: Tensor, sigma_init: float, condition: Any = None) -> Tensor:
    """The student's samples of standard normal noise [B, ...], in one call."""
    made = denoised(network, sigma_init * noise, sigma_init, condition)
    require_finite(made, "samples of the student")
    return made


def condition_of(labels: Tensor, network: Any, p_network: Any) -> Tensor | None:
    """What both networks are told beside the noise: the labels, or nothing."""
    told = [bool(getattr(n, "conditional", False)) for n in (network, p_network)]
    if told[0] != told[1]:
        who = "student" if told[0] else "teacher"
        raise ValueError(
            f"only the {who} reads a condition, so that they are not of one law; build student and teacher "
            "with the same classes= or context="
        )
    return labels if told[0] else None


def moves(step: int, every: int, head_start: int) -> bool:
    """Whether the student learns at this step: the last of each `every`, once its critics are ahead."""
    return step >= head_start and (step + 1) % every == 0


def noised(made: Tensor, level: Drawn) -> Tensor:
    return made + spread_to(level.sigma, made) * torch.randn_like(made)


def weights(how: Weight, made: Tensor, teacher: Tensor, level: Drawn, levels: Levels, power: int) -> Tensor:
    """What a product of `power` differences of denoisers is multiplied by, [B, 1, ...].

    "distance": 1 / mean|x0 - D_p|, the same step at every level; "denoiser": 1; "score": sigma^(-2 power),
    for a difference of scores is one of denoisers over sigma^2; "expansion": that, times sigma over the
    density of the levels.
    """
    if how == "distance":
        scale = 1 / (made - teacher).detach().flatten(1).abs().mean(1)
        require_finite(scale, "inverse distances of student and teacher")
        return spread_to(scale, made)
    if how == "denoiser":
        return spread_to(torch.ones_like(level.sigma), made)
    scale = level.sigma ** (-2 * power)
    if how == "expansion":
        scale = scale * level.sigma * stretch(levels, level.rank).to(scale)
    return spread_to(scale, made)


def mean_coordinate(rows: Tensor) -> Tensor:
    """[B, ...] to [B]."""
    return rows.flatten(1).mean(1)


def require_finite(numbers: Tensor, what: str) -> None:
    finite = numbers.isfinite().flatten(1).all(1) if numbers.ndim > 1 else numbers.isfinite()
    if not bool(finite.all()):
        raise FloatingPointError(
            f"{int((~finite).sum())} of {len(finite)} {what} are not finite; nothing was updated. Lower "
            "train.learning_rate, or start from the last checkpoint with other levels of noise"
        )


def require_plan(who: object, every: int, head_start: int, sigma_init: float) -> None:
    """Raise unless the fields that all one-step methods have make sense."""
    name = type(who).__name__
    if not (isinstance(every, int) and not isinstance(every, bool) and every >= 1):
        raise ValueError(f"{name}(every) is a whole number of steps >= 1, got {every!r}")
    if not (isinstance(head_start, int) and not isinstance(head_start, bool) and head_start >= 0):
        raise ValueError(f"{name}(head_start) is a whole number of steps >= 0, got {head_start!r}")
    require_size(name, sigma_init=sigma_init)


def require_size(name: str, least: float | None = None, **numbers: float) -> None:
    """Raise unless each is finite and > 0, or >= least."""
    for field, number in numbers.items():
        inside = isinstance(number, int | float) and math.isfinite(number)
        if not inside or (number <= 0 if least is None else number < least):
            bound = "> 0" if least is None else f">= {least}"
            raise ValueError(f"{name}({field}) is finite and {bound}, got {number!r}")


def require_weight(name: str, weight: object, allowed: tuple[str, ...]) -> None:
    if weight not in allowed:
        raise ValueError(f"{name}(weight) is one of {', '.join(allowed)}, got {weight!r}")
