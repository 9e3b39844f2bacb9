"""The end of a run in a terminal: one compact table a chapter."""

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .chapter import load_chapter
from .claims import claims
from .tables import scalars
from .wording import counted, listing

MOST_COLUMNS = 4  # what fits eighty characters beside the labels


def terminal_table(runs):
    """A rich renderable: `rich.print(terminal_table([Path("out/distil")]))`.

    runs: chapter folders. Bold marks the best member of a column and those not told apart from it;
    expectations that did not come out and unfinished runs are named under the table.
    """
    return Group(*(part for folder in runs for part in _chapter(load_chapter(Path(folder)))))


def _chapter(chapter):
    found = scalars(chapter)
    shown = found.columns[:MOST_COLUMNS]
    table = Table(
        title=chapter.recipe.get("title") or chapter.name,
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("", min_width=16, overflow="fold")
    for column in shown:
        table.add_column(column, justify="right", no_wrap=True)
    for label in found.rows:
        style = "dim" if label in chapter.references else ""
        cells = zip(shown, found.cells(label)[:MOST_COLUMNS], strict=True)
        texts = (Text(x, "bold" if (label, c) in found.strong else "") for c, x in cells)
        table.add_row(Text(label), *texts, style=style)
    yield table
    if len(found.columns) > len(shown):
        yield Text(f"and {listing(found.columns[len(shown) :])} in the report", "dim")
    yield from _remarks(chapter)


def _remarks(chapter):
    over = "evaluation items, one seed" if chapter.items_vary else counted(len(chapter.seeds), "seed")
    yield Text(f"mean ± 95% half-width over {over}", "dim")
    for claim in claims(chapter):
        style = {True: "green", False: "red", None: "yellow"}[claim.came_out]
        faint = f" ({claim.caveat})" if claim.caveat else ""
        yield Text(f"{claim.sign} {claim.verdict}{faint}: {claim.text}", style)
    for missing in chapter.missing:
        yield Text(f"? not finished: {missing.slug}, seed {missing.seed} ({missing.why})", "yellow")
