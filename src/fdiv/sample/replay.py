"""DistiLLM's adaptive sampler: the student writes more as it improves less, and its text is used again.

Ko, Kim, Chen and Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv
2402.03898. With phi the share of the student's text and t/T the progress, a step is written

    by the student, into a buffer of `capacity` sequences,   with probability phi (1 - t/T)
    by the student earlier (a draw from the buffer),          with the rest of phi
    by the data,                                              with probability 1 - phi

and phi grows by `step` when the validation loss exceeds the last one that did by `threshold`.
"""

from dataclasses import dataclass, field

from fdiv.sample._sampler import Decoding, Writer


@dataclass(frozen=True)
class AdaptiveReplay:
    """phi starts at `start`. The trainer fills the buffer and asks for a fresh text while it is not full."""

    start: float = 0.0
    step: float = 0.1
    threshold: float = 0.1
    capacity: int = 1000
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self):
        if not 0 <= self.start <= 1 or not 0 <= self.step <= 1:
            raise ValueError(f"start and step are fractions, got {self.start!r} and {self.step!r}")
        if self.threshold < 0 or self.capacity < 1:
            raise ValueError(f"threshold >= 0 and capacity >= 1, got {self.threshold!r}, {self.capacity!r}")

    def initial_state(self) -> dict[str, float]:
        return {"share": self.start, "worst": float("inf"), "seen": 0.0}

    def writer(self, uniform: float, progress: float, state: dict[str, float]) -> Writer:
        share = state["share"]
        if uniform < share * (1 - progress):
            return "student"
        return "replay" if uniform < share else "data"

    def advance(self, state: dict[str, float], loss: float) -> dict[str, float]:
        """The first evaluation sets the level; later ones raise both, or leave both as they are."""
        if not state["seen"]:
            return state | {"worst": loss, "seen": 1.0}
        if loss < state["worst"] + self.threshold:
            return state
        return state | {"share": min(1.0, state["share"] + self.step), "worst": loss}
