"""Writes docs/divergences.md, the catalogue, from the classes that fdiv exports."""

import inspect
from dataclasses import MISSING, dataclass, fields, is_dataclass
from fractions import Fraction
from math import inf, isinf
from pathlib import Path

import fdiv

PAGE = Path(__file__).with_name("divergences.md")

# A family is shown where its character changes, any other class at its defaults.
REGIMES = {
    "Alpha": ["Alpha(-1.0)", "Alpha(0.3)", "Alpha(2.0)"],
    "JS": ["JS(0.1)", "JS(0.5)"],
    "SkewKL": ["SkewKL(0.1)"],
    "SkewReverseKL": ["SkewReverseKL(0.1)"],
}
MADE_OF_OTHERS = {"Generator", "Reverse", "Sum"}

HEAD = """\
# The catalogue

This page is written by `docs/generate_divergences.py` from the code; do not edit it. p is what you
want, q what you have, u = p/q. [Which divergence should I use?](choose.md) says what the
columns mean for training.

## f-divergences

D(p, q) = sum q f(p/q), with f(1) = f'(1) = 0.

| divergence | D(p, q) | f(0) | f'(inf) | f'(0) | f''(1) | bound | character |
|---|---|---|---|---|---|---|---|
"""

MADE = """
## Made of others

| class | what it is |
|---|---|
"""

OTHERS = """
## Others

No generator f, and so none of the numbers above.

| class | what it is |
|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One line of the first table."""

    divergence: fdiv.FDivergence

    def __str__(self) -> str:
        d = self.divergence
        ends = (d.f_at_zero, d.slope_at_infinity, d.slope_at_zero, d.curvature_at_one, d.bound)
        cells = [f"`{d!r}`", summary(type(d)), *map(number, ends), d.character]
        return "| " + " | ".join(cells) + " |"


def main() -> None:
    members = exported()
    plain = [c for c in members if issubclass(c, fdiv.FDivergence) and c.__name__ not in MADE_OF_OTHERS]
    rows = [Row(fdiv.parse(text)) for c in plain for text in REGIMES.get(c.__name__, [example(c)])]
    made = [c for c in members if c.__name__ in MADE_OF_OTHERS]
    others = [c for c in members if not issubclass(c, fdiv.FDivergence)]

    page = HEAD + lines(rows) + MADE + lines(map(entry, made)) + OTHERS + lines(map(entry, others))
    PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE.name}: {len(rows)} rows of f-divergences, {len(made) + len(others)} other classes")


def exported() -> list[type]:
    """The concrete divergences that fdiv exports, by name."""
    bases = (fdiv.Divergence, fdiv.MetricDivergence, fdiv.BregmanDivergence)
    found = {c for c in vars(fdiv).values() if inspect.isclass(c) and issubclass(c, bases)}
    return sorted((c for c in found if not inspect.isabstract(c)), key=lambda c: c.__name__)


def example(divergence: type) -> str:
    """The class at its defaults; a parameter without one is shown at 0.5."""
    required = [
        f"{field.name}=0.5"
        for field in (fields(divergence) if is_dataclass(divergence) else ())
        if field.init and field.default is MISSING and field.default_factory is MISSING
    ]
    return f"{divergence.__name__}({', '.join(required)})"


def entry(divergence: type) -> str:
    signature = inspect.signature(divergence)
    names = ", ".join(signature.parameters)
    return f"| `{divergence.__name__}({names})` | {summary(divergence)} |"


def summary(divergence: type) -> str:
    """The first line of the docstring, as a cell of a table."""
    first = (inspect.getdoc(divergence) or "").partition("\n")[0]
    return first.replace("|", "\\|")


def number(value: float) -> str:
    """A short fraction where it is one, four digits otherwise."""
    if isinf(value):
        return "inf" if value == inf else "-inf"
    short = Fraction(value).limit_denominator(12)
    return str(short) if abs(short - value) < 1e-9 else f"{value:.4g}"


def lines(rows) -> str:
    return "".join(f"{row}\n" for row in rows)


if __name__ == "__main__":
    main()
