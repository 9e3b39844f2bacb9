"""Data as another domain would see them: what a model that was trained before is adapted to."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


def shifted(inputs: Tensor, shift: str, generator: torch.Generator) -> Tensor:
    """inputs [N, ...] under "rotate:DEGREES" (counter-clockwise), "noise:SCALE" or "scale:FACTOR"."""
    kind, _, text = shift.partition(":")
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if kind not in ("rotate", "noise", "scale") or not math.isfinite(size):
        raise ValueError(f"shift is 'rotate:DEGREES', 'noise:SCALE' or 'scale:FACTOR', got {shift!r}")
    if kind == "noise":
        return inputs + size * torch.randn(inputs.shape, generator=generator)
    return _rotated(inputs, math.radians(size)) if kind == "rotate" else size * inputs


def _rotated(images: Tensor, angle: float) -> Tensor:
    if images.ndim != 4:
        raise ValueError(f"only images [N, channels, height, width] are rotated, got {tuple(images.shape)}")
    turn = images.new_tensor(
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    )
    grid = affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)
