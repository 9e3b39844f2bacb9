"""What teacher and student say about the tokens of a part: the tensors that estimators and methods read."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.estimate.monte_carlo import MonteCarlo
from fdiv.feeds._feed import READ_ROWS, READ_TOKENS, Part, chunks, sequence_of
from fdiv.sample._sampler import Decoding
from fdiv.sample.fixed import TeacherMixed
from fdiv.tasks._task import Text
from fdiv.teachers._signal import Teacher, Vocabulary, atoms_of

if TYPE_CHECKING:
    from fdiv.feeds.responses import Responses

AT_ONCE = 2 << 30  # bytes of signal that `signal: auto` holds in memory


class Signals:
    """The evidence of a method's estimator at a part's tokens.

    What the teacher says about fixed text is asked once, if it fits in memory, and kept on disk for the
    other members where it is small.
    """

    def __init__(self, feed: "Responses"):
        self.feed, self.method = feed, feed.method
        self.estimator: Any = getattr(feed.method, "estimator", None)
        self.temperature = getattr(feed.method, "temperature", 1.0)
        self.sees = self.estimator.sees if self.estimator else None
        self.teacher = None
        if self.sees in ("logits", "heads"):
            self.teacher = feed.source.open(self.estimator, self.temperature, feed.teacher.model)
        self.scorer: Teacher | None = None  # tells the tokens' own log-probabilities
        self.checked = False
        self.stored: dict[str, Tensor] = {}
        self.head: Tensor | None = None  # of the teacher
        self.starts = torch.zeros(1, dtype=torch.long)
        if self.teacher and not self._changes() and self._fits():
            self._ask(feed.text)
        elif self.teacher and feed.spec.signal == "once":
            raise ValueError(
                f"{self.method!r} asks its teacher at each step: the teacher follows the student or reads "
                "more than it, or the student writes in each batch; write signal: auto"
            )

    # -- of the teacher -----------------------------------------------------------------------------------

    def _changes(self) -> bool:
        """Whether the teacher says something else about the same text later, or of other text."""
        writers = {self.feed.sampler.writer(u, 0.0, self.feed.state) for u in (0.0, 1 - 1e-9)}
        moves = self.feed.teacher.rate or getattr(self.method, "context", "same") == "privileged"
        return bool(moves) or not writers & {"data", "teacher"} or "both" in writers

    def _fits(self) -> bool:
        if self.feed.spec.signal != "auto":
            return self.feed.spec.signal == "once"
        assert self.teacher is not None
        terms = self.teacher.terms
        atoms = atoms_of(terms.support)
        if terms.support == "heads":
            numbers = self.feed.teacher.model.model.config.hidden_size
        else:  # an atom is an id of eight bytes and one or two numbers of four
            numbers = 4 * getattr(atoms, "k", getattr(atoms, "n", 0)) or terms.vocabulary.size
        return 4 * numbers * int(self.feed.text.mask[:, 1:].sum()) <= AT_ONCE

    def _ask(self, text: Text) -> None:
        """About all fixed text; with a cache each part is a file, so that interrupted work goes on."""
        # Rows of logits are too large to keep on disk, and quick to make for models whose rows are not.
        folder = self.feed.cache if self.sees == "heads" else None
        parts = []
        for some in chunks(text, READ_ROWS, READ_TOKENS):
            file = folder / f"{self._key(some)}.safetensors" if folder else None
            found = kept(file, lambda t=some: self._rows(t))
            parts.append({name: rows.to(self.feed.device) for name, rows in found.items()})
            if folder:
                done = min(len(text.ids), len(parts) * len(some.ids))
                self.feed.progress(done, len(text.ids), None)
        self.stored = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        lengths = text.mask[:, 1:].sum(1)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])

    def _rows(self, text: Text) -> dict[str, Tensor]:
        assert self.teacher is not None
        with self._plainly():
            found = dict(self.teacher(*self.feed.on_device(text)).evidence)
        self.head = found.pop("p_weight", None)
        return found

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """The teacher says the same before training and in the midst of a student's autocast."""
        with torch.no_grad(), torch.autocast(self.feed.device.split(":")[0], enabled=False):
            yield

    def _key(self, text: Text) -> str:
        digest = hashlib.sha256(repr((self.feed.source, self.teacher.terms, self.estimator)).encode())  # type: ignore[union-attr]
        for tensor in text:
            digest.update(f"{tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def _of_teacher(self, part: Part) -> dict[str, Tensor]:
        places = part.more["place"]
        if self.stored and bool((places >= 0).all()):
            rows = torch.cat([torch.arange(*self.starts[p : p + 2].tolist()) for p in places])
            return {name: t[rows.to(t.device)] for name, t in self.stored.items()}
        if "p_ids" in part.more:
            return self._rows(Text(part.more["p_ids"], part.more["p_mask"]))
        return self._rows(part.text)

    # -- of both ------------------------------------------------------------------------------------------

    def evidence(self, model: CausalLM, part: Part) -> dict[str, Any]:
        """By the names of the estimator, and the student's hidden states or logits as `student`."""
        if self.teacher is None:
            return {}
        self._check(model)
        ids, mask = self.feed.on_device(part.text)
        signal = self._of_teacher(part)
        if self.sees == "logits":
            student = model.log_softmax(ids, mask)
            return signal | {"log_q": self._tempered(student), "student": student}
        hidden = model.hidden(ids, mask)
        signal |= {"q_hidden": hidden / self.temperature, "q_weight": model.head, "student": hidden}
        if "p_hidden" in signal:
            signal["p_hidden"] = signal["p_hidden"] / self.temperature
            signal["p_weight"] = self.feed.teacher.model.head if self.head is None else self.head
        return signal

    def _check(self, model: CausalLM) -> None:
        if not self.checked and self.teacher is not None:
            self.teacher.terms.require(self.estimator, Vocabulary.of(model), self.temperature)
            self.checked = True

    def _tempered(self, log_probs: Tensor) -> Tensor:
        t = self.temperature
        return log_probs if t == 1 else (log_probs / t).log_softmax(-1)

    def labels(
        self, model: CausalLM, part: Part, tensors: dict[str, Any], reads: frozenset
    ) -> dict[str, Any]:
        """The tokens themselves and what each model, and the writer, thought of them."""
        wanted = set(reads) | ({"log_p_label", "log_q_label"} if self.sees == "log_probs" else set())
        if not wanted & {"labels", "log_p_label", "log_q_label", "log_behaviour", "label_logit"}:
            return {}
        ids, mask = self.feed.on_device(part.text)
        found: dict[str, Any] = {"labels": model.labels(ids, mask)}
        if "label_logit" in wanted:
            logits = model.logits(ids, mask)
            found["label_logit"] = logits.gather(-1, found["labels"].unsqueeze(-1)).squeeze(-1)
            found["state_value"] = logits.logsumexp(-1)
        if wanted & {"log_q_label", "log_behaviour"}:
            found["log_q_label"] = self._student(model, ids, mask, found["labels"], tensors.get("student"))
        if wanted & {"log_p_label", "log_behaviour"}:
            found["log_p_label"] = self._teacher_label(part)
        if "log_behaviour" in wanted:
            found["log_behaviour"] = self._behaviour(model, part, found)
        return found

    def _student(self, model, ids: Tensor, mask: Tensor, labels: Tensor, seen: Tensor | None) -> Tensor:
        if self.sees == "logits" and seen is not None:
            return seen.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return model.scored(ids, mask, hidden=seen).log_prob

    def _teacher_label(self, part: Part) -> Tensor:
        text = Text(part.more["p_ids"], part.more["p_mask"]) if "p_ids" in part.more else part.text
        if self.scorer is None:
            self.scorer = self.feed.source.open(MonteCarlo(), 1.0, self.feed.teacher.model)
        with self._plainly():
            return self.scorer(*self.feed.on_device(text)).evidence["log_p"]

    def _behaviour(self, model: CausalLM, part: Part, found: dict[str, Tensor]) -> Tensor:
        """The log-probability with which whoever wrote a token drew it."""
        sampler, log_q = self.feed.sampler, found["log_q_label"].detach()
        mixed = isinstance(sampler, TeacherMixed)
        if not mixed and sampler.decoding == Decoding():
            return log_q
        text = self.feed.on_device(part.text)
        writer = model.mixed_with(self.feed.teacher.model, sampler.alpha) if mixed else model
        drawn = writer.drawn_log_probs(*text, sampler.decoding)
        by_student = part.more["by_student"][sequence_of(part.text.mask)].to(drawn.device)
        return torch.where(by_student, drawn, log_q)

    def asked(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """What the method is called with."""
        names = set(self.estimator.evidence if self.estimator else ()) | self.feed.reads
        if self.sees == "log_probs":
            tensors = {"log_p": tensors["log_p_label"], "log_q": tensors["log_q_label"]} | tensors
        return {name: tensors[name] for name in names}

    @torch.no_grad()
    def entropy(self, tensors: dict[str, Any]) -> dict[str, Tensor]:
        """The mean entropy of the student's next token; of a few rows, where rows are not held anyway."""
        if self.sees == "heads":
            hidden = tensors["q_hidden"]
            rows = hidden[:: 1 + len(hidden) // 64].float()
            with torch.autocast(rows.device.type, enabled=False):  # as the logits of the loss
                q = (rows @ tensors["q_weight"].float().T).softmax(-1)
        elif self.sees == "logits":
            q = tensors["log_q"].exp()
        else:
            return {}
        return {"entropy": torch.special.entr(q).sum(-1).mean()}


@torch.no_grad()
def kept(file: Path | None, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What is in `file`, or else `compute()`, which then is: written whole or not at all."""
    if file and file.exists():
        try:
            return load_file(file)
        except SafetensorError:  # damaged
            pass
    rows = compute()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}.new")
        save_file({name: t.contiguous() for name, t in rows.items()}, new)
        new.replace(file)
    return rows
