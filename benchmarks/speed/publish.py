"""Puts the CSV files into docs/speed.md: the table between its markers, and the pictures."""

from pathlib import Path

from benchmarks.speed.machine import PACKAGES, ROOT
from benchmarks.speed.plot import draw, has_memory, has_solvers
from benchmarks.speed.table import Record, read

RESULTS = ROOT / "benchmarks" / "speed" / "results"
PAGE = ROOT / "docs" / "speed.md"
HEADER = "| row | setting | who | measured | target | |\n|---|---|---|---|---|---|\n"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def publish(results: Path = RESULTS, page: Path = PAGE) -> None:
    files = sorted(results.glob("*.csv"))
    sections = [_section(read(file), file.stem) for file in files] or ["Nothing has been measured yet."]
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    measured = "\n\n".join([*sections, _gpu()])
    page.write_text(f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}", encoding="utf-8")
    for file in files:
        draw(read(file), page.parent / "img", file.stem)


def _section(records: list[Record], name: str) -> str:
    last = max(records, key=lambda r: r["date"])
    commits = ", ".join(dict.fromkeys(r["commit"] for r in records))
    versions = ", ".join(f"{package} {last[package]}" for package in PACKAGES)
    judged = [line for r in records for line in _judged(r)]
    met, not_met = (sum(verdict == v for *_, verdict in judged) for v in ("met", "not met"))
    body = "\n".join("| " + " | ".join(line) + " |" for line in judged)
    solvers = f"![The same of solvers](img/speed-solvers-{name}.svg)\n\n" if has_solvers(records) else ""
    memory = f"![Peak memory against tokens](img/speed-memory-{name}.svg)\n\n" if has_memory(records) else ""
    return (
        f"### {last['cpu']}\n\n{last['threads']} thread, medians of {last['rounds']} rounds, {last['date']}, "
        f"commit {commits}. {versions}.\n\n"
        f"![CPU time of the peers over that of fdiv](img/speed-{name}.svg)\n\n"
        f"{solvers}{memory}{_counted(records)}{_missing(records)}"
        f"Of {len(judged)} targets {met} are met and {not_met} are not.\n\n{HEADER}{body}"
    )


def _counted(records: list[Record]) -> str:
    """Steps of the transport solvers, which the notes of their row tell."""
    rows = [r for r in records if r["rows"] == "B20"]
    lines = [f"| {r['setting']} | {r['candidate']} | {r['notes']} | {r['cpu_seconds']} |" for r in rows]
    head = "| B20, float64 | who | steps | CPU seconds |\n|---|---|---|---|\n"
    return head + "\n".join(lines) + "\n\n" if rows else ""


def _missing(records: list[Record]) -> str:
    measured = {row for r in records for row in r["rows"].split("-")}
    missing = [row for row in ("B7", "B8", "B9", *(f"B{n}" for n in range(10, 19))) if row not in measured]
    return f"Not measured on this machine yet: {', '.join(missing)}.\n\n" if missing else ""


def _judged(record: Record) -> list[tuple[str, ...]]:
    """A line of the page for each target of a record."""
    lines = []
    for target, verdict in zip(record["targets"].split("; "), record["met"].split("; "), strict=True):
        if not target:
            continue
        row, promise = target.split(": ", 1)
        notes = f"{verdict} ({record['notes']})" if verdict == "not measured" and record["notes"] else verdict
        who = f"{record['candidate']} / {record['against']}"
        if record["candidate"] == record["against"] or promise.split()[0] not in ("time", "memory"):
            who = record["candidate"]
        lines.append((row, record["setting"], who, _measured(promise, record), promise, notes))
    return lines


def _measured(promise: str, record: Record) -> str:
    quantity = promise.split(" ≥ ")[0].split(" ≤ ")[0]
    column = {"time": "time_ratio", "memory": "memory_ratio", "seconds": "cpu_seconds"}
    value = record[column.get(quantity, quantity.replace(" ", "_"))]
    if quantity == "time" and value:
        return f"{float(value):.2f}x ({record['time_ratio_low']} to {record['time_ratio_high']})"
    return f"{float(value):.3g}" if value else "-"


def _gpu() -> str:
    return (
        "### GPU\n\nNot measured: there is no figure for any GPU yet.\n\n"
        f"{HEADER}| B1-B18 | any GPU | everybody | - | - | not measured |"
    )
