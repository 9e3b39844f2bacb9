"""Paths that the sampler drew, now or earlier, kept and drawn from again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdiv.adapters.classifier import Classifier
from fdiv.feeds._feed import Counts, Feed
from fdiv.methods._method import Out

AT_ONCE = 256  # kept paths whose weights are found together
KEPT = ("positions", "moves", "log_reward", "length")


@dataclass
class Drawn:
    """Some kept paths, by name [paths, ...]."""

    rows: dict[str, Tensor]

    @property
    def counts(self) -> Counts:
        count = float(len(self.rows["length"]))
        return Counts(count, count, 0.0, 0.0)

    def split(self, size: int) -> list["Drawn"]:
        columns = zip(*(self.rows[name].split(size) for name in KEPT), strict=True)
        return [Drawn(dict(zip(KEPT, column, strict=True))) for column in columns]


class PathsFeed(Feed):
    """Rolls the sampler out every `train.reuse` steps, and draws each batch from the last `capacity` paths.

    They lie in `memory`, so that a run that was killed goes on with those it had.
    """

    reuses = True

    def prepare(self, generator: torch.Generator) -> None:
        self.beside: nn.Module | None = None
        self._refuse()
        self.require_local()

    def _refuse(self) -> None:
        """Raise where something that was asked for would be ignored, or be wrong."""
        method = self.method
        if method.consumes != "paths":
            raise ValueError(
                f"{method!r} consumes {method.consumes}, of which {self.task!r} has none; write LogVariance()"
            )
        if not hasattr(self.task, "rolled"):
            raise ValueError(
                f"{method!r} learns from paths, which {self.task!r} has none of; write Paths(...)"
            )
        if method.importance and not self._weighed:
            raise ValueError(
                f"importance={method.importance:g} is less than one path of batch_size "
                f"{self.spec.batch_size}; raise either, or leave importance out"
            )
        self.require_small("paths")

    def attend(self, model: Classifier) -> nn.Module | None:
        self.beside = self.method.module()
        return None if self.beside is None else self.beside.to(self.device)

    def restore(self, state: dict[str, float], memory: dict[str, Tensor]) -> None:
        super().restore(state, {name: tensor.to(self.device) for name, tensor in memory.items()})

    # -- batches --------------------------------------------------------------------------------------------

    def parts(self, model: Classifier, step: int) -> list[Drawn]:
        generator = self.generator(step)
        if step % self.spec.reuse == 0:
            last = (self.spec.steps - 1) // self.spec.reuse * self.spec.reuse
            self._keep(
                self._rolled(model, self.method.paths, self.method.heat(step / max(1, last)), generator)
            )
            self._weigh(model)
        if step == 0 and (start := self.method.initial_memory(**self._read(model, self._all()))):
            self.memory |= start
        index = self._index(generator).to(self.device)
        return self._mine({name: self.memory[name][index] for name in KEPT})

    @property
    def _weighed(self) -> int:
        """Paths of a batch that are drawn by weight."""
        return round(self.method.importance * self.spec.batch_size)

    def _index(self, generator: torch.Generator) -> Tensor:
        """Which of the kept paths make a batch."""
        kept, weighed = len(self.memory["length"]), self._weighed
        evenly = torch.randint(kept, (self.spec.batch_size - weighed,), generator=generator)
        if not weighed:
            return evenly
        weight = self.memory["weight"].cpu()
        return torch.cat([evenly, torch.multinomial(weight, weighed, replacement=True, generator=generator)])

    def _weigh(self, model: Classifier) -> None:
        """Note the weight of each kept path, as the sampler is now."""
        if self.method.importance:
            with torch.no_grad():
                each = [
                    self.method.log_ratio(**self._read(model, some)) for some in self._all().split(AT_ONCE)
                ]
            self.memory["weight"] = self.method.underrated(torch.cat(each))

    def _rolled(
        self, model: Classifier, count: int, heat: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        positions, moves = self.task.rolled(model.model, count, generator, heat, self.device)
        return dict(zip(KEPT, (positions, moves, *self.task.nearest(positions)), strict=True))

    def _keep(self, rolled: dict[str, Tensor]) -> None:
        for name, new in rolled.items():
            old = [self.memory[name].to(self.device)] if name in self.memory else []
            self.memory[name] = torch.cat([*old, new])[-self.method.capacity :]

    def _all(self) -> Drawn:
        return Drawn({name: self.memory[name] for name in KEPT})

    def _mine(self, rows: dict[str, Tensor]) -> list[Drawn]:
        share = self.world.share(len(rows["length"]))
        own = Drawn({name: t[share] for name, t in rows.items()})
        return own.split(self.spec.micro_batch or len(own.rows["length"]))

    def validation(self, model: Classifier) -> list[Drawn]:
        """New paths, at the temperature of the wanted law."""
        return self._mine(self._rolled(model, self.spec.validate_on, 1.0, self.generator(-2)))

    # -- the loss -------------------------------------------------------------------------------------------

    def loss(self, model: Classifier, part: Drawn, batch: Counts) -> Out:
        return self.method(**self._read(model, part), count=batch.tokens)

    def _read(self, model: Classifier, part: Drawn) -> dict[str, Any]:
        """What the method is called with."""
        makers = {
            "network": lambda: model.model,
            "when": lambda: self.task.when.to(self.device),
            "target": lambda: self.task.target.to(self.device),
            "step_size": lambda: self.task.surface.step_size,
            "variance": lambda: self.task.variance,
            "module": lambda: self.beside,
            "memory": lambda: self.memory,
        } | {name: lambda name=name: part.rows[name].to(self.device) for name in KEPT}
        return {name: makers[name]() for name in self.method.reads}
