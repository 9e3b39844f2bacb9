"""What is measured, one file a group of rows: the shapes, who takes part, and what each row promises."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.speed.case import Case, Line, measure_cases
from benchmarks.speed.rows import (
    accuracy,
    catalogue,
    compile_cost,
    entmax,
    frozen,
    fused_linear,
    log_prob,
    low_precision,
    masked,
    memory,
    newton,
    peaked,
    sinkhorn,
    top_k,
    trainer,
)


class Group(NamedTuple):
    """`lines(quick, rounds)` measures the rows, one list of lines a case."""

    rows: tuple[str, ...]
    lines: Callable[[bool, int], Iterator[list[Line]]]


def _measured(cases: Callable[[bool], Iterator[Case]]) -> Callable[[bool, int], Iterator[list[Line]]]:
    return lambda quick, rounds: measure_cases(cases(quick), rounds, quick)


GROUPS = (
    Group(("B1", "B2", "B3", "B4"), _measured(fused_linear.cases)),
    Group(("B5", "B6"), _measured(low_precision.cases)),
    Group(("B7",), _measured(memory.cases)),
    Group(("B8",), _measured(masked.cases)),
    Group(("B9",), _measured(frozen.cases)),
    Group(("B10",), _measured(catalogue.generic_cases)),
    Group(("B11",), _measured(catalogue.cases)),
    Group(("B12",), _measured(log_prob.cases)),
    Group(("B13",), _measured(top_k.cases)),
    Group(("B14",), _measured(entmax.cases)),
    Group(("B15",), _measured(sinkhorn.cases)),
    Group(("B16",), _measured(accuracy.cases)),
    Group(("B17",), _measured(peaked.cases)),
    Group(("B18",), compile_cost.lines),
    Group(("B19",), _measured(trainer.cases)),
    Group(("B20",), _measured(newton.cases)),
)
