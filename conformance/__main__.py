"""`python -m conformance`: run the cases on every system that is installed, and write the matrix."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from conformance import matrix
from conformance.case import Result, run
from conformance.cases import CASES
from conformance.systems import SYSTEMS, Missing, load

ROOT = Path(__file__).parent.parent
Systems = Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(SYSTEMS)}; default: all")]
Out = Annotated[
    Path | None,
    typer.Option(help="folder for matrix.csv alone; default: conformance/, and docs/conformance.md with it"),
]


def main(system: Systems = None, out: Out = None) -> None:
    """The matrix: system and version, case, pass or fail, and the number that was measured."""
    unknown = sorted(set(system or ()) - set(SYSTEMS))
    if unknown:
        raise typer.BadParameter(f"no system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    torch.set_num_threads(1)
    results = [result for name in system or SYSTEMS for result in results_of(name)]
    console = Console()
    console.print(matrix.terminal_table(results))
    file = (out or ROOT / "conformance") / "matrix.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = matrix.merged(matrix.read(file), results)
    matrix.write(file, kept)
    if out is None:
        page = ROOT / "docs" / "conformance.md"
        page.write_text(matrix.page(page.read_text(encoding="utf-8"), kept), encoding="utf-8")
        console.print(f"page: [bold]{page}[/bold]")
    console.print(f"matrix: [bold]{file}[/bold]")
    if any(r.system == "fdiv" and r.status in ("fail", "error") for r in results):
        raise typer.Exit(1)


def results_of(name: str) -> list[Result]:
    """Every case on one system; for a missing one, the line that installs it instead of a number."""
    system = load(name)
    if isinstance(system, Missing):
        return [Result(case.id, name, "", "not installed", None, system.install) for case in CASES]
    return [run(case, system) for case in CASES]


if __name__ == "__main__":
    typer.run(main)
