"""Responses, whoever wrote them, and what the teacher says about each of their tokens."""

from typing import Any

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import READ_ROWS, READ_TOKENS, Counts, Feed, Part, chunks, padded, sequence_of
from fdiv.feeds.memory import Follower, Passes, Replay
from fdiv.feeds.signals import Signals
from fdiv.methods._method import Adaptive, Out
from fdiv.sample._sampler import Steered, Writer
from fdiv.sample.fixed import Mix, TeacherMixed
from fdiv.tasks._task import Text
from fdiv.tasks.padding import prompts_of, trimmed
from fdiv.teachers._signal import TeacherError
from fdiv.teachers.served import Served

NEVER = -1  # the place of a sequence about which nothing was asked before


class Responses(Feed):
    """What the method reads, at the tokens of text that its sampler's choice of writer wrote."""

    def prepare(self, generator: torch.Generator) -> None:
        method = self.method
        self.sampler = getattr(method, "sampler", None) or Mix(getattr(method, "lmbda", 0.0))
        self.reads = frozenset(getattr(method, "reads", ()))
        self.state = self.sampler.initial_state() if isinstance(self.sampler, Steered) else {}
        self.now = 0.0  # progress
        self.state |= method.initial_state() if isinstance(method, Adaptive) else {}
        self.replay = Replay(self.memory, getattr(self.sampler, "capacity", 0))
        self.passes = Passes(self.memory)
        self.teacher = Follower(self.reference, getattr(method, "ema", 0.0), self.memory, self.world)
        self._check()
        self.text = self._fixed_text(generator)
        self.signals = Signals(self)

    def _check(self) -> None:
        """Raise where something that was asked for would be ignored."""
        spec, sampler, writer = self.spec, self.sampler, self.sampler.writer(0.0, 0.0, self.state)
        if writer == "both" and spec.batch_size % 2:
            raise ValueError(f"{sampler!r} makes pairs of answers, and batch_size {spec.batch_size} is odd")
        if isinstance(sampler, Steered) and getattr(sampler, "step", 1) and not spec.validate_every:
            raise ValueError(
                f"{sampler!r} follows the validation loss and there is none; write validate_every, or step=0"
            )
        if self.replay.capacity and "log_behaviour" in self.reads:
            raise ValueError(
                f"{self.method!r} weighs text by the probability it was written with, which is not kept for "
                f"text that is used again; write Mix(lmbda), not {sampler!r}"
            )
        if self.teacher.rate:
            self.require_local()
        if isinstance(self.source, Served) and writer in ("teacher", "both", "tokens"):
            raise TeacherError(
                f"{sampler!r} has the model in memory write, not the teacher behind {self.source!r}; write "
                "Mix(lmbda) or Offline(), or source: Local()"
            )

    # -- who writes ---------------------------------------------------------------------------------------

    def attend(self, model: CausalLM) -> torch.nn.Module | None:
        spec = self.spec
        if self.teacher.rate and (spec.lora or (self.world.size > 1 and spec.parallel == "fsdp")):
            raise ValueError(
                "a teacher that follows the student (ema > 0) needs the student's own weights, whole: "
                "parallel: ddp, and no LoRA; or write ema=0"
            )
        return super().attend(model)

    def _fixed_text(self, generator: torch.Generator) -> Text:
        """Responses that are the same for the whole run: the task's, or the teacher's own."""
        if self.sampler.writer(0.0, 0.0, self.state) not in ("teacher", "both"):
            return self.task.responses(self.reference, self.spec.examples, generator)
        prompts = self.task.prompts(self.spec.examples, generator)
        draws = self.draws(len(prompts.ids), generator)
        parts, done = [], 0
        for some in chunks(prompts, READ_ROWS, READ_TOKENS):
            rows = slice(done, done + len(some.ids))
            parts.append(self.task.answer(self.reference, some, draws[rows], self.sampler.decoding))
            done = rows.stop
            self.progress(done, len(prompts.ids), None)
        return padded(parts)

    def parts(self, model: CausalLM, step: int) -> list[Part]:
        generator, self.now = self.generator(step), self.progress_at(step)
        index = torch.randint(len(self.text.ids), (self.spec.batch_size,), generator=generator)
        uniform = torch.rand((), generator=generator).item()
        writer = self.sampler.writer(uniform, self.now, self.state)
        if "passes" in self.reads:
            self.passes.ask(self, model)
        return self.mine(self._judged(self._written(writer, index, model, generator)))

    def _written(self, writer: Writer, index: Tensor, model: CausalLM, generator: torch.Generator) -> Part:
        """The global batch; what a model writes now, each process writes its share of."""
        if writer == "replay" and not self.replay.full:
            writer = "student"
        if writer in ("data", "teacher"):
            return self._part(self.text.rows(index), index, by_student=False)
        if writer == "replay":
            return self._part(self.replay.draw(self.spec.batch_size, generator), None, by_student=True)
        if writer == "both":
            index = index[: self.spec.batch_size // 2]
            fixed = self.text.rows(index)
            own = self._answers(prompts_of(fixed), model, generator)
            return _joined(self._part(fixed, index, False), self._part(own, None, True))
        text = self._answers(self.task.prompts(len(index), generator), model, generator)
        self.replay.add(text)
        return self._part(text, None, by_student=True)

    def _answers(self, prompts: Text, model: CausalLM, generator: torch.Generator) -> Text:
        """Of the student, or of it and the teacher in turns, to each prompt of the global batch."""
        draws, share = self.draws(len(prompts.ids), generator), self.world.share(len(prompts.ids))
        writer: Any = self.hand.of(model)
        if isinstance(self.sampler, TeacherMixed):
            writer = model.mixed_with(self.teacher.model, self.sampler.alpha)
        with self.whole():
            own = self.task.answer(writer, prompts.rows(share), draws[share], self.sampler.decoding)
        return padded(self.world.gather(own))

    def _part(self, text: Text, index: Tensor | None, by_student: bool) -> Part:
        rows = len(text.ids)
        more = {"by_student": torch.full((rows,), by_student)}
        more["place"] = torch.full((rows,), NEVER) if index is None else index
        return Part(text, more)

    def _judged(self, part: Part) -> Part:
        if "reward" in self.reads:
            part.more["reward"] = self.task.verify(*part.text)
        if "passes" in self.reads:
            part.more["passes"], part.more["tries"] = self.passes.of(prompts_of(part.text))
        if getattr(self.method, "context", "same") == "privileged":
            richer, shown = self.task.privileged(part.text)
            part.more |= {"p_ids": richer.ids, "p_mask": richer.mask, "shown": shown}
        return part

    # -- what the method reads ----------------------------------------------------------------------------

    def loss(self, model: CausalLM, part: Part, batch: Counts) -> Out:
        if part.text.mask.any():
            part.text = trimmed(part.text)
        tensors = self.signals.evidence(model, part)
        tensors |= self._read(model, part, batch, tensors)
        out = self.method(**self.signals.asked(tensors), count=batch.tokens)
        return Out(out.loss, out.metrics | self.signals.entropy(tensors))

    def _read(self, model: CausalLM, part: Part, batch: Counts, tensors: dict) -> dict[str, Any]:
        rows = sequence_of(part.text.mask)
        menu: dict[str, Any] = {
            name: part.more[name][rows].to(self.device)
            for name in ("by_student", "passes", "tries", "reward", "shown")
            if name in part.more
        }
        menu |= {"sequence": rows.to(self.device), "sequences": batch.sequences}
        menu |= {"state": self.state, "progress": self.now}
        menu |= self.signals.labels(model, part, tensors, self.reads)
        missing = self.reads - menu.keys()
        if missing:
            raise TypeError(f"{self.method!r} reads {sorted(missing)}, which {self.task!r} cannot tell")
        return menu

    def validation(self, model: CausalLM) -> list[Part]:
        """On other text of the data; beside it the student's answers, if the method compares the two."""
        generator = self.generator(-2)
        text = self.unseen(generator)
        part = self._part(text, None, by_student=False)
        if self.sampler.writer(0.0, self.now, self.state) == "both":
            own = self._answers(prompts_of(text), model, generator)
            part = _joined(part, self._part(own, None, by_student=True))
        return self.mine(self._judged(part))

    # -- what follows -------------------------------------------------------------------------------------

    def after_step(self, model: CausalLM, metrics: dict[str, float], progress: float) -> None:
        self.teacher.follow(model)
        if isinstance(self.method, Adaptive):
            self.state = self.state | self.method.advance(self.state, metrics, progress)

    def after_validation(self, loss: float) -> None:
        if isinstance(self.sampler, Steered):
            self.state = self.state | self.sampler.advance(self.state, loss)


def _joined(first: Part, second: Part) -> Part:
    """Two parts of one size, in turns, so that every micro-batch has as much of either."""
    turns = torch.arange(2 * len(first.text.ids)).reshape(2, -1).T.flatten()
    more = {name: torch.cat([t, second.more[name]])[turns] for name, t in first.more.items()}
    return Part(padded([first.text, second.text]).rows(turns), more)
