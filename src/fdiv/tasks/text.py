"""Any text, cut into blocks of tokens: distillation of a real language model on a real corpus."""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.transformers import CausalLM, keep_layers, load_tokenizer
from fdiv.evaluate.calibration import ece_null, expected_calibration_error, reliability
from fdiv.evaluate.diversity import distinct_n
from fdiv.evaluate.intervals import bootstrap_interval
from fdiv.tasks._task import Text
from fdiv.tasks.sources import documents

ROWS = 1024  # tokens whose distributions are held at once in an evaluation
SHOWN = 4  # prompts whose continuations go into the report


@dataclass(frozen=True)
class Corpus:
    """Documents as blocks of `block` tokens; every token but a block's first is predicted.

    source, column, documents: what is read, see fdiv.tasks.sources.documents.
    tokenizer: where it comes from; None is the reference model's. Only a reference that is itself trained on
        the corpus first (`reference.data: train`) needs it named.
    held_out: the fraction of the text that is kept for evaluation, in whole documents (the end of the text
        where there is only one). Chosen by a hash of the text: the same for every seed and machine.
    vocabulary: "corpus" restricts loss, evaluation and sampling to the token ids that occur in the corpus:
        all distributions are then conditional on the next token being one of them. It costs a fraction of
        the full softmax, but the loss says nothing of the other ids, so that a student from it should be
        sampled under the same restriction. The models themselves stay whole. "full" uses every id.
    prompts: held-out beginnings (a quarter of a block) that each model continues to the end of the block,
        for the numbers on samples.
    """

    source: str = "pydoc"
    tokenizer: str | None = None
    block: int = 64
    held_out: float = 0.1
    vocabulary: str = "corpus"
    prompts: int = 32
    column: str = "text"
    documents: int | None = None

    def __post_init__(self):
        if self.vocabulary not in ("corpus", "full"):
            raise ValueError(f"vocabulary is 'corpus' or 'full', got {self.vocabulary!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a fraction between 0 and 1, got {self.held_out!r}")
        if self.block < 8 or self.prompts < 1:
            raise ValueError(f"block >= 8 and prompts >= 1, got {self.block}, {self.prompts}")

    # -- models -------------------------------------------------------------------------------------------

    def load(self, spec, seed: int, reference: Path | None = None) -> CausalLM:
        """The model of `spec`, with tokenizer and vocabulary; `reference` is the saved teacher."""
        if (spec.path, spec.hidden_size, spec.keep_layers).count(None) != 2:
            raise ValueError(f"give a model exactly one of path, hidden_size and keep_layers, got {spec}")
        if spec.path:
            return self.reopen(spec.path, spec, seed)
        if spec.keep_layers:
            if reference is None:
                raise ValueError("keep_layers cuts a student from the reference; the reference needs a path")
            model = self.reopen(reference, spec, seed)
            model.model = keep_layers(model.model, spec.keep_layers)
            return model
        tokenizer = self._tokenizer(reference)
        # A head may be larger than its tokenizer; a student's has to be as large as its teacher's.
        size = CausalLM.load(reference).model.config.vocab_size if reference else len(tokenizer)
        model = CausalLM.fresh(size, spec.hidden_size, spec.layers, spec.heads, seed)
        return self._with(model, tokenizer)

    def reopen(self, path: str | Path, spec, seed: int) -> CausalLM:
        """A model at a hub id, in a package, or saved."""
        return self._with(CausalLM.load(path, dtype=getattr(torch, spec.dtype)), self._tokenizer(path))

    def _tokenizer(self, path: str | Path | None):
        source = self.tokenizer or path
        if source is None:
            raise ValueError("write Corpus(tokenizer=...) with a hub id or folder: no model here brings one")
        return load_tokenizer(source)

    def _with(self, model: CausalLM, tokenizer) -> CausalLM:
        restricted = split(self, tokenizer).vocabulary if self.vocabulary == "corpus" else None
        return CausalLM(model.model, restricted, tokenizer)

    # -- data ---------------------------------------------------------------------------------------------

    def data(self, kind: str, count: int, generator: torch.Generator) -> Text:
        """At most `count` blocks of the training documents, in random order."""
        if kind != "train":
            raise ValueError(f"Corpus has data 'train', got {kind!r}")
        return _some(split(self, self._tokenizer(None)).train, count, generator)

    def responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        """At most `count` training blocks: the corpus itself stands for the teacher's responses."""
        return _some(split(self, teacher.tokenizer).train, count, generator)

    def rollouts(self, policy: CausalLM, groups: int, size: int, generator: torch.Generator) -> Text:
        """`size` continuations by `policy` of the beginnings of each of `groups` training blocks."""
        blocks = split(self, policy.tokenizer).train
        chosen = blocks[torch.randint(len(blocks), (groups,), generator=generator)].repeat_interleave(size, 0)
        ids = policy.sample(chosen[:, : self._start], self.block - self._start, generator)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, self._start :] = True
        return Text(ids, mask)

    @property
    def _start(self) -> int:
        """Tokens of a prompt."""
        return self.block // 4

    @property
    def _batch(self) -> int:
        """Blocks that are evaluated at once."""
        return max(1, ROWS // self.block)

    # -- measurement --------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, model: CausalLM, reference: CausalLM, measures: dict[str, Divergence], seed: int
    ) -> dict:
        """Next-token numbers on the held-out blocks, and what the reference thinks of the model's samples.

        The intervals are over blocks (or samples): what other text might have given, not other seeds.
        """
        model.model.eval()
        blocks = split(self, reference.tokenizer).held_out
        rows = self._rows(model, reference, blocks, measures)
        written, greedy = self._continuations(model, blocks, seed)
        likelihood = self._likelihood(reference, written)
        divergences = {name: float(rows[name].mean()) for name in measures}
        confidence, correct = rows["confidence"].ravel(), rows["correct"].ravel()
        scalars = {
            "perplexity": math.exp(rows["nll"].mean()),
            "teacher agreement": float(rows["agreement"].mean()),
            "entropy": float(rows["entropy"].mean()),
            "teacher NLL of samples": float(-likelihood.mean()),
            "distinct-2": distinct_n(written[:, self._start :].tolist(), 2),
            "ece": expected_calibration_error(confidence, correct),
            "ece_null": ece_null(confidence, seed=seed, resamples=50),
        }
        errors = {name: _error(rows[name]) for name in (*measures, "entropy")}
        errors["perplexity"] = _error(rows["nll"], lambda x: math.exp(x.mean()))
        errors["teacher agreement"] = _error(rows["agreement"])
        errors["teacher NLL of samples"] = _error(-likelihood)
        errors["ece"] = _error(np.stack([rows["confidence"], rows["correct"]], -1), _ece)
        bins = reliability(confidence, correct)
        return {
            "exact": False,
            "scalars": scalars | divergences,
            "scalar_errors": errors,
            "divergences": divergences,
            "calibration": {"ece": scalars["ece"], "ece_null": scalars["ece_null"], "bins": bins},
            "curves": {},
            "samples": self._samples(model, written, greedy),
        }

    def _rows(self, model, reference, blocks, measures) -> dict[str, np.ndarray]:
        """One number a predicted token, each [blocks, block - 1]; distributions live a few blocks long."""
        parts = []
        for ids in blocks.split(self._batch):
            ids = ids.to(model.model.device)
            mask = _predicted(ids)
            log_q = model.log_softmax(ids, mask)
            log_p = log_q if model is reference else reference.log_softmax(ids, mask)
            label, (confidence, guess) = model.labels(ids, mask), log_q.max(-1)
            part = {name: divergence(log_p, log_q) for name, divergence in measures.items()}
            part["nll"] = -log_q.gather(-1, label.unsqueeze(-1)).squeeze(-1)
            part["entropy"] = -(log_q.exp() * log_q).sum(-1)
            part["agreement"] = (guess == log_p.argmax(-1)).float()
            part["confidence"], part["correct"] = confidence.exp(), (guess == label).float()
            parts.append({name: t.reshape(len(ids), -1).double().cpu() for name, t in part.items()})
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}

    def _continuations(self, model: CausalLM, blocks: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(sampled, greedy) continuations of held-out beginnings, evenly spread over the blocks."""
        places = torch.linspace(0, len(blocks) - 1, min(self.prompts, len(blocks))).long()
        prompts, length = blocks[places, : self._start], self.block - self._start
        generator = torch.Generator().manual_seed(seed)
        return model.sample(prompts, length, generator), model.sample(prompts[_shown(prompts)], length)

    def _likelihood(self, reference: CausalLM, ids: Tensor) -> np.ndarray:
        """log p of each sampled token, [samples, tokens]."""
        mask = _predicted(ids)
        mask[:, : self._start] = False
        pairs = zip(ids.split(self._batch), mask.split(self._batch), strict=True)
        device = reference.model.device
        rows = torch.cat([reference.token_log_probs(i.to(device), m.to(device)) for i, m in pairs])
        return rows.reshape(len(ids), -1).double().cpu().numpy()

    def _samples(self, model: CausalLM, written: Tensor, greedy: Tensor) -> list[dict]:
        def text(ids):
            return model.tokenizer.decode(ids, skip_special_tokens=True)

        return [
            {
                "prompt": text(best[: self._start]),
                "outputs": [
                    f"[greedy] {text(best[self._start :])}",
                    f"[sampled] {text(drawn[self._start :])}",
                ],
                "valid": None,
            }
            for best, drawn in zip(greedy, written[_shown(written)], strict=True)
        ]


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


def separate(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """(training, held-out) documents, both in the order given; equal documents stay on one side."""
    unique = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(unique) == 1:
        cut = round(len(unique[0]) * (1 - fraction))
        return [unique[0][:cut]], [unique[0][cut:]]
    wanted, held = fraction * sum(map(len, unique)), set()
    for text in unique[:-1]:
        if sum(map(len, held)) + len(text) / 2 < wanted or not held:
            held.add(text)
    return [t for t in texts if t not in held], [t for t in texts if t in held]


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


def _shown(rows: Tensor) -> Tensor:
    return torch.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).long()


def _error(items: np.ndarray, statistic=np.mean) -> float:
    """Standard error by bootstrap over blocks or samples, the first dimension."""
    _, low, high = bootstrap_interval(items, statistic, level=0.6827, resamples=300)
    return (high - low) / 2


def _ece(pairs: np.ndarray) -> float:
    return expected_calibration_error(pairs[..., 0], pairs[..., 1])
