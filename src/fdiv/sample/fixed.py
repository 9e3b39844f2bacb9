"""One writer for all steps, or a coin between two."""

from dataclasses import dataclass, field

from fdiv.sample._sampler import Decoding, Writer


@dataclass(frozen=True)
class Offline:
    """The responses that the task's data hold: off-policy distillation."""

    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self):
        if self.decoding != Decoding():
            raise ValueError(f"nobody writes, so that nothing is decoded; leave out {self.decoding!r}")

    def writer(self, uniform: float, progress: float, state: dict[str, float]) -> Writer:
        return "data"


@dataclass(frozen=True)
class TeacherWritten:
    """Responses that the teacher writes once, before training."""

    decoding: Decoding = field(default_factory=Decoding)

    def writer(self, uniform: float, progress: float, state: dict[str, float]) -> Writer:
        return "teacher"


@dataclass(frozen=True)
class Both:
    """Each prompt answered by the teacher (once, before training) and by the student (now)."""

    decoding: Decoding = field(default_factory=Decoding)

    def writer(self, uniform: float, progress: float, state: dict[str, float]) -> Writer:
        return "both"


@dataclass(frozen=True)
class Mix:
    """The student with probability `lmbda` a step, else the data. Mix(1) is on-policy distillation."""

    lmbda: float = 1.0
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self):
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda is a fraction between 0 and 1, got {self.lmbda!r}")

    def writer(self, uniform: float, progress: float, state: dict[str, float]) -> Writer:
        return "student" if uniform < self.lmbda else "data"


@dataclass(frozen=True)
class TeacherMixed:
    """Every token from alpha p + (1 - alpha) q, MiniLLM's sampler; q / mixture is at most 1 / (1 - alpha)."""

    alpha: float = 0.2
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self):
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha is a fraction in [0, 1), got {self.alpha!r}")

    def writer(self, uniform: float, progress: float, state: dict[str, float]) -> Writer:
        return "tokens"
