"""Measured lines as a table on the terminal and as a CSV file."""

import csv
from collections.abc import Iterable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.speed.case import Line

Record = dict[str, str]


def as_text(lines: list[Line]) -> Group:
    """A title, the numbers, and below them what was promised and what is worth knowing."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("candidate", min_width=20)
    for name in ("CPU s", "time to first", "floor", "MB", "to first", "loss", "gradient"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(line.candidate, *_numbers(line))
    remarks = [Text(f"  {line.candidate}: {remark}") for line in lines for remark in _remarks(line)]
    return Group(Text(f"{lines[0].rows}  {lines[0].setting}", style="bold"), table, *remarks, "")


def _numbers(line: Line) -> tuple[str, ...]:
    is_first = line.candidate == line.against
    span = f"{line.ratio.median:.2f} ({line.ratio.low:.2f}-{line.ratio.high:.2f})" if line.ratio else ""
    return (
        _short(line.seconds),
        "" if is_first else span,
        f"{line.of_floor:.0%}" if line.of_floor is not None else "",
        f"{line.megabytes:.0f}" if line.megabytes is not None else "",
        "" if is_first else _short(line.memory_ratio),
        f"{line.loss_error:.0e}" if line.loss_error is not None else "",
        f"{line.gradient_error:.0e}" if line.gradient_error is not None else "",
    )


def _remarks(line: Line) -> list[str]:
    judged = [f"{target}: {verdict}" for target, verdict in zip(line.targets, line.verdicts, strict=True)]
    return judged + ([f"{line.graphs} graphs"] if line.graphs is not None else []) + line.notes


def record(line: Line, rounds: int, environment: Record) -> Record:
    """One line of the CSV: where it was measured, then what."""
    low, high = (line.ratio.low, line.ratio.high) if line.ratio else (None, None)
    return environment | {
        "rounds": str(rounds),
        "rows": line.rows,
        "setting": line.setting,
        "candidate": line.candidate,
        "against": line.against,
        "cpu_seconds": _cell(line.seconds),
        "time_ratio": _cell(line.quantity("time")),
        "time_ratio_low": _cell(low),
        "time_ratio_high": _cell(high),
        "share_of_floor": _cell(line.of_floor),
        "peak_mb": _cell(line.megabytes),
        "memory_ratio": _cell(line.memory_ratio),
        "loss_error": _cell(line.loss_error),
        "gradient_error": _cell(line.gradient_error),
        "weight_gradient_error": _cell(line.weight_gradient_error),
        "graphs": _cell(line.graphs),
        "targets": "; ".join(map(str, line.targets)),
        "met": "; ".join(line.verdicts),
        "notes": "; ".join(line.notes),
    }


def write(path: Path, fresh: list[Record]) -> None:
    """Lines of rows measured now take the place of older ones; those of other rows stay as they are."""
    measured = {r["rows"] for r in fresh}
    records = [r for r in (read(path) if path.exists() else []) if r["rows"] not in measured] + fresh
    records.sort(key=lambda r: int(r["rows"].split("-")[0].removeprefix("B")))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=_columns(records), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def read(path: Path) -> list[Record]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _columns(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(name for r in reversed(list(records)) for name in r))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
