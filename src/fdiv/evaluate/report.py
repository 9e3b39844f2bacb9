"""One HTML file a set of chapters, with its figures and tables beside it.

    write_report([Path("out/distil"), Path("out/rl")], Path("out/report"))

The file stands alone: no script, no font and no style from elsewhere; figures are inline SVG.
"""

import re
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from . import tables
from .chapter import load_chapter
from .heatmap import marks, shade
from .overview import overview, reproducibility, rows
from .palette import styles, swatch
from .pictures import panels, pictures, spread
from .reading import read
from .terminal import terminal_table as terminal_table
from .wording import counted, listing

HOW = {True: "numbers enumerated exactly", False: "numbers estimated from samples"}
MOST_PROMPTS, MOST_OUTPUTS, MOST_CHARACTERS = 6, 4, 160


def write_report(runs, out):
    """Write OUT/index.html, OUT/figures/ (SVG, PNG), OUT/tables/ (CSV, MD, TEX); the HTML's path.

    runs: chapter folders (`fdiv.evaluate.chapter` states what they hold); out: a folder, or the
    path of the HTML file itself where it ends in .html. What was not measured is not shown.
    """
    chapters = _named_apart([load_chapter(Path(run)) for run in runs])
    if not chapters:
        raise ValueError("no run folders; pass at least one chapter folder that holds a recipe.json")
    page = Path(out) if Path(out).suffix == ".html" else Path(out) / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_render(chapters, page.parent), encoding="utf-8")
    return page


def _render(chapters, folder):
    look, readings = styles(chapters), [read(c) for c in chapters]
    names = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names.globals |= {
        "swatch": lambda key: Markup(swatch(look[key])),
        "shade": shade,
        "listing": listing,
    }
    names.globals |= {"counted": counted}
    names.filters["tight"] = lambda text: text.replace(" ± ", "\u00a0±\u00a0")
    # a label may break before its arguments, never inside KL()
    names.filters["breakable"] = lambda text: re.sub(r"\((?!\))", "\u200b(", text)
    return names.get_template("report.html.j2").render(
        title="What the divergence changes",
        overview=overview(chapters, readings),
        rows=rows(chapters, readings),
        reproducibility=reproducibility(chapters),
        commands=list(
            dict.fromkeys(str(c.environment["command"]) for c in chapters if c.environment.get("command"))
        ),
        chapters=[_chapter(c, r, look, folder) for c, r in zip(chapters, readings, strict=True)],
    )


def _chapter(chapter, reading, look, folder):
    """Everything the template shows of one chapter."""
    table, grid = tables.scalars(chapter), _grid(chapter)
    files = {
        t.name: tables.write(t, folder / "tables", chapter.name) for t in (table, grid) if t and t.columns
    }
    best, own = marks(chapter, grid) if grid else ((), ())
    return {
        "it": chapter,
        "reading": reading,
        "table": table,
        "matrix": grid,
        "files": files,
        "best": best,
        "own": own,
        "shades": tables.shades(grid) if grid else {},
        "facts": _facts(chapter),
        "samples": _samples(chapter),
        "drawn_as": {label: chapter.of(label)[0].key for label in chapter.labels},
        "markdown": tables.as_markdown(table),
        "pictures": pictures(chapter, look, folder / "figures", grid),
        "spread": spread(chapter),
        "panels": panels(chapter, look),
    }


def _grid(chapter):
    found = tables.matrix(chapter) if chapter.recipe.get("matrix", True) else None
    return found if found and found.columns else None


def _facts(chapter):
    """Short statements under the question: seeds, members, exact or sampled, size, time."""
    members = [r for r in chapter.runs if r.is_member]
    facts = [counted(len(chapter.members), "member"), counted(len(chapter.seeds), "seed")]
    exact = {r.record["exact"] for r in chapter.runs if r.record.get("exact") is not None}
    if exact:
        facts.append("some numbers enumerated, some estimated" if len(exact) > 1 else HOW[exact.pop()])
    for name, form in (
        ("parameters", "{:,} parameters"),
        ("steps", "{:,} steps"),
        ("seconds", "{:.0f} s a run"),
    ):
        values = {r.record[name] for r in members if r.record.get(name) is not None}
        if values:
            low, high = (form.format(v) for v in (min(values), max(values)))
            facts.append(high if low == high else f"{low.split()[0]} to {high}")
    return facts


def _samples(chapter):
    """{"seed", "labels", "prompts": {prompt: {label: [(text, valid)]}}} of one seed, or None."""
    runs = [r for label in chapter.labels for r in chapter.of(label) if r.record.get("samples")]
    if not runs:
        return None
    seed = min(r.seed for r in runs)
    prompts = {}
    for run in (r for r in runs if r.seed == seed):
        for sample in run.record["samples"]:
            prompts.setdefault(sample["prompt"], {})[run.label] = _outputs(sample)
    labels = [x for x in chapter.labels if any(x in row for row in prompts.values())]
    return {"seed": seed, "labels": labels, "prompts": dict(list(prompts.items())[:MOST_PROMPTS])}


def _outputs(sample):
    valid = sample.get("valid") or [None] * len(sample["outputs"])
    cut = (
        x if len(x) <= MOST_CHARACTERS else x[:MOST_CHARACTERS] + " …" for x in map(str, sample["outputs"])
    )
    return list(zip(cut, valid, strict=False))[:MOST_OUTPUTS]


def _named_apart(chapters):
    """Chapter names are anchors and file names: a second one of a name gets a number."""
    seen, apart = {}, []
    for chapter in chapters:
        seen[chapter.name] = seen.get(chapter.name, 0) + 1
        count = seen[chapter.name]
        apart.append(chapter if count == 1 else replace(chapter, name=f"{chapter.name}-{count}"))
    return apart
