"""Any text, cut into blocks of tokens: distillation of a real language model on a real corpus."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.transformers import CausalLM
from fdiv.sample._sampler import Decoding
from fdiv.tasks import opening
from fdiv.tasks._task import Text
from fdiv.tasks.measurement import measured, spread
from fdiv.tasks.opening import tokenizer_of
from fdiv.tasks.prompting import rollouts
from fdiv.tasks.sources import documents, separate


@dataclass(frozen=True)
class Corpus:
    """Documents as blocks of `block` tokens; every token but a block's first is predicted.

    source, column, documents: what is read, see fdiv.tasks.sources.documents.
    tokenizer: where it comes from; None is that of the model that was opened last. Only a fresh reference
        needs it named.
    held_out: the fraction of the text that is kept for evaluation, in whole documents (the end of the text
        where there is only one). Chosen by a hash of the text: the same for every seed and machine.
    vocabulary: "corpus" restricts loss, evaluation and sampling to the token ids that occur in the corpus:
        all distributions are then conditional on the next token being one of them. It costs a fraction of
        the full softmax, but the loss says nothing of the other ids, so that a student from it should be
        sampled under the same restriction. The models themselves stay whole. "full" uses every id.
    continuations: held-out beginnings (a quarter of a block) that each model continues to the end of the
        block, for the numbers on samples.
    """

    source: str = "pydoc"
    tokenizer: str | None = None
    block: int = 64
    held_out: float = 0.1
    vocabulary: str = "corpus"
    continuations: int = 32
    column: str = "text"
    documents: int | None = None

    def __post_init__(self):
        if self.vocabulary not in ("corpus", "full"):
            raise ValueError(f"vocabulary is 'corpus' or 'full', got {self.vocabulary!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a fraction between 0 and 1, got {self.held_out!r}")
        if self.block < 8 or self.continuations < 1:
            raise ValueError(f"block >= 8 and continuations >= 1, got {self.block}, {self.continuations}")

    # -- models -------------------------------------------------------------------------------------------

    def load(self, spec, seed: int, reference: Path | None = None) -> CausalLM:
        """The model of `spec`, with tokenizer and vocabulary; `reference` is the saved teacher."""
        return opening.load(self, spec, seed, reference)

    def reopen(self, path: str | Path, spec, seed: int) -> CausalLM:
        """A model at a hub id, in a package, or saved."""
        return opening.reopen(self, path, spec)

    def restriction(self, tokenizer) -> Tensor | None:
        return split(self, tokenizer).vocabulary if self.vocabulary == "corpus" else None

    @property
    def positions(self) -> int:
        return self.block

    # -- data ---------------------------------------------------------------------------------------------

    def data(self, kind: str, count: int, generator: torch.Generator) -> Text:
        """At most `count` blocks of the training documents, in random order."""
        if kind != "train":
            raise ValueError(f"Corpus has data 'train', got {kind!r}")
        return _some(split(self, tokenizer_of(self)).train, count, generator)

    def responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        """At most `count` training blocks: the corpus itself stands for the teacher's responses."""
        return _some(split(self, teacher.tokenizer).train, count, generator)

    def held_out_responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        """At most `count` blocks that are not trained on."""
        return _some(split(self, teacher.tokenizer).held_out, count, generator)

    # -- answers ------------------------------------------------------------------------------------------

    @property
    def answer_length(self) -> int:
        return self.block - self._start

    def prompts(self, count: int, generator: torch.Generator) -> Text:
        """The beginnings of `count` training blocks."""
        blocks = split(self, tokenizer_of(self)).train
        return self._beginnings(blocks[torch.randint(len(blocks), (count,), generator=generator)])

    def answer(self, model, prompts: Text, draws: Tensor, decoding: Decoding) -> Text:
        """Each beginning, continued to the end of its block."""
        opening.check_writer(self, model)
        ids = model.sample(prompts.ids, self.answer_length, draws=draws, decoding=decoding)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, self._start :] = True
        return Text(ids, mask)

    def rollouts(self, policy: CausalLM, groups: int, size: int, generator: torch.Generator) -> Text:
        """`size` continuations by `policy` of the beginnings of each of `groups` training blocks."""
        return rollouts(self, policy, groups, size, generator)

    def _beginnings(self, blocks: Tensor) -> Text:
        ids = blocks[:, : self._start]
        return Text(ids, torch.zeros_like(ids, dtype=torch.bool))

    @property
    def _start(self) -> int:
        """Tokens of a prompt."""
        return self.block // 4

    # -- measurement --------------------------------------------------------------------------------------

    def evaluate(
        self, model: CausalLM, reference: CausalLM, measures: dict[str, Divergence], seed: int
    ) -> dict:
        """Next-token numbers on the held-out blocks, and what the reference thinks of the model's samples."""
        shared = opening.comparable(model, reference)
        blocks = split(self, (shared or model).tokenizer).held_out
        prompts = self._beginnings(blocks[spread(len(blocks), self.continuations)])
        held_out = Text(blocks, _predicted(blocks))
        return measured(self, model, shared, held_out, prompts, measures, seed)[0]


class Split(NamedTuple):
    """Blocks of tokens, [blocks, block] each, and the ids that occur in either, ascending."""

    train: Tensor
    held_out: Tensor
    vocabulary: Tensor


@lru_cache(maxsize=8)
def split(task: Corpus, tokenizer) -> Split:
    """The corpus of a task in the tokens of a tokenizer."""
    train, held_out = separate(documents(task.source, task.column, task.documents), task.held_out)
    blocks = [_blocks(texts, task.block, tokenizer) for texts in (train, held_out)]
    if not all(len(b) for b in blocks):
        counts = f"{len(blocks[0])} blocks to train on and {len(blocks[1])} held out"
        raise ValueError(f"{task} gives {counts}: take more text, a shorter block or another held_out")
    train_blocks, held_out_blocks = blocks
    return Split(train_blocks, held_out_blocks, torch.cat(blocks).unique())


def _blocks(texts: list[str], block: int, tokenizer) -> Tensor:
    """The documents behind each other, an end-of-text token after each, cut; the rest is left out."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids = torch.tensor(list(chain.from_iterable(row + end for row in rows)), dtype=torch.long)
    return ids[: len(ids) // block * block].reshape(-1, block)


def _some(blocks: Tensor, count: int, generator: torch.Generator) -> Text:
    ids = blocks[torch.randperm(len(blocks), generator=generator)[:count]]
    return Text(ids, _predicted(ids))


def _predicted(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    return mask
