"""The contract between the training loop and what feeds it.

A feed draws its data once, from the seed, and each step's batch from (seed, step) alone: a run that is
resumed, or shared by another number of processes, sees the batches it would have seen.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds.writing import Hand
from fdiv.methods._method import Out
from fdiv.parallel import World
from fdiv.recipe import TrainSpec
from fdiv.tasks._task import Text
from fdiv.tasks.prompting import uniform, unseen
from fdiv.teachers._signal import Source, TeacherError, Terms, Vocabulary
from fdiv.teachers.local import Local

READ_ROWS, READ_TOKENS = 256, 16384  # sequences and tokens that a model reads or writes at once


class Counts(NamedTuple):
    """Of a batch: predicted tokens and sequences; in two vocabularies, common stretches and the teacher's.

    Of rollouts p_tokens are those of rehearsed answers, which are in no other count.
    """

    tokens: float
    sequences: float
    groups: float
    p_tokens: float


@dataclass
class Part:
    """A micro-batch of one process. `more`: what else belongs to its sequences, each [sequences, ...]."""

    text: Text
    more: dict[str, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        groups, p_mask = self.more.get("q_group"), self.more.get("p_mask")
        if "log_initial" in self.more:
            return Counts(0.0, 0.0, 0.0, float(self.text.mask[:, 1:].sum()))
        return Counts(
            float(self.text.mask[:, 1:].sum()),
            float(len(self.text.ids)),
            0.0 if groups is None else float((groups.amax(1) + 1).sum()),
            0.0 if p_mask is None else float(p_mask.sum()),
        )

    def split(self, size: int) -> list["Part"]:
        """In micro-batches of at most `size` sequences."""
        names = list(self.more)
        columns = [self.text.ids, self.text.mask, *self.more.values()]
        return [
            Part(Text(ids, mask), dict(zip(names, rest, strict=True)))
            for ids, mask, *rest in zip(*(c.split(size) for c in columns), strict=True)
        ]


class Feed:
    """`parts` makes this process's micro-batches of a step, `loss` runs the method on one of them.

    `source`: where the teacher's signal comes from; `cache`: a folder where what it says about fixed text is
    kept for the other members.
    """

    reuses = False  # whether a batch can serve several steps

    def __init__(
        self,
        method,
        task,
        reference: CausalLM | None,
        spec: TrainSpec,
        seed: int,
        world: World | None = None,
        source: Source | None = None,
        cache: Path | None = None,
        progress: Callable[[int, int, None], None] = lambda done, total, loss: None,
    ):
        self.method, self.task = method, task
        self.reference: Any = reference
        self.spec, self.seed = spec, seed
        self.world = world or World.join(spec.device)
        if spec.reuse > 1 and not self.reuses:
            raise ValueError(f"train.reuse is for rollouts, which {method!r} does not consume; leave it out")
        if spec.validate_every:
            self.world.share(spec.validate_on)  # refused now, not when it is first asked for
        self.source = source or Local()
        self.cache, self.progress = cache, progress
        self.whole: Callable[[], AbstractContextManager] = nullcontext  # around generation, if sharded
        self.hand = Hand(spec.generation, self.world, getattr(method, "sampler", None))
        self.state: dict[str, float] = {}  # numbers of the method and its sampler
        self.memory: dict[str, Tensor] = {}  # tensors to be saved with a checkpoint
        self.prepare(self.generator(-1))

    # -- for the training loop ----------------------------------------------------------------------------

    def prepare(self, generator: torch.Generator) -> None:
        """Draw what is drawn once."""

    def attend(self, model: CausalLM) -> torch.nn.Module | None:
        """Meet the student, before the first step; returns what is to be trained beside it."""
        if self.reference is not None:
            Terms(Vocabulary.of(self.reference), 1.0, "", "").require_vocabulary(
                Vocabulary.of(model), "the student's"
            )

    def parts(self, model: CausalLM, step: int) -> list[Part]:
        raise NotImplementedError

    def loss(self, model: CausalLM, part: Part, batch: Counts) -> Out:
        """The part's contribution to the loss of the global batch, whose counts are given."""
        raise NotImplementedError

    def share(self, part: Part, batch: Counts) -> float:
        """Of the global batch's metrics, how much a part's count: they are means over tokens."""
        return part.counts.tokens / max(batch.tokens, 1)

    def validation(self, model: CausalLM) -> list[Part]:
        """Micro-batches of text that is not trained on."""
        raise NotImplementedError

    def after_step(self, model: CausalLM, metrics: dict[str, float], progress: float) -> None:
        """What follows the weights."""

    def after_validation(self, loss: float) -> None:
        """What follows the validation loss."""

    def restore(self, state: dict[str, float], memory: dict[str, Tensor]) -> None:
        """What a checkpoint kept."""
        if not (state.keys() == self.state.keys() and self.memory.keys() <= memory.keys()):
            raise ValueError("the checkpoint is of another method or sampler")
        self.state = state
        for name, tensor in memory.items():
            if name in self.memory:  # somebody holds this very tensor
                self.memory[name].copy_(tensor)
            else:
                self.memory[name] = tensor

    # -- for feeds ----------------------------------------------------------------------------------------

    def require_small(self, rows: str) -> None:
        """Raise where the run asks for what large models need, or for a method's batch in parts."""
        spec, processes = self.spec, self.world.size
        if spec.lora or spec.gradient_checkpointing or (processes > 1 and spec.parallel == "fsdp"):
            raise ValueError(
                "a small network is trained whole: leave out train.lora and train.gradient_checkpointing, "
                "and write parallel: ddp"
            )
        in_parts = processes > 1 or (spec.micro_batch or spec.batch_size) < spec.batch_size
        if getattr(self.method, "unit", None) == "batch" and in_parts:
            raise ValueError(
                f"{self.method!r} compares the {rows} of a whole batch: leave out train.micro_batch, and "
                "train it in one process"
            )

    def require_local(self) -> None:
        """Raise unless the teacher is the model in memory, which is all that this feed asks."""
        if not isinstance(self.source, Local):
            raise TeacherError(
                f"{self.method!r} asks the reference model itself, not {self.source!r}; write source: Local()"
            )

    @property
    def device(self) -> str:
        return self.world.device

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + step)

    def precision(self) -> torch.autocast:
        """Of the student's layers; logits and losses are float32 in any case."""
        enabled = self.spec.precision == "bfloat16"
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=enabled)

    def progress_at(self, step: int) -> float:
        return step / self.spec.steps

    def mine(self, part: Part) -> list[Part]:
        """This process's micro-batches of a global batch."""
        share = self.world.share(len(part.text.ids))
        own = Part(part.text.rows(share), {name: t[share] for name, t in part.more.items()})
        return own.split(self.spec.micro_batch or len(own.text.ids))

    def unseen(self, generator: torch.Generator) -> Text:
        """Text that is not trained on."""
        return self.shareable(unseen(self.task, self.reference, self.spec.validate_on, generator))

    def shareable(self, text: Text) -> Text:
        """As much of it as the processes can share evenly."""
        count = len(text.ids) // self.world.size * self.world.size
        if not count:
            raise ValueError(f"{self.task!r} holds out {len(text.ids)} responses, too few to validate on")
        return text.rows(slice(0, count))

    def draws(self, sequences: int, generator: torch.Generator) -> Tensor:
        """Uniform numbers [sequences, tokens] that answers are made of."""
        return uniform(sequences, self.task.answer_length, generator)

    def on_device(self, text: Text) -> tuple[Tensor, Tensor]:
        return text.ids.to(self.device), text.mask.to(self.device)


def boxed(rows: Tensor, mask: Tensor) -> Tensor:
    """Rows [R, ...] of masked tokens in their places [B, S - 1, ...], zeros elsewhere; mask [B, S]."""
    places = mask[:, 1:].to(rows.device)
    box = rows.new_zeros(places.shape + rows.shape[1:])
    return box.index_put(places.nonzero(as_tuple=True), rows)


def sequence_of(mask: Tensor) -> Tensor:
    """The number of the sequence of each masked token, [R]."""
    return mask[:, 1:].nonzero()[:, 0]


def padded(texts: list[Text]) -> Text:
    """Texts of different widths as one, with zeros behind what is shorter."""
    width = max(text.ids.shape[1] for text in texts)

    def wide(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

    return Text(torch.cat([wide(t.ids) for t in texts]), torch.cat([wide(t.mask) for t in texts]))


def chunks(text: Text, rows: int, tokens: int) -> Iterator[Text]:
    """A few sequences at a time, at most `rows` of them and about `tokens` tokens."""
    size = max(1, min(rows, tokens // text.ids.shape[1]))
    for ids, mask in zip(text.ids.split(size), text.mask.split(size), strict=True):
        yield Text(ids, mask)
