"""Inputs and labels, each example once an epoch."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fdiv.adapters.classifier import Classifier
from fdiv.estimate.exact import Exact
from fdiv.feeds._feed import Counts, Feed
from fdiv.feeds.reading import Reading, shapes_of
from fdiv.methods._method import Adaptive, Out
from fdiv.tasks.labelled import Labelled

READS_OUT = {"log_probs", "sample"}  # a method that states one is saved beside the weights


@dataclass
class Batch:
    """Some examples and their numbers in the training data; -1 for what is not trained on."""

    data: Labelled
    index: Tensor

    @property
    def counts(self) -> Counts:
        return Counts(float(len(self.index)), float(len(self.index)), 0.0, 0.0)

    def split(self, size: int) -> list["Batch"]:
        columns = zip(*(t.split(size) for t in (*self.data, self.index)), strict=True)
        return [Batch(Labelled(inputs, labels), index) for inputs, labels, index in columns]


class Examples(Feed):
    """What the method reads of the task's examples.

    data: which of the task's data; None are those that a student is trained on.
    """

    def __init__(self, *args, data: str | None = None, **options):
        self.kind = data
        super().__init__(*args, **options)

    def prepare(self, generator: torch.Generator) -> None:
        method = self.method
        self.names = _names(method)
        self.both = getattr(method, "teaches", None) == "both"
        self._refuse()
        data = self.task.examples(self.kind, self.spec.examples, generator)
        self.data = Labelled(*(t.to(self.device) for t in data))
        if self.spec.batch_size > len(data.inputs):
            raise ValueError(
                f"batch_size {self.spec.batch_size} is more than the {len(data.inputs)} examples there are"
            )
        self.log_prior = self.task.log_prior(self.data) if "log_prior" in self.names else None
        self.teacher = self._teacher()
        self.module: nn.Module | None = None
        self.state = method.initial_state() if isinstance(method, Adaptive) else {}
        if hasattr(method, "initial_memory"):
            self.memory |= cast(Any, method).initial_memory(self.data, self.teacher)
        self.now, self.step = 0.0, 0  # progress, and the step that it is taken at
        self.seen: list[dict[str, Any]] = []  # what the method read at this step, if it remembers

    def _refuse(self) -> None:
        """Raise where something that was asked for would be ignored, or be wrong."""
        method, spec, processes = self.method, self.spec, self.world.size
        unknown = [name for name in self.names if not hasattr(Reading, name)]
        if unknown:
            raise ValueError(
                f"{method!r} reads {', '.join(unknown)}, which inputs with labels do not have; text has"
            )
        self.require_small("examples")
        if hasattr(method, "initial_memory") and (processes > 1 or spec.validate_every):
            raise ValueError(
                f"{method!r} keeps numbers of every training example: train it in one process, and leave out "
                "train.validate_every, for held-out ones have none"
            )
        self.require_local()

    def _teacher(self) -> nn.Module | None:
        """The reference's network, and a copy of it where it is trained too."""
        if self.reference is None:
            return None
        return deepcopy(self.reference.model).requires_grad_(True) if self.both else self.reference.model

    def attend(self, model: Classifier) -> nn.Module | None:
        """What is trained beside the student: the method's module, and the teacher of a mutual method."""
        if self.reference is not None and self.reference.outputs != model.outputs:
            raise ValueError(
                f"the student has {model.outputs} outputs and the reference {self.reference.outputs}"
            )
        model.method = self.method if READS_OUT & set(dir(self.method)) else None
        self.module = self._made_beside(model)
        beside = [m for m in (self.module, self.teacher if self.both else None) if m is not None]
        return nn.ModuleList(beside).train() if beside else None

    def _made_beside(self, model: Classifier) -> nn.Module | None:
        """The method's module, made for the shapes of both networks or out of the networks themselves."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if hasattr(self.method, "module"):
                shapes = shapes_of(model.model, self.teacher, self.data.inputs[:2])
                return self.method.module(shapes).to(self.device)
            if hasattr(self.method, "beside"):
                return self.method.beside(model.model, self.teacher).to(self.device)
        return None

    # -- batches --------------------------------------------------------------------------------------------

    def parts(self, model: Classifier, step: int) -> list[Batch]:
        self.now, self.step, self.seen = self.progress_at(step), step, []
        first = step * self.spec.batch_size
        index = self._order(first, first + self.spec.batch_size)
        return self._mine(self.data.rows(index.to(self.device)), index)

    def _order(self, first: int, last: int) -> Tensor:
        """The examples at these places of the run: one shuffled epoch behind another."""
        size = len(self.data.inputs)
        epochs = range(first // size, (last - 1) // size + 1)
        orders = [torch.randperm(size, generator=self.generator(epoch)) for epoch in epochs]
        start = epochs[0] * size
        return torch.cat(orders)[first - start : last - start]

    def _mine(self, data: Labelled, index: Tensor) -> list[Batch]:
        """This process's micro-batches of a global batch."""
        share = self.world.share(len(index))
        own = Batch(data.rows(share), index[share])
        return own.split(self.spec.micro_batch or len(own.index))

    def validation(self, model: Classifier) -> list[Batch]:
        held = self.task.held_out(self.kind)
        count = min(len(held.inputs), self.spec.validate_on) // self.world.size * self.world.size
        return self._mine(held.rows(slice(0, count)), torch.full((count,), -1))

    # -- the loss -------------------------------------------------------------------------------------------

    def loss(self, model: Classifier, part: Batch, batch: Counts) -> Out:
        reading = Reading(self, model.model, part)
        evidence = {name: getattr(reading, name) for name in self.names} | {"count": batch.tokens}
        if hasattr(self.method, "remember"):
            self.seen.append(evidence)
        return self.method(**evidence)

    def after_step(self, model: Classifier, metrics: dict[str, float], progress: float) -> None:
        if isinstance(self.method, Adaptive):
            self.state = self.method.advance(self.state, metrics, progress)
        with torch.no_grad():
            for evidence in self.seen:
                cast(Any, self.method).remember(**{"memory": self.memory} | evidence)
        self.seen = []


def _names(method: Any) -> tuple[str, ...]:
    """What is handed over to this method, `count` aside."""
    if method.consumes == "examples":
        return getattr(method, "reads", ("logits", "labels"))
    if method.consumes == "tokens":
        return ("log_q",)
    if method.consumes != "responses":
        raise ValueError(
            f"{method!r} consumes {method.consumes}, of which inputs with labels have none; write a method "
            "of fdiv.methods.supervise, or one that distils"
        )
    if not isinstance(method.estimator, Exact):
        raise ValueError(f"the classes of a classifier are few: write Exact(), not {method.estimator!r}")
    return ("log_p", "log_q", *getattr(method, "reads", ()))
