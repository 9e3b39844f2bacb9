"""The teacher's weights are here: it is asked anew each time, a few rows at a time."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import linear

from fdiv.adapters.transformers import CausalLM
from fdiv.estimate._estimator import Estimator
from fdiv.estimate._stream import CPU_BYTES, CUDA_BYTES
from fdiv.estimate.sampled_logits import SampledLogits
from fdiv.estimate.top_k import TopK
from fdiv.teachers._sample import predicted, samples
from fdiv.teachers._signal import (
    TeacherError,
    TeacherSignal,
    Terms,
    Vocabulary,
    atoms_of,
    support_of,
)

READ_TOKENS = 16384  # that the backbone reads at once
CELL_BYTES = 24  # of logits and of what is made of them: a cumulative sum in float64
FEWEST_ROWS = 64  # at once: each chunk reads the whole head
PADDING = 1e-3  # mass on padding that is warned about


@dataclass(frozen=True)
class Local:
    """The reference model in memory: whatever an estimator reads, at any temperature."""

    def open(self, estimator: Estimator, temperature: float, reference: CausalLM | None) -> "LocalTeacher":
        if reference is None:
            raise TeacherError(
                "Local() asks a model in memory and there is none; pass the reference, or write "
                "Cached(folder) or Served(url, model)"
            )
        return LocalTeacher(reference, estimator, temperature)


class LocalTeacher:
    """Holds tokens x vocabulary only if the estimator reads it; reads the model's weights as they are now.

    Hidden states are as the model gives them: whoever reads them divides by the temperature. Drawn atoms
    depend on the sequence alone, not on its batch nor on torch's global generator.
    """

    def __init__(self, model: CausalLM, estimator: Estimator, temperature: float):
        support = support_of(estimator)
        self.model, self.of, self.temperature = model, atoms_of(support), temperature
        self.terms = Terms(Vocabulary.of(model), temperature, support, model.fingerprint())
        self.padding_mass = 0.0  # the largest mean that a chunk of rows had beyond the vocabulary
        self._watched = False

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> TeacherSignal:
        ids, mask = predicted(ids, mask)
        with _evaluating(self.model.model):
            evidence = self._heads(ids, mask) if self.terms.support == "heads" else self._rows(ids, mask)
        return TeacherSignal(evidence, self.terms)

    def _heads(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self._hidden(ids, mask)
        if not self._watched and len(hidden):  # a few rows tell
            self._watch(_logits(hidden[:: 1 + len(hidden) // FEWEST_ROWS], _whole_head(self.model)))
        return {"p_hidden": hidden, "p_weight": self.model.head}

    def _rows(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        labels, uniform = self.model.labels(ids, mask), self._uniform(ids, mask)
        parts, start = [], 0
        for log_p in self._log_probs(ids, mask):
            rows = slice(start, start + len(log_p))
            parts.append(self._seen(log_p, labels[rows], uniform[rows]))
            start = rows.stop
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _seen(self, log_p: Tensor, labels: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        """What the estimator reads of log_p [rows, size]."""
        if self.terms.support == "logits":
            return {"log_p": log_p}
        if self.terms.support == "labels":
            return {"log_p": log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)}
        if isinstance(self.of, TopK):
            top = log_p.topk(min(self.of.k, log_p.shape[-1]))
            return {"index": top.indices, "log_p": top.values}
        index = drawn(log_p, uniform)
        log_atoms = log_p.gather(-1, index)
        return {"index": index, "log_p": log_atoms, "log_weight": -log_atoms - math.log(uniform.shape[-1])}

    def _uniform(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[rows, n] in [0, 1), each sequence's from its own generator; n = 0 unless atoms are drawn."""
        n = self.of.n if isinstance(self.of, SampledLogits) else 0
        parts = [
            torch.rand(s.tokens, n, dtype=torch.float64, generator=s.generator())
            for s in (samples(ids, mask) if n else ())
        ]
        every = torch.cat(parts) if parts else torch.zeros(int(mask[:, 1:].sum()), n, dtype=torch.float64)
        return every.to(self.model.model.device)

    # -- the model, in slices -------------------------------------------------------------------------------

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        size = max(1, READ_TOKENS // ids.shape[1])
        return torch.cat(
            [self.model.hidden(*part) for part in zip(ids.split(size), mask.split(size), strict=True)]
        )

    def _log_probs(self, ids: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """log_p [rows, size] in float32 at the temperature, a few rows at a time."""
        size = self.terms.vocabulary.size
        for logits in self._plain(ids, mask) if self.model.has_plain_head else self._whole(ids, mask):
            self._watch(logits)
            yield (logits[:, :size] / self.temperature).log_softmax(-1)

    def _plain(self, ids: Tensor, mask: Tensor) -> Iterator[Tensor]:
        hidden, head = self._hidden(ids, mask), _whole_head(self.model)
        step = max(FEWEST_ROWS, _budget(hidden) // (CELL_BYTES * len(head)))
        for start in range(0, max(1, len(hidden)), step):
            yield _logits(hidden[start : start + step], head)

    def _whole(self, ids: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """Of a head that does more than multiply: logits of whole sequences, of one at least."""
        per_sequence = CELL_BYTES * self.model.rows * ids.shape[1]
        size = max(1, _budget(ids.to(self.model.model.device)) // per_sequence)
        for part, chosen in zip(ids.split(size), mask.split(size), strict=True):
            logits = self.model.model(input_ids=part.to(self.model.model.device)).logits
            logits = logits[:, :-1][chosen[:, 1:].to(logits.device)].float()
            yield logits if self.model.vocabulary is None else self.model.restricted(logits)

    def _watch(self, logits: Tensor) -> None:
        """Measure the mass beyond the vocabulary, and say so once if it is more than rounding."""
        size = self.terms.vocabulary.size
        self._watched = True
        if logits.shape[-1] <= size or not len(logits):
            return
        mass = (logits[:, size:].logsumexp(-1) - logits.logsumexp(-1)).exp().mean().item()
        if mass > PADDING >= self.padding_mass:
            warnings.warn(
                f"the teacher puts a mass of {mass:.2g} on the {logits.shape[-1] - size} rows of its head "
                f"beyond the {size} tokens of its tokenizer; they are cut off before the softmax. Is this "
                "the tokenizer that it was trained with?",
                stacklevel=2,
            )
        self.padding_mass = max(mass, self.padding_mass)


def drawn(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Atoms [rows, n], ascending, of densities [rows, vocab], by inverting their cumulative sums."""
    # In float64: float32 never draws an atom of less than 1e-7, and rounds the sums of a large vocabulary.
    below = log_p.double().exp().cumsum(-1)
    index = torch.searchsorted(below, uniform * below[:, -1:], right=True)
    return index.clamp(max=log_p.shape[-1] - 1).sort(-1).values


def _whole_head(model: CausalLM) -> Tensor:
    """The head in float32, with the rows that only fill it up."""
    padded = model.vocabulary is None and model.rows > model.size
    head = cast(Linear, model.model.get_output_embeddings()).weight if padded else model.head
    return head.float()


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden.float(), head)


def _budget(tensor: Tensor) -> int:
    return CUDA_BYTES if tensor.is_cuda else CPU_BYTES


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, whatever the model is used for otherwise."""
    training = model.training
    try:
        if training:
            model.eval()
        yield
    finally:
        if training:
            model.train()
