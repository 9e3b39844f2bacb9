"""The grammar with one token more, which takes back the token before it.

Data hold wrong tokens and their backspaces, so that a model can learn to correct itself. An answer is over as
soon as `length` symbols stand; models read all that was written, as it was written.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.transformers import CausalLM
from fdiv.evaluate.pass_at_k import pass_at_k
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text
from fdiv.tasks.backspace import collapsed, left, noised, unasked
from fdiv.tasks.grammar import LETTERS, PROMPT, Grammar
from fdiv.tasks.prompting import rollouts, uniform

SIZE = 32  # answers to each prompt in an evaluation
NOISED = 1024  # texts of data in one


@dataclass(frozen=True)
class Backspaced:
    """`noise`: the chance of a wrong token before each symbol of the data, but for the last.

    Behind the last symbol the answer is over, so that nothing could take it back.
    """

    task: Grammar = field(default_factory=Grammar)
    noise: float = 0.1

    def __post_init__(self):
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise is a chance in [0, 1], got {self.noise!r}")

    @property
    def backspace(self) -> int:
        return self.task.vocab_size

    @property
    def answer_length(self) -> int:
        """Room for a wrong token and its backspace before each symbol but the last."""
        return 3 * self.task.length - 2

    # -- models and data ------------------------------------------------------------------------------------

    def load(self, spec, seed: int, reference: Path | None = None) -> CausalLM:
        if not spec.hidden_size or spec.path or spec.keep_layers:
            raise ValueError(
                f"Backspaced has a vocabulary of its own: give the model a hidden_size, got {spec}"
            )
        return CausalLM.fresh(self.backspace + 1, spec.hidden_size, spec.layers, spec.heads, seed)

    def reopen(self, path: Path, spec, seed: int) -> CausalLM:
        return CausalLM.load(path)

    def data(self, kind: str, count: int, generator: torch.Generator) -> Text:
        """The grammar's, with noise; the mask is true on backspaces and false on what they take back."""
        return unasked(self._noised(self.task.data(kind, count, generator), generator), self.backspace)

    def responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        """The same of the truth, with the mask true on wrong tokens too: they are steps of a trajectory."""
        return self._noised(self.task.data("truth", count, generator), generator)

    def _noised(self, text: Text, generator: torch.Generator) -> Text:
        symbols = torch.arange(1, self.backspace)
        return noised(text, self.noise, symbols, self.backspace, generator, spare=1)

    def prompts(self, count: int, generator: torch.Generator) -> Text:
        return self.task.prompts(count, generator)

    def answer(self, model, prompts: Text, draws: Tensor, decoding: Decoding) -> Text:
        """Up to the symbol with which the answer is whole, or else of `answer_length` tokens."""
        ids = model.sample(prompts.ids, self.answer_length, draws=draws, decoding=decoding)
        return Text(ids, self._until_whole(ids))

    def rollouts(self, policy: CausalLM, groups: int, size: int, generator: torch.Generator) -> Text:
        return rollouts(self, policy, groups, size, generator)

    def verify(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Whether what is left of each answer is valid."""
        text = collapsed(Text(ids, self._until_whole(ids) if mask is None else mask), self.backspace)
        whole = text.mask.sum(1) == self.task.length
        verdict = torch.zeros(len(ids))
        if whole.any():
            verdict[whole] = self.task.verify(text.ids[whole, : PROMPT + self.task.length])
        return verdict

    def _until_whole(self, ids: Tensor) -> Tensor:
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, mark in zip(ids[:, PROMPT:].tolist(), mask, strict=True):
            depths = [len(kept) for kept in left(row, self.backspace)]
            end = depths.index(self.task.length) if self.task.length in depths else len(row)
            mark[PROMPT : PROMPT + end] = True
        return mask

    # -- measurement ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, model: CausalLM, reference: CausalLM, measures: dict[str, Divergence], seed: int
    ) -> dict:
        """On samples of answers, and of data with noise, where the divergences are of the next token."""
        generator = torch.Generator().manual_seed(seed)
        prompts = self.task.prompt_ids()[: self.task.trained_on].repeat_interleave(SIZE, 0)
        draws = uniform(len(prompts), self.answer_length, generator)
        text = self.answer(model, Text(prompts, torch.zeros_like(prompts).bool()), draws, Decoding())
        valid = self.verify(*text)
        right = valid.reshape(-1, SIZE).sum(1).numpy()
        backspaces = ((text.ids == self.backspace) & text.mask).sum(1)
        unfinished = collapsed(text, self.backspace).mask.sum(1) < self.task.length
        scalars = {
            "pass@1": float(valid.mean()),
            "pass@8": float(np.mean(pass_at_k(right, SIZE, 8))),
            "backspaces": backspaces.double().mean().item(),
            "unfinished": unfinished.double().mean().item(),
        }
        divergences, undone = self._on_data(model, reference, measures, generator)
        return {
            "exact": False,
            "scalars": scalars | undone | divergences,
            "divergences": divergences,
            "curves": {},
            "samples": self._samples(text, valid),
        }

    def _on_data(self, model: CausalLM, reference: CausalLM, measures, generator: torch.Generator):
        """(divergences, how likely a backspace is behind a wrong token, and behind a right one)"""
        text = self.responses(reference, NOISED, generator)
        log_p, log_q = (m.log_softmax(*text).cpu() for m in (reference, model))
        divergences = {name: d(log_p, log_q).mean().item() for name, d in measures.items()}
        takes_back = text.ids[:, 1:][text.mask[:, 1:]] == self.backspace
        chance = log_q[:, self.backspace].exp()
        behind_right = ~takes_back & text.mask[:, :-1][text.mask[:, 1:]]  # some token of the answer
        undone = {"undoes wrong": chance[takes_back], "undoes right": chance[behind_right]}
        return divergences, {name: rows.double().mean().item() for name, rows in undone.items()}

    def _samples(self, text: Text, valid: Tensor, prompts: int = 4, size: int = 6) -> list[dict]:
        names = {0: "^", self.backspace: "<"}
        told = [
            " ".join(names.get(i) or LETTERS[i - 1] for i in row[mark].tolist())
            for row, mark in zip(*text, strict=True)
        ]
        return [
            {
                "prompt": " ".join(LETTERS[i - 1] for i in text.ids[first, 1:PROMPT].tolist()),
                "outputs": told[first : first + size],
                "valid": valid[first : first + size].bool().tolist(),
            }
            for first in range(0, min(prompts * SIZE, len(told)), SIZE)
        ]
