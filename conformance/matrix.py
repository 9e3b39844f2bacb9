"""The matrix of all results: as a file, as a table of the terminal, as a page of the documentation."""

import csv
from pathlib import Path

from rich.table import Table

from conformance.case import Result
from conformance.cases import CASES, SECTIONS, cases_of
from conformance.systems import SYSTEMS

BEGIN, END = "<!-- matrix: written by python -m conformance -->", "<!-- end of matrix -->"
STYLES = {"pass": "green", "fail": "red", "error": "yellow"}
SHORT = {"not applicable": "-", "not installed": "not installed"}


def read(file: Path) -> list[Result]:
    """The results of an earlier run; none where there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [Result(**row | {"value": float(row["value"]) if row["value"] else None}) for row in rows]


def write(file: Path, results: list[Result]) -> None:
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, Result._fields, lineterminator="\n")
        writer.writeheader()
        for result in results:
            number = "" if result.value is None else f"{result.value:.4g}"
            writer.writerow(result._asdict() | {"value": number})


def merged(old: list[Result], new: list[Result]) -> list[Result]:
    """All systems in their order; one that was not run, or is not installed, keeps what was measured last."""
    rows = []
    for system in SYSTEMS:
        fresh = [r for r in new if r.system == system]
        before = [r for r in old if r.system == system and r.status != "not installed"]
        absent = all(r.status == "not installed" for r in fresh)
        rows += before if absent and before else fresh
    return rows


def terminal_table(results: list[Result]) -> Table:
    """A row a case, a column a system; what must hold is said where there is room for it."""
    columns = _columns(results)
    said = len(columns) <= 2
    table = Table(box=None, header_style="bold")
    table.add_column("case", no_wrap=True)
    if said:
        table.add_column("what must hold", ratio=1)
    for heading in columns.values():
        table.add_column(heading, no_wrap=True)
    for case in CASES:
        cells = [_styled(_find(results, case.id, system)) for system, _ in columns]
        table.add_row(case.id, *[case.sentence][: int(said)], *cells)
    return table


def page(text: str, results: list[Result]) -> str:
    """`text` with what lies between its two markers written anew."""
    head, found, rest = text.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r} around its table")
    return f"{head}{BEGIN}\n\n{_markdown(results)}\n{END}{tail}"


def _markdown(results: list[Result]) -> str:
    columns = _columns(results)
    installs = [[name, f"`{install}`"] for name, (_, install) in SYSTEMS.items()]
    parts = [_table([["system", "installed with"], ["---"] * 2, *installs])]
    for title, section in SECTIONS.items():
        rows = [["case", "what must hold", *columns.values()], ["---"] * (2 + len(columns))]
        for case in cases_of(section):
            links = " ".join(f"[{i}]({url})" for i, url in enumerate(case.threads, 1))
            cells = [_cell(_find(results, case.id, system)) for system, _ in columns]
            rows.append([case.id, f"{case.sentence} {links}".strip(), *cells])
        parts.append(f"### {title}\n\n{_table(rows)}")
    failures = [
        [r.case, f"{r.system} {r.version}", _number(r), r.what] for r in results if r.status == "fail"
    ]
    heads = [["case", "system", "measured", "what was measured"], ["---"] * 4]
    parts.append("### What the failures measured\n\n" + _table(heads + sorted(failures)))
    return "\n".join(parts)


def _table(rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _columns(results: list[Result]) -> dict[tuple[str, str], str]:
    """(system, version) -> heading, in the order of `SYSTEMS`."""
    pairs = dict.fromkeys((r.system, r.version) for r in results)
    return {pair: " ".join(pair).strip() for pair in pairs}


def _find(results: list[Result], case: str, system: str) -> Result | None:
    return next((r for r in results if (r.case, r.system) == (case, system)), None)


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    status = SHORT.get(result.status, result.status)
    status = f"**{status}**" if result.status == "fail" else status
    return f"{status} {_number(result)}".strip()


def _styled(result: Result | None) -> str:
    if result is None:
        return ""
    style, cell = STYLES.get(result.status, "dim"), _cell(result).replace("*", "")
    return f"[{style}]{cell}[/{style}]"


def _number(result: Result) -> str:
    return "" if result.value is None else f"{result.value:.2g}"
