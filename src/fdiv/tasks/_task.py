"""The contract between a task and the training loop."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fdiv._divergence import Divergence


class Text(NamedTuple):
    """Token ids [N, S] and, true for each token that a model is asked to predict, mask [N, S]."""

    ids: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> "Text":
        return Text(self.ids[index], self.mask[index])


class Pairs(NamedTuple):
    """Responses to the same prompts, row by row: the preferred and the other."""

    chosen: Text
    rejected: Text


class Task(Protocol):
    """A frozen dataclass; every draw comes from the generator it is given, so that runs can be resumed."""

    def load(self, spec, seed: int): ...

    def data(self, kind: str, count: int, generator: torch.Generator) -> Text: ...

    def responses(self, teacher, count: int, generator: torch.Generator) -> Text: ...

    def evaluate(self, model, reference, measures: dict[str, Divergence], seed: int) -> dict: ...
