"""A writer whose answers are begun, for any task: it asks it as it asks every other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fdiv.adapters.transformers import CausalLM
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text
from fdiv.tasks.padding import answered, rows_of, unanswered


@dataclass(frozen=True, eq=False)
class Continuing:
    """`writer`, with `kept` [tokens] of each answer, none or more, for already written.

    Token t of an answer is made of column t of its draws, as if the writer had written all of it.
    """

    writer: Any
    kept: list[Tensor]
    model: CausalLM

    @property
    def tokenizer(self) -> Any:
        return self.writer.tokenizer

    @property
    def ends(self) -> tuple[int, ...]:
        return self.writer.ends

    def generate(
        self,
        prompts: Text,
        draws: Tensor,
        decoding: Decoding = Decoding(),
        ends: tuple[int, ...] | None = None,
    ) -> Text:
        """As `CausalLM.generate`; what is kept counts as written."""
        rows, most = rows_of(prompts), draws.shape[1]
        responses = list(self.kept)
        for some in self._batches([len(row) for row in rows], most):
            begun = unanswered([torch.cat([rows[n], self.kept[n]]) for n in some])
            room = most - len(self.kept[some[0]])
            ahead = torch.stack([_ahead(draws[n], len(self.kept[n]), room) for n in some])
            text = self.writer.generate(begun, ahead, decoding, ends)
            for n, ids, mask in zip(some, *text, strict=True):
                # A row that has less room than the others of its batch is cut to it.
                responses[n] = torch.cat([self.kept[n], ids[mask]])[:most]
        return answered(rows, responses, self.model.pad)

    def sample(
        self, prompts: Tensor, length: int, *, draws: Tensor, decoding: Decoding = Decoding()
    ) -> Tensor:
        """As `CausalLM.sample`."""
        ids = torch.cat([prompts.cpu(), torch.zeros(len(prompts), length, dtype=torch.long)], 1)
        begun = torch.tensor([len(kept) for kept in self.kept])
        for tokens in begun.unique().tolist():
            some = (begun == tokens).nonzero().squeeze(1)
            told = torch.stack([self.kept[n] for n in some.tolist()])
            start = torch.cat([prompts.cpu()[some], told], 1)
            ids[some] = self.writer.sample(
                start, length - tokens, draws=draws[some, tokens:], decoding=decoding
            )
        return ids

    def _batches(self, prompts: list[int], most: int) -> Iterator[list[int]]:
        """Rows whose prompts, with what is kept, and the room of the longest answer the model can hold."""
        limit = getattr(self.model.model.config, "max_position_embeddings", None) or torch.inf
        batch, width = [], 0
        for n in sorted(range(len(prompts)), key=lambda n: len(self.kept[n])):
            wide = max(width, prompts[n] + len(self.kept[n]))
            if batch and wide + most - len(self.kept[batch[0]]) > limit:
                yield batch
                batch, wide = [], prompts[n] + len(self.kept[n])
            batch, width = [*batch, n], wide
        if batch:
            yield batch


def _ahead(draws: Tensor, begun: int, room: int) -> Tensor:
    """The draws of the tokens that are to come, [room]."""
    return pad(draws[begun : begun + room], (0, max(0, room - (len(draws) - begun))))
