"""What fdiv is measured against: one file a package, one function a peer, each doing one whole step."""

import importlib
from collections.abc import Callable
from types import ModuleType

from benchmarks.speed.case import Outcome
from benchmarks.speed.measure import Absent
from fdiv import JS, KL, FDivergence, ReverseKL


def peer(file: str, function: str, *args, **options) -> Callable[[], Outcome]:
    """`function` of peers/<file>.py with its arguments; its package is imported when it is called."""

    def step() -> Outcome:
        return getattr(load(file), function)(*args, **options)

    return step


def load(file: str) -> ModuleType:
    """peers/<file>.py, or the note that its package is missing."""
    try:
        return importlib.import_module(f"{__name__}.{file}")
    except ImportError as error:
        raise Absent(f"not installed: {error.name or error}") from error


def beta_of(divergence: FDivergence) -> float:
    """The number by which TRL and Liger name a divergence: 0 is KL, 1 is ReverseKL, else JS(beta)."""
    match divergence:
        case KL():
            return 0.0
        case ReverseKL():
            return 1.0
        case JS(beta=beta):
            return beta
    raise Absent(f"covers KL, ReverseKL and JS, not {divergence!r}")
