"""Models for a task on text: teachers, students cut from them or fresh, and the tokenizer that they share."""

from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM, keep_layers, load_tokenizer


class TextTask(Protocol):
    """What is asked of the task; it is hashable."""

    @property
    def tokenizer(self) -> str | None: ...

    @property
    def positions(self) -> int:
        """The longest text, in tokens, that a model will read."""
        ...

    def restriction(self, tokenizer) -> Tensor | None:
        """The ids that models are restricted to, if they are."""
        ...


def load(task: TextTask, spec, seed: int, reference: str | Path | None) -> CausalLM:
    """The model of `spec`, with tokenizer and vocabulary; `reference` is the saved teacher."""
    if (spec.path, spec.hidden_size, spec.keep_layers).count(None) != 2:
        raise ValueError(f"give a model exactly one of path, hidden_size and keep_layers, got {spec}")
    if spec.path:
        if reference is not None and task.tokenizer is None:
            _check_alike(task, spec.path, reference)
        return reopen(task, spec.path, spec)
    if spec.keep_layers:
        if reference is None:
            raise ValueError("keep_layers cuts a student from the reference; the reference needs a path")
        model = reopen(task, reference, spec)
        model.model = keep_layers(model.model, spec.keep_layers)
        return model
    tokenizer = tokenizer_of(task, reference)
    # A head may be larger than its tokenizer; a student's has to be as large as its teacher's.
    size = CausalLM.load(reference).model.config.vocab_size if reference else len(tokenizer)
    positions = max(64, task.positions)
    model = CausalLM.fresh(size, spec.hidden_size, spec.layers, spec.heads, seed, positions)
    return CausalLM(model.model, task.restriction(tokenizer), tokenizer)


def reopen(task: TextTask, path: str | Path, spec) -> CausalLM:
    """A model at a hub id, in a package, or saved."""
    tokenizer = tokenizer_of(task, path)
    model = CausalLM.load(path, dtype=getattr(torch, spec.dtype)).model
    return CausalLM(model, task.restriction(tokenizer), tokenizer)


_opened: dict[TextTask, Any] = {}


def tokenizer_of(task: TextTask, path: str | Path | None = None) -> Any:
    """That which the task names, or that of the model at `path`, or of the model that was opened last."""
    known, source = _opened.get(task), task.tokenizer or path
    if source is None:
        if known is None:
            name = type(task).__name__
            raise ValueError(f"write {name}(tokenizer=...) with a hub id or folder: no model here brings one")
        return known
    if task.tokenizer and known is not None:
        return known
    found = load_tokenizer(source)
    if known is not None and _character(known) == _character(found):
        return known  # one object, so that text is tokenized once
    _opened[task] = found
    return found


def check_writer(task: TextTask, writer: Any) -> None:
    """Raise unless the writer reads prompts in the tokens that the task wrote them in."""
    known = _opened.get(task)
    if known is not None and not _alike(task, known, writer.tokenizer):
        raise ValueError(
            f"the writer has another tokenizer than the model that was opened last for {task}, which the "
            "prompts were made with; name the one that is meant: tokenizer=..."
        )


def comparable(model: CausalLM, reference: CausalLM) -> CausalLM | None:
    """The reference, if ids mean the same to both models."""
    one, two = (_character(m.tokenizer)[0] for m in (model, reference))
    return reference if one == two else None


def _alike(task: TextTask, one: Any, two: Any) -> bool:
    """Whether ids mean the same to both and, where the task has them, conversations look the same."""
    if one is two:
        return True
    chat = getattr(task, "template", None) == "chat"
    (mine, _, my_template), (theirs, _, their_template) = _character(one), _character(two)
    return mine == theirs and (not chat or my_template == their_template)


@lru_cache(maxsize=16)
def _character(tokenizer: Any) -> tuple[tuple, tuple, str | None]:
    """(all tokens, the special ones, the chat template)"""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tuple(sorted(tokenizer.get_vocab().items())), special, tokenizer.chat_template


def _check_alike(task: TextTask, student: str | Path, teacher: str | Path) -> None:
    mine, theirs = load_tokenizer(student), load_tokenizer(teacher)
    if mine.get_vocab() != theirs.get_vocab():  # for a method that reads both; the others refuse it
        return
    if not _alike(task, mine, theirs):
        raise ValueError(
            f"the student {student} has another chat template than its teacher; name the tokenizer whose "
            "template both are to use: tokenizer=..."
        )
