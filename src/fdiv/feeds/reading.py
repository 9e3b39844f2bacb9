"""What a method can read of a batch of examples: each name of READABLE_IN_EXAMPLES, when it is asked for."""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shapes(NamedTuple):
    """What a method's module is built for: widths of features, and shapes of stages without the batch."""

    width: int
    classes: int
    stages: tuple[torch.Size, ...]
    p_width: int
    p_stages: tuple[torch.Size, ...]


class Reading:
    """The examples of `part`, and what the student `network` and the feed's teacher say about them.

    Methods for text find an example as a token, and as a sequence, of its own.
    """

    # Stated here, so that a feed knows these names without a batch.
    network: Any = None
    inputs = labels = targets = index = torch.empty(0)

    def __init__(self, feed: Any, network: Any, part: Any):
        self._feed, self.network, self.index = feed, network, part.index.to(feed.device)
        self.inputs, self.labels = (t.to(feed.device) for t in part.data)
        self.targets = self.labels

    @cached_property
    def stages(self) -> list[Tensor]:
        return self.network.stages(self.inputs)

    @property
    def features(self) -> Tensor:
        return self.stages[-1]

    @cached_property
    def logits(self) -> Tensor:
        return self.network.head(self.features).float()

    @property
    def p_network(self) -> Any:
        if self._feed.teacher is None:
            raise ValueError(f"{self._feed.method!r} reads what a reference says, and there is none")
        return self._feed.teacher

    @cached_property
    def p_stages(self) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._feed.both):
            return self.p_network.stages(self.inputs)

    @property
    def p_features(self) -> Tensor:
        return self.p_stages[-1]

    @cached_property
    def p_logits(self) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._feed.both):
            return self.p_network.head(self.p_features).float()

    # -- of the method and the run --------------------------------------------------------------------------

    @property
    def log_prior(self) -> Tensor:
        return self._feed.log_prior

    @property
    def module(self) -> Any:
        return self._feed.module

    @property
    def memory(self) -> dict[str, Tensor]:
        return self._feed.memory

    @property
    def progress(self) -> float:
        return self._feed.now

    @property
    def step(self) -> int:
        return self._feed.step

    @property
    def state(self) -> dict[str, float]:
        return self._feed.state

    # -- in the words of methods for text -------------------------------------------------------------------

    @property
    def log_p(self) -> Tensor:
        return (self.p_logits / self._temperature).log_softmax(-1)

    @property
    def log_q(self) -> Tensor:
        """[B, C] for a method that distils, else that of the label."""
        if self._feed.method.consumes == "tokens":
            return self.log_q_label
        return (self.logits / self._temperature).log_softmax(-1)

    @property
    def log_p_label(self) -> Tensor:
        return self._of_label(self.p_logits.log_softmax(-1))

    @property
    def log_q_label(self) -> Tensor:
        return self._of_label(self.logits.log_softmax(-1))

    @property
    def sequence(self) -> Tensor:
        return torch.arange(len(self.inputs), device=self.inputs.device)

    @property
    def sequences(self) -> float:
        return float(self._feed.spec.batch_size)

    @property
    def _temperature(self) -> float:
        return getattr(self._feed.method, "temperature", 1.0)

    def _of_label(self, log_probs: Tensor) -> Tensor:
        if self.labels.dtype != torch.int64:
            raise ValueError(
                f"{self._feed.method!r} learns classes, and this task has numbers to be predicted; write "
                "SquaredError(), or a task with classes"
            )
        return log_probs.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def shapes_of(network: Any, teacher: Any, inputs: Tensor) -> Shapes:
    """Of a student and, if there is one, its teacher; the networks stay in their modes."""
    stages = _stages(network, inputs)
    p_stages = () if teacher is None else _stages(teacher, inputs)
    p_width = p_stages[-1][0] if p_stages else 0
    return Shapes(stages[-1][0], network.head.out_features, stages, p_width, p_stages)


def _stages(network: Any, inputs: Tensor) -> tuple[torch.Size, ...]:
    training = network.training
    shapes = tuple(stage.shape[1:] for stage in network.eval().stages(inputs))
    network.train(training)
    return shapes
