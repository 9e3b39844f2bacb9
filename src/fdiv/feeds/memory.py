"""What a feed remembers between steps, kept in tensors so that a checkpoint can save it."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import READ_ROWS, READ_TOKENS, chunks, padded
from fdiv.parallel import World
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text
from fdiv.tasks.padding import NOTHING, prompts_of, rows_of, unanswered

if TYPE_CHECKING:
    from fdiv.feeds.responses import Responses


class Replay:
    """The last `capacity` sequences that the student wrote."""

    def __init__(self, memory: dict[str, Tensor], capacity: int):
        self.memory, self.capacity = memory, capacity

    @property
    def full(self) -> bool:
        return len(self.memory.get("replay_ids", ())) >= self.capacity

    def add(self, text: Text) -> None:
        if not self.capacity:
            return
        kept = "replay_ids" in self.memory  # others remember things here too
        old = [Text(self.memory["replay_ids"], self.memory["replay_mask"])] if kept else []
        ids, mask = padded([*old, text])
        self.memory["replay_ids"], self.memory["replay_mask"] = ids[-self.capacity :], mask[-self.capacity :]

    def draw(self, count: int, generator: torch.Generator) -> Text:
        ids, mask = self.memory["replay_ids"], self.memory["replay_mask"]
        index = torch.randint(len(ids), (count,), generator=generator)
        return Text(ids[index], mask[index])


class Passes:
    """How often the student, as it started, answered each prompt of the fixed text right."""

    def __init__(self, memory: dict[str, Tensor]):
        self.memory = memory

    def ask(self, feed: "Responses", model: CausalLM) -> None:
        """Once in a run: `group_size` answers to each prompt, each process to its share of them."""
        if "passes" in self.memory:
            return
        texts = [feed.text, *([feed.unseen(feed.generator(-2))] if feed.spec.validate_every else [])]
        prompts = unique([prompt for text in texts for prompt in rows_of(prompts_of(text))])
        world, tries = feed.world, feed.spec.group_size
        own = Text(*(t[world.rank :: world.size] for t in prompts))
        draws = feed.draws(len(prompts.ids) * tries, feed.generator(-3)).unflatten(0, (-1, tries))
        draws = draws[world.rank :: world.size]
        counts, done = torch.zeros(len(own.ids)), 0
        with feed.whole():
            writer = feed.hand.of(model)
            for some in chunks(own, READ_ROWS, READ_TOKENS):
                rows = slice(done, done + len(some.ids))
                for n in range(tries):
                    text = feed.task.answer(writer, some, draws[rows, n], Decoding())
                    counts[rows] += feed.task.verify(*text).cpu()
                done = rows.stop
        passes = torch.zeros(len(prompts.ids))
        for rank, part in enumerate(world.gather(counts)):
            passes[rank :: world.size] = part
        self.memory |= {"passes": passes, "tries": torch.tensor(float(tries)), "prompts": prompts.ids}

    def of(self, prompts: Text) -> tuple[Tensor, Tensor]:
        """(passes, tries) of the prompts of some sequences, [sequences] each."""
        known = {_key(row): n for n, row in enumerate(self.memory["prompts"])}
        places = [known.get(_key(row)) for row in prompts.ids]
        if None in places:
            raise ValueError("a prompt was drawn that is not among those of the fixed text: more `examples`")
        passes = self.memory["passes"][torch.tensor(places)]
        return passes, self.memory["tries"].expand(len(passes))


class Follower:
    """The teacher: the reference itself, or a copy whose weights follow the student's by `rate` a step."""

    def __init__(self, reference: CausalLM, rate: float, memory: dict[str, Tensor], world: World):
        self.model, self.rate = reference, rate
        if not rate:
            return
        self.model = copy.copy(reference)
        self.model.model = copy.deepcopy(reference.model).requires_grad_(False)
        self.weights = dict(self.model.model.named_parameters())
        memory |= {f"teacher.{name}": weight.data for name, weight in self.weights.items()}

    def fits(self, student: CausalLM) -> bool:
        """Whether the student has the reference's weights, by name and shape."""
        own = {name: weight.shape for name, weight in student.model.named_parameters()}
        return own == {name: weight.shape for name, weight in self.weights.items()}

    @torch.no_grad()
    def follow(self, student: CausalLM) -> None:
        if not self.rate:
            return
        for name, weight in student.model.named_parameters():
            if type(weight).__name__ == "DTensor" or name not in self.weights:
                raise ValueError(
                    "a model that follows the student (ema > 0, or a lagged proposal) needs the student's "
                    "own weights, whole: student: reference, parallel: ddp, and no LoRA"
                )
            self.weights[name].lerp_(weight.to(self.weights[name]), self.rate)


def unique(prompts: list[Tensor]) -> Text:
    return unanswered(list({_key(prompt): prompt for prompt in prompts}.values()))


def _key(row: Tensor) -> tuple[int, ...]:
    """Of a prompt, whatever is padded behind it."""
    return tuple(row[row != NOTHING].tolist())
