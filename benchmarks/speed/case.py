"""A case is one setting with everybody who can do it; measured, it is a line for each of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.measure import (
    Absent,
    Ratio,
    Step,
    alternate,
    one_line,
    paired_ratio,
    peak_megabytes,
    relative_error,
)

Quantity = Literal["time", "memory", "loss error", "gradient error", "seconds", "graphs"]


class Outcome(NamedTuple):
    """What one step computed: a value, and gradients in the hidden states and (if trained) in the head."""

    value: Tensor
    gradients: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Target:
    """What a row promises. "time" and "memory" are ratios to the candidate named by `against`."""

    row: str
    quantity: Quantity
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        sign, bound = ("≥", self.at_least) if self.at_least is not None else ("≤", self.at_most)
        unit = {"time": "x", "memory": "x", "seconds": " s"}.get(self.quantity, "")
        return f"{self.row}: {self.quantity} {sign} {bound:g}{unit}"

    def verdict(self, line: "Line") -> str:
        measured = line.quantity(self.quantity)
        if measured is None:
            return "not measured"
        low = self.at_least is not None and not measured >= self.at_least
        high = self.at_most is not None and not measured <= self.at_most
        return "not met" if low or high else "met"


@dataclass(frozen=True)
class Candidate:
    """One way of doing a case's work. `against`: whom its ratios are taken to, the first if empty."""

    name: str
    step: Callable[[], Outcome]
    against: str = ""
    targets: tuple[Target, ...] = ()
    reference: Callable[[], Outcome] | None = None  # where it differs from the case's
    note: str = ""


@dataclass(frozen=True)
class Case:
    """`floor`: the candidate that does only what everybody must. `repeat`: steps in one timing."""

    rows: str
    setting: str
    candidates: tuple[Candidate, ...]
    reference: Callable[[], Outcome] | None = None  # the same work in float64
    floor: str = ""
    repeat: int = 1
    timed: bool = True
    weighed: bool = True


@dataclass
class Line:
    """What is known of one candidate in one case; None where it was not measured."""

    rows: str
    setting: str
    candidate: str
    against: str
    seconds: float | None = None
    ratio: Ratio | None = None
    of_floor: float | None = None
    megabytes: float | None = None
    memory_ratio: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    weight_gradient_error: float | None = None
    graphs: int | None = None
    targets: tuple[Target, ...] = ()
    notes: list[str] = field(default_factory=list)

    def quantity(self, name: Quantity) -> float | None:
        return {
            "time": self.ratio.median if self.ratio else None,
            "memory": self.memory_ratio,
            "loss error": self.loss_error,
            "gradient error": self.gradient_error,
            "seconds": self.seconds,
            "graphs": self.graphs,
        }[name]

    @property
    def verdicts(self) -> list[str]:
        return [target.verdict(self) for target in self.targets]


def measure_cases(cases: Iterable[Case], rounds: int, quick: bool = False) -> Iterator[list[Line]]:
    """One list of lines a case, as each is finished."""
    for case in cases:
        yield measure(case, rounds, quick)


def measure(case: Case, rounds: int, quick: bool = False) -> list[Line]:
    """`quick`: graphs of earlier cases serve again, and memory is measured only where nothing is timed."""
    if not quick:
        torch.compiler.reset()  # another case's graphs neither help nor count against the recompile limit
    first = case.candidates[0].name
    lines = {
        c.name: Line(case.rows, case.setting, c.name, c.against or first, targets=c.targets)
        for c in case.candidates
    }
    for candidate in case.candidates:
        if candidate.note:
            lines[candidate.name].notes.append(candidate.note)
    able = _warm_and_compare(case, lines)
    if case.timed:
        _time(case, able, lines, rounds)
    if case.weighed and not (quick and case.timed):
        _weigh(able, lines)
    return list(lines.values())


def _warm_and_compare(case: Case, lines: dict[str, Line]) -> dict[str, Step]:
    """Run everybody once, which compiles, and note the errors; returns those who ran."""
    exact: dict[Callable[[], Outcome], Outcome] = {}
    able: dict[str, Step] = {}
    for candidate in case.candidates:
        line, reference = lines[candidate.name], candidate.reference or case.reference
        if not (case.timed or reference):  # for memory alone, the child runs it
            able[candidate.name] = candidate.step
            continue
        try:
            outcome = candidate.step()
        except Absent as absent:
            line.notes.append(str(absent))
            continue
        except Exception as error:  # a peer that fails is a finding, not the end of the run
            line.notes.append(f"failed: {one_line(error)}")
            continue
        able[candidate.name] = candidate.step
        if reference and candidate.name != case.floor:
            if reference not in exact:
                exact[reference] = reference()
            _compare(line, outcome, exact[reference])
    return able


def _compare(line: Line, outcome: Outcome, exact: Outcome) -> None:
    line.loss_error = relative_error(outcome.value, exact.value)
    # zip: a peer may return a head's gradient that nobody asked for
    errors = [relative_error(a, b) for a, b in zip(outcome.gradients, exact.gradients, strict=False)]
    line.gradient_error, line.weight_gradient_error = [*errors, None, None][:2]


def _time(case: Case, able: dict[str, Step], lines: dict[str, Line], rounds: int) -> None:
    seconds = alternate(able, rounds, case.repeat)
    for name, own in seconds.items():
        line = lines[name]
        line.seconds = median(own)
        if line.against in seconds:
            line.ratio = paired_ratio(own, seconds[line.against])
        if case.floor in seconds:
            line.of_floor = paired_ratio(seconds[case.floor], own).median


def _weigh(able: dict[str, Step], lines: dict[str, Line]) -> None:
    for name, step in able.items():
        try:
            lines[name].megabytes = peak_megabytes(step)
        except MemoryError as error:
            lines[name].notes.append(f"memory: {error}")
    for line in lines.values():
        base = lines[line.against].megabytes if line.against in lines else None
        if line.megabytes is not None and base:
            line.memory_ratio = line.megabytes / base
