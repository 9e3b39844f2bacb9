"""The contract of a sampler: who writes the responses of a step."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

# "both": each prompt is answered twice, by the teacher and by the student. "tokens": teacher and student take
# turns, token by token. "replay": what the student wrote some steps ago.
Writer = Literal["data", "teacher", "student", "both", "tokens", "replay"]


@dataclass(frozen=True)
class Decoding:
    """How a model is sampled: logits over `temperature` (0: greedily), then the k likeliest, then mass p."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0 (0 is greedy), got {self.temperature!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is a number of tokens >= 1 or None, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a mass in (0, 1], got {self.top_p!r}")


@runtime_checkable
class Sampler(Protocol):
    """A frozen dataclass that says who writes, step by step."""

    @property
    def decoding(self) -> Decoding:
        """Of whoever writes."""
        ...

    def writer(self, uniform: float, progress: float, state: dict[str, float]) -> Writer:
        """Of the next step; `uniform` is drawn in [0, 1), `progress` the fraction of steps done."""
        ...


@runtime_checkable
class Steered(Protocol):
    """A sampler that follows the validation loss, by numbers that the trainer keeps and saves."""

    def initial_state(self) -> dict[str, float]: ...

    def advance(self, state: dict[str, float], loss: float) -> dict[str, float]:
        """After an evaluation in training whose loss is `loss`."""
        ...
