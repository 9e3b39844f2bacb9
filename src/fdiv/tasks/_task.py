"""The contract between a task and the training loop."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.sample._sampler import Decoding


class Text(NamedTuple):
    """Token ids [N, S] and, true for each token that a model is asked to predict, mask [N, S]."""

    ids: Tensor
    mask: Tensor

    def rows(self, index: Tensor | slice) -> "Text":
        return Text(self.ids[index], self.mask[index])


class Pairs(NamedTuple):
    """Responses to the same prompts, row by row: the preferred and the other."""

    chosen: Text
    rejected: Text


class Task(Protocol):
    """A frozen dataclass; every draw comes from what it is given, so that runs can be resumed and split."""

    def load(self, spec, seed: int, reference=None): ...

    def reopen(self, path, spec, seed: int): ...

    def data(self, kind: str, count: int, generator: torch.Generator) -> Text: ...

    def responses(self, teacher, count: int, generator: torch.Generator) -> Text: ...

    def evaluate(self, model, reference, measures: dict[str, Divergence], seed: int) -> dict: ...


class Prompted(Protocol):
    """A task whose prompts a model answers while it is trained."""

    @property
    def answer_length(self) -> int:
        """Tokens of an answer, at most."""
        ...

    def prompts(self, count: int, generator: torch.Generator) -> Text:
        """`count` prompts drawn from those of training, padded as in fdiv.tasks.padding; mask all false."""
        ...

    def answer(self, model, prompts: Text, draws: Tensor, decoding: Decoding) -> Text:
        """A response of `model` to each prompt; `mask` marks its tokens.

        draws [prompts, answer_length], uniform in [0, 1): sequence i is made of row i alone, by inversion of
        the cumulative probabilities, so that it is the same however the prompts are batched.
        """
        ...


class Verified(Protocol):
    """A task that can tell a right answer."""

    def verify(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """0 or 1 for each sequence [N, S], as float [N]; mask, where it is given, marks the answers."""
        ...


class Privileged(Protocol):
    """A task that knows more of a prompt than it shows: a solution, another wording, an example."""

    def privileged(self, text: Text) -> tuple[Text, Tensor]:
        """(the same responses after the richer prompt, whether there was one [N]).

        Each row has as many tokens under the mask as it had, the same ones.
        """
        ...
