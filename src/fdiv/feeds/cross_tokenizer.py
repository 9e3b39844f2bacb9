"""Responses as two tokenizers read them, for methods that compare a student with a teacher of another one."""

from typing import Any

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import Counts, Feed, Part
from fdiv.methods._method import Out
from fdiv.methods.distill.dskd import DualSpace
from fdiv.sample._sampler import Steered
from fdiv.tasks._task import Text
from fdiv.tasks.padding import prompts_of
from fdiv.teachers.cross_tokenizer import Paired, Passage, pair, pair_written
from fdiv.teachers.shared import shared_tokens


class CrossTokenizer(Feed):
    """The task's responses, decoded from the teacher's tokens; some are written anew by the student."""

    def prepare(self, generator: torch.Generator) -> None:
        if self.reference.tokenizer is None:
            raise ValueError(f"{self.method!r} reads text, and the models of {self.task!r} have no tokenizer")
        if self.reference.vocabulary is not None:
            raise ValueError(
                f"{self.method!r} reads text in two vocabularies, and the task restricts the models to some "
                "ids of one; write vocabulary='full' in the task"
            )
        self.require_local()
        if self.spec.signal == "once":
            raise ValueError(f"{self.method!r} asks its teacher at each step; leave out signal: once")
        sampler: Any = self.method.sampler
        if isinstance(sampler, Steered) or sampler.writer(0.0, 0.0, {}) not in ("data", "student"):
            raise TypeError(
                f"{self.method!r} is fed with data and the student's text; write Offline() or Mix(lmbda)"
            )
        self.passages = self._passages(self.task.responses(self.reference, self.spec.examples, generator))
        self.paired: Paired | None = None
        self.now = 0.0

    def attend(self, model: CausalLM) -> torch.nn.Module | None:
        """Tokenise for this student; DSKD's projectors are trained beside it."""
        self.paired = self._pair(self.passages, model)
        shared = shared_tokens(model.tokenizer, self.reference.tokenizer)
        self.shared = {"q_shared": shared.student.to(self.device), "p_shared": shared.teacher.to(self.device)}
        if "projectors" not in self.method.reads:
            return None
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.projectors = DualSpace(*(m.model.config.hidden_size for m in (model, self.reference)))
        return self.projectors.to(self.device)

    def parts(self, model: CausalLM, step: int) -> list[Part]:
        assert self.paired is not None
        generator, self.now = self.generator(step), self.progress_at(step)
        index = torch.randint(len(self.passages), (self.spec.batch_size,), generator=generator)
        uniform = torch.rand((), generator=generator).item()
        writer = self.method.sampler.writer(uniform, self.now, self.state)
        if writer == "data":
            return self.mine(_part(self.paired.rows(index)))
        return self.mine(self._written(index, model, generator))

    def _written(self, index: Tensor, model: CausalLM, generator: torch.Generator) -> Part:
        assert self.paired is not None
        prompts = prompts_of(self.paired.student.rows(index))
        draws, share = self.draws(len(index), generator), self.world.share(len(index))
        with self.whole():
            own = self.hand.of(model).generate(
                prompts.rows(share), draws[share], self.method.sampler.decoding
            )
        texts = [self.passages[i].prompt for i in index[share].tolist()]
        found = pair_written(own, model.tokenizer, self.reference.tokenizer, texts)
        return _stacked([_part(p) for p in self.world.gather(found)])

    def validation(self, model: CausalLM) -> list[Part]:
        passages = self._passages(self.unseen(self.generator(-2)))
        return self.mine(_part(self._pair(passages, model)))

    def loss(self, model: CausalLM, part: Part, batch: Counts) -> Out:
        paired = _paired(part)
        menu: dict[str, Any] = {n: t.to(self.device) for n, t in paired.flat().items()} | self.shared
        menu |= {"groups": batch.groups, "sequences": batch.sequences, "p_count": batch.p_tokens}
        menu |= self._states(model, paired) if "q_hidden" in self.method.reads else self._rows(model, paired)
        if "log_q" in menu:
            for side in "pq":
                labels = menu[f"{side}_labels"].unsqueeze(-1)
                menu[f"log_{side}_label"] = menu[f"log_{side}"].gather(-1, labels).squeeze(-1)
        return self.method(**{name: menu[name] for name in self.method.reads}, count=batch.tokens)

    def _rows(self, model: CausalLM, paired: Paired) -> dict[str, Any]:
        with torch.no_grad():
            log_p = self.reference.log_softmax(*self.on_device(paired.teacher))
        return {"log_p": log_p, "log_q": model.log_softmax(*self.on_device(paired.student))}

    def _states(self, model: CausalLM, paired: Paired) -> dict[str, Any]:
        with torch.no_grad():
            p_hidden = self.reference.hidden(*self.on_device(paired.teacher))
        menu: dict[str, Any] = {
            "p_hidden": p_hidden,
            "q_hidden": model.hidden(*self.on_device(paired.student)),
            "projectors": self.projectors,
        }
        for side, one in (("p", self.reference), ("q", model)):
            menu[f"{side}_weight"] = one.head
            menu[f"{side}_embedding"] = one.model.get_input_embeddings().weight
        return menu

    def _pair(self, passages: list[Passage], model: CausalLM) -> Paired:
        return pair(passages, model.tokenizer, self.reference.tokenizer, end=False)

    def _passages(self, text: Text) -> list[Passage]:
        decode, found = self.reference.tokenizer.decode, []
        for ids, mask in zip(*text, strict=True):
            start = int(mask.int().argmax())
            stop = start + int(mask.sum())
            prompt, response = (
                decode(some, skip_special_tokens=True) for some in (ids[:start], ids[start:stop])
            )
            found.append(Passage(prompt, response))
        return found


def _part(paired: Paired) -> Part:
    p_ids, p_mask = paired.teacher
    more = {"p_ids": p_ids, "p_mask": p_mask, "q_group": paired.q_group, "p_group": paired.p_group}
    return Part(paired.student, more)


def _paired(part: Part) -> Paired:
    more = part.more
    return Paired(part.text, Text(more["p_ids"], more["p_mask"]), more["q_group"], more["p_group"])


def _stacked(parts: list[Part]) -> Part:
    """Parts of several processes, whose widths differ, behind each other."""

    def wide(tensors: list[Tensor], fill: int) -> Tensor:
        width = max(t.shape[1] for t in tensors)
        padded = [torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill) for t in tensors]
        return torch.cat(padded)

    text = Text(wide([p.text.ids for p in parts], 0), wide([p.text.mask for p in parts], 0))
    names = {"p_ids": 0, "p_mask": 0, "q_group": -1, "p_group": -1}
    return Part(text, {name: wide([p.more[name] for p in parts], fill) for name, fill in names.items()})
