"""The command `python -m benchmarks.speed`; --help lists its options."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.speed import machine, table
from benchmarks.speed.publish import RESULTS, publish
from benchmarks.speed.rows import GROUPS, Group

LOG_WIDTH = 120  # where there is no terminal to ask


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="Further rows, as for --only.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows to measure: B1,B5. All if none.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often everybody is timed, in turn.")] = 5,
    quick: Annotated[bool, typer.Option(help="Small shapes, one round, nothing kept: does it run?")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file; a name of this machine's by default.")] = None,
    page: Annotated[
        bool, typer.Option("--publish", help="Measure nothing; write docs/speed.md from the CSV files.")
    ] = False,
) -> None:
    """Measure fdiv beside its peers: CPU time on one thread, peak memory, error against float64."""
    if page:
        return publish()
    groups = _chosen([*(only or []), *(rows or [])])
    machine.settle()
    kept = None if quick and not out else out or RESULTS / f"{machine.short_name()}.csv"
    failed = False
    for records in _measured(groups, quick, 1 if quick else rounds):
        failed |= any("failed: " in r["notes"] for r in records)
        if kept:
            table.write(kept, records)
    if kept and not out:
        publish()
    if failed:
        raise typer.Exit(1)


def _measured(groups: list[Group], quick: bool, rounds: int) -> Iterator[list[table.Record]]:
    """The records of each group as soon as it is measured, so that a run cut short keeps its rows."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    environment = machine.environment()
    console.print(", ".join(f"{k} {v}" for k, v in environment.items()), style="dim")
    for group in groups:
        records = []
        for lines in group.lines(quick, rounds):
            console.print(table.as_text(lines))
            records += [table.record(line, rounds, environment) for line in lines]
        yield records


def _chosen(names: list[str]) -> list[Group]:
    wanted = {name.upper() for text in names for name in re.split(r"[ ,]+", text) if name}
    known = [row for group in GROUPS for row in group.rows]
    unknown = sorted(wanted - set(known))
    if unknown:
        raise typer.BadParameter(f"there is no row {', '.join(unknown)}; the rows are {', '.join(known)}")
    return [group for group in GROUPS if not wanted or wanted & set(group.rows)]


if __name__ == "__main__":
    typer.run(main)
