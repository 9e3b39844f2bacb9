"""What a method may ask of a network: its scores, its features, its stages and its last layer."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Scores [B, outputs] of inputs [B, ...], stage by stage.

    blocks: each maps the output of the one before, the first the inputs; the last one's output are the
    features [B, width], which `head` reads.
    """

    def __init__(self, blocks: Sequence[nn.Module], width: int, outputs: int):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, outputs)

    def stages(self, inputs: Tensor) -> list[Tensor]:
        """The output of every block; the last are the features."""
        outputs = []
        for block in self.blocks:
            inputs = block(inputs)
            outputs.append(inputs)
        return outputs

    def features(self, inputs: Tensor) -> Tensor:
        return self.stages(inputs)[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs))


class Architecture(Protocol):
    """A frozen dataclass: the object is what a recipe writes."""

    def build(self, shape: torch.Size, outputs: int) -> Network:
        """A network for inputs of this shape, without the batch; its weights are torch's next draws."""
        ...


def require_places(shape: torch.Size, who: object) -> None:
    """Raise unless the shape is that of a signal [channels, length] or of an image."""
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{who!r} reads signals [channels, length] and images [channels, height, width], got inputs of "
            f"shape {tuple(shape)}; write MLP() for rows of numbers"
        )


def require_sizes(who: object, **sizes: int) -> None:
    """Raise unless each is a whole number of at least one."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{type(who).__name__}({name}) is a number of at least 1, got {size!r}")
