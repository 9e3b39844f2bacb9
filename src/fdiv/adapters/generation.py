"""Answers drawn by inversion of the cumulative probabilities: each is made of its own uniform numbers alone.

Token t of answer i is the first one up to which the probabilities, summed in float64 in the order of the
vocabulary, exceed draws[i, t].
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fdiv.adapters.reading import Reader, plainly
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text
from fdiv.tasks.padding import answered, lengths, rows_of

if TYPE_CHECKING:
    from fdiv.adapters.transformers import CausalLM

ROWS = 1024  # distributions in float64 at once


@dataclass(frozen=True, eq=False)
class Writer:
    """Writes each token from sum_i shares[i] * models[i], one model or a mixture of several.

    A temperature is applied to each model, top-k and top-p to their mixture. The first model decides on
    tokenizer, vocabulary and ends; of more than one, a greedy answer is not defined.
    """

    models: "tuple[CausalLM, ...]"
    shares: tuple[float, ...] = (1.0,)

    @property
    def tokenizer(self) -> Any:
        return self.models[0].tokenizer

    @property
    def ends(self) -> tuple[int, ...]:
        return self.models[0].ends

    def generate(
        self,
        prompts: Text,
        draws: Tensor,
        decoding: Decoding = Decoding(),
        ends: tuple[int, ...] | None = None,
    ) -> Text:
        """As `CausalLM.generate`."""
        return self.generate_with_log_probs(prompts, draws, decoding, ends)[0]

    @torch.no_grad()
    def generate_with_log_probs(
        self,
        prompts: Text,
        draws: Tensor,
        decoding: Decoding = Decoding(),
        ends: tuple[int, ...] | None = None,
    ) -> tuple[Text, Tensor]:
        """As `CausalLM.generate_with_log_probs`; the loop is `model.generate` of transformers."""
        self._check(decoding, draws, len(prompts.ids), draws.shape[1])
        model, ends = self.models[0], self.ends if ends is None else ends
        ids, attended = _left_padded(prompts.ids, model.pad)
        width, steps, device = ids.shape[1], draws.shape[1], model.model.device
        model.check_length(width + steps)
        choice = Choice(self, draws, decoding, attended)
        options = GenerationConfig(
            max_new_tokens=steps, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=model.pad
        )
        with plainly(*self.models):
            network: Any = model.model
            written = network.generate(
                ids.to(device),
                attention_mask=attended.to(device),
                generation_config=options,
                logits_processor=LogitsProcessorList([choice]),
                synced_gpus=False,
            )
        tokens = written[:, width:].cpu()
        used = _used(tokens, ends)
        responses = [row[:n] for row, n in zip(tokens, used.tolist(), strict=True)]
        log_probs = torch.stack(choice.log_probs, 1).cpu()[:, : tokens.shape[1]]
        told = torch.arange(tokens.shape[1]) < used.unsqueeze(1)
        return answered(rows_of(prompts), responses, model.pad), log_probs[told]

    @torch.no_grad()
    def sample(
        self,
        prompts: Tensor,
        length: int,
        generator: torch.Generator | None = None,
        *,
        draws: Tensor | None = None,
        decoding: Decoding = Decoding(),
    ) -> Tensor:
        """As `CausalLM.sample`."""
        if generator is not None and draws is not None:
            raise ValueError("give a generator, or the draws themselves, not both")
        if generator is not None:
            draws = torch.rand(len(prompts), length, generator=generator, dtype=torch.float64)
        if draws is None:
            decoding = Decoding(temperature=0)
            draws = torch.zeros(len(prompts), length)
        self._check(decoding, draws, len(prompts), length)
        ids, fresh = prompts.cpu(), prompts
        readers = [Reader(model) for model in self.models]
        with plainly(*self.models):
            for step in range(length):
                log_probs = decoded([reader(fresh).cpu() for reader in readers], self.shares, decoding)
                index, _ = chosen(log_probs, draws[:, step], decoding)
                fresh = self.models[0].tokens(index).unsqueeze(1)
                ids = torch.cat([ids, fresh], 1)
        return ids

    @torch.no_grad()
    def drawn_log_probs(self, ids: Tensor, mask: Tensor, decoding: Decoding = Decoding()) -> Tensor:
        """As `CausalLM.drawn_log_probs`."""
        labels = self.models[0].labels(ids, mask)
        if decoding.temperature == 0:
            return torch.zeros(len(labels), device=labels.device)
        rows = [model.log_softmax(ids, mask).to(labels.device).split(ROWS) for model in self.models]
        told = [
            decoded(list(some), self.shares, decoding).gather(-1, index.unsqueeze(-1))
            for index, *some in zip(labels.split(ROWS), *rows, strict=True)
        ]
        return torch.cat(told).squeeze(-1).float()

    def _check(self, decoding: Decoding, draws: Tensor, rows: int, length: int) -> None:
        if draws.shape != (rows, length):
            raise ValueError(
                f"{rows} answers of {length} tokens need as many draws, got {tuple(draws.shape)}"
            )
        if not bool(((draws >= 0) & (draws < 1)).all()):
            raise ValueError("draws are uniform numbers in [0, 1); these are not")
        if len(self.models) > 1 and decoding.temperature == 0:
            raise ValueError("a mixture has no greedy answer, only its parts do; write a temperature > 0")


class Choice(LogitsProcessor):
    """Leaves each row one token, the drawn one, and keeps its log-probability."""

    def __init__(self, writer: Writer, draws: Tensor, decoding: Decoding, attended: Tensor):
        self.writer, self.draws, self.decoding = writer, draws, decoding
        self.width = attended.shape[1]
        self.others = [Reader(model, attended) for model in writer.models[1:]]
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step, model = input_ids.shape[1] - self.width, self.writer.models[0]
        fresh = input_ids[:, -1:] if step else input_ids
        rows = [model.restricted(scores), *(reader(fresh).to(scores.device) for reader in self.others)]
        log_probs = decoded(rows, self.writer.shares, self.decoding)
        index, log_prob = chosen(log_probs, self.draws[:, step], self.decoding)
        self.log_probs.append(log_prob)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, model.tokens(index).unsqueeze(1), 0.0)


def decoded(rows: list[Tensor], shares: tuple[float, ...], decoding: Decoding) -> Tensor:
    """Log-probabilities [B, vocab] that tokens are drawn from, in float64; rows: each model's logits."""
    none: Any = None  # what was written before; these warpers do not read it
    scores = [row.double() for row in rows]
    if decoding.temperature:
        scores = [TemperatureLogitsWarper(float(decoding.temperature))(none, row) for row in scores]
    if len(scores) > 1:
        parts = [row.log_softmax(-1) + math.log(s) for row, s in zip(scores, shares, strict=True) if s]
        scores = [torch.stack(parts).logsumexp(0)]
    if decoding.top_k is not None:
        scores = [TopKLogitsWarper(decoding.top_k)(none, row) for row in scores]
    if decoding.top_p < 1:
        scores = [TopPLogitsWarper(decoding.top_p)(none, row) for row in scores]
    return scores[0].log_softmax(-1)


def chosen(log_probs: Tensor, uniform: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """(index, its log-probability as it is drawn), [B] each; greedily it is the likeliest, with certainty."""
    if decoding.temperature == 0:
        index = log_probs.argmax(-1)
        return index, torch.zeros(len(index), device=index.device)
    index = inverted(log_probs, uniform)
    return index, log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1).float()


def inverted(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """The first index up to which the probabilities [B, vocab] exceed `uniform` [B] of their sum."""
    below = log_probs.exp().cumsum(-1)
    # In float64 u * sum < sum for every u < 1: the token that is found has probability.
    level = uniform.to(below).unsqueeze(-1) * below[:, -1:]
    return torch.searchsorted(below, level, right=True).squeeze(-1)


def _left_padded(prompts: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """(ids, 1 where they are real and 0 elsewhere), [N, S], of prompts that are padded on the right."""
    count, prompts = lengths(prompts), prompts.cpu()
    width = int(count.max())
    source = torch.arange(width) - (width - count).unsqueeze(1)
    ids = prompts.gather(1, source.clamp(min=0))
    return torch.where(source >= 0, ids, pad), (source >= 0).long()


def _used(tokens: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Tokens of each row [N, T] up to the first of `ends`, with it: [N]."""
    stops = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype)).long()
    return (stops.cumsum(1) - stops == 0).sum(1)
