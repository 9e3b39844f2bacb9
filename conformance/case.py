"""A case, its verdict, and the one loop that runs it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from conformance.system import NotApplicable, System


class Verdict(NamedTuple):
    """Whether the system does what the case's sentence says, and the number that tells."""

    passed: bool
    value: float
    what: str


@dataclass(frozen=True)
class Case:
    """One mistake: `sentence` says what must hold, `threads` where somebody met it."""

    id: str
    sentence: str
    threads: tuple[str, ...]
    judge: Callable[[System], Verdict]

    def __call__(self, system: System) -> Verdict:
        return self.judge(system)


class Result(NamedTuple):
    """One cell of the matrix."""

    case: str
    system: str
    version: str
    status: str  # "pass", "fail", "not applicable", "not installed" or "error"
    value: float | None
    what: str


def case(id: str, sentence: str, *threads: str) -> Callable[[Callable[[System], Verdict]], Case]:
    """Make a case of the function that judges it; threads are paths on github.com."""
    links = tuple(f"https://github.com/{thread}" for thread in threads)
    return lambda judge: Case(id, sentence, links, judge)


def run(case: Case, system: System) -> Result:
    """The verdict on an installed system. An exception that no case expects is no verdict, but an "error"."""
    cell = (case.id, system.name, system.version)
    try:
        verdict = case(system)
    except NotApplicable as reason:
        return Result(*cell, "not applicable", None, system.reasons.get(case.id, str(reason)))
    except Exception as error:  # the adapter does not fit, or the system is broken: a person has to look
        return Result(*cell, "error", None, f"{type(error).__name__}: {error}".splitlines()[0])
    return Result(*cell, "pass" if verdict.passed else "fail", verdict.value, verdict.what)


def at_most(limit: float, value: float, what: str) -> Verdict:
    """Passes for value <= limit; nan and inf do not."""
    return Verdict(value <= limit, value, f"{what} <= {limit:g}")


def at_least(limit: float, value: float, what: str) -> Verdict:
    """Passes for a finite value >= limit."""
    return Verdict(limit <= value < math.inf, value, f"{what} >= {limit:g}")


def refused(value: float, what: str) -> Verdict:
    """The system raised where it cannot answer, which is an answer."""
    return Verdict(True, value, what)


def worst(verdicts: list[Verdict]) -> Verdict:
    """The first that fails, else the last."""
    return next((v for v in verdicts if not v.passed), verdicts[-1])
