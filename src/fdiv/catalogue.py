"""What fdiv has, read off its classes: for `fdiv list` and the documentation."""

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import fdiv
from fdiv._divergence import Divergence, FDivergence
from fdiv._metric import MetricDivergence, OnPoints

COMBINATORS = (fdiv.Sum, fdiv.Reverse, fdiv.Generator, OnPoints)
EXAMPLE = 0.5  # stands in for a parameter without a default


class Row(NamedTuple):
    """One divergence at its default parameters (0.5 where it has none)."""

    notation: str
    formula: str
    curvature: str
    bound: str
    character: str


def rows() -> list[Row]:
    """Every divergence that fdiv exports, f-divergences first."""
    found = sorted(_classes(), key=lambda c: (not issubclass(c, FDivergence), c.__name__.lower()))
    return [_row(c) for c in found]


def _classes() -> Iterator[type]:
    for value in vars(fdiv).values():
        if not inspect.isclass(value) or inspect.isabstract(value) or value in COMBINATORS:
            continue
        if issubclass(value, Divergence | MetricDivergence):
            yield value


def example(cls: type) -> Any:
    """An instance with defaults, and `EXAMPLE` for every field that has none."""
    required = [f for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    return cls(**{f.name: EXAMPLE for f in required})


def _row(cls: type) -> Row:
    formula = re.split(r": |; |\. | [<>]= ", (cls.__doc__ or "").strip().splitlines()[0])[0].rstrip(".")
    if not issubclass(cls, FDivergence):  # not built: one of them needs a package that may be missing
        kind = "between points" if issubclass(cls, MetricDivergence) else "no f-divergence"
        return Row(_signature(cls), formula, "-", "-", kind)
    divergence = example(cls)
    return Row(
        repr(divergence),
        formula,
        _number(divergence.curvature_at_one),
        _number(divergence.bound),
        divergence.character,
    )


def _signature(cls: type) -> str:
    return f"{cls.__name__}({', '.join(f.name for f in fields(cls))})"


def _number(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.4g}"
