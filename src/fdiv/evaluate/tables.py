"""The tables of a chapter, and their form as CSV, Markdown and LaTeX (booktabs)."""

import csv
from dataclasses import dataclass, replace
from io import StringIO

import numpy as np

from .comparison import ranking
from .reading import trained_with
from .wording import decimals, plus_minus


@dataclass(frozen=True)
class Table:
    """rows: {label: [Interval or None]}; strong: {(label, column)}, best or not told apart."""

    name: str
    caption: str
    columns: list
    rows: dict
    references: list
    strong: set

    def cells(self, label):
        """The row as text, each column with its own number of decimals."""
        return [plus_minus(i, p) for i, p in zip(self.rows[label], self.places, strict=True)]

    @property
    def places(self):
        return [decimals([row[i] for row in self.rows.values()]) for i in range(len(self.columns))]


def scalars(chapter):
    """The recipe's table: one row a label, one column a scalar."""
    return _table(chapter, "table", chapter.table, "scalars", {})


def matrix(chapter):
    """Rows: trained with; columns: measured against the target under. Smaller is always better.

    The rows follow the columns, so that a divergence measured under itself lies on the diagonal.
    """
    columns = chapter.names("divergences")
    own = {trained_with(chapter, column): i for i, column in enumerate(columns)}
    table = _table(chapter, "matrix", columns, "divergences", dict.fromkeys(columns, -1))
    members = sorted(chapter.members, key=lambda label: own.get(label, len(columns)))
    return replace(table, rows={x: table.rows[x] for x in [*members, *chapter.references]})


def write(table, folder, prefix):
    """PREFIX-NAME.csv, .md and .tex under `folder`; returns {suffix: file name}."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for suffix, text in {
        "csv": as_csv(table),
        "md": as_markdown(table),
        "tex": as_latex(table),
    }.items():
        names[suffix] = f"{prefix}-{table.name}.{suffix}"
        (folder / names[suffix]).write_text(text, encoding="utf-8")
    return names


def as_csv(table):
    """Unrounded means and half-widths in columns of their own; an empty cell was not measured."""
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        [
            "label",
            "role",
            *(f"{c}{end}" for c in table.columns for end in ("", " half width", " seeds")),
        ]
    )
    for label, intervals in table.rows.items():
        cells = [
            ("", "", "") if i is None else (i.mean, "" if i.half is None else i.half, i.count)
            for i in intervals
        ]
        rows.writerow([label, _role(table, label), *(value for cell in cells for value in cell)])
    return text.getvalue()


def as_markdown(table):
    head = ["", *table.columns]
    lines = [head, ["---", *["---:"] * len(table.columns)]]
    for label in table.rows:
        cells = zip(table.columns, table.cells(label), strict=True)
        lines.append([label, *(f"**{x}**" if (label, c) in table.strong else x for c, x in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{table.caption}\n"


def as_latex(table):
    """A booktabs tabular; the references stand under a second rule."""
    groups = [[x for x in table.rows if (x in table.references) == below] for below in (False, True)]
    body = "\\midrule\n".join("".join(_tex_row(table, x) for x in group) for group in groups if group)
    head = " & ".join(["", *map(_tex, table.columns)])
    return (
        f"% {table.caption}\n\\begin{{tabular}}{{l{'r' * len(table.columns)}}}\n\\toprule\n"
        f"{head} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"
    )


def _tex_row(table, label):
    cells = zip(table.columns, table.cells(label), strict=True)
    return (
        " & ".join([_tex(label), *(_tex_cell(x, (label, c) in table.strong) for c, x in cells)]) + " \\\\\n"
    )


def _table(chapter, name, columns, field, signs):
    rows = {label: [chapter.interval(label, c, field) for c in columns] for label in chapter.labels}
    strong = set()
    for column in columns:
        rank = ranking(chapter, column, field, signs.get(column))
        if rank and rank.sign:
            top = [rank.best, *(rank.tied if rank.gap.half is not None else ())]
            strong |= {(label, column) for label in top}
    return Table(name, _caption(chapter), list(columns), rows, chapter.references, strong)


def _caption(chapter):
    count = len(chapter.seeds)
    if count < 2:
        said = "One seed; ±: 95% over evaluation items" if chapter.items_vary else "One seed"
        return f"{said}; bold: best mean among members. Rows below the rule are references."
    return (
        f"Mean ± half-width of the 95% Student-t interval over {count} seeds; bold: best member, "
        "and those whose seed-by-seed difference from it does not exclude zero."
    )


def shades(table):
    """{(label, column): 0..1}: 0 the smallest member of the column, 1 the largest; in logs if > 0.

    Each column has its own scale because divergences have no common unit. A reference beyond the
    members takes the nearest end: a far base model would otherwise wash out their differences.
    """
    found = {}
    for i, column in enumerate(table.columns):
        means = {x: row[i].mean for x, row in table.rows.items() if row[i] and not np.isnan(row[i].mean)}
        members = [v for x, v in means.items() if x not in table.references and np.isfinite(v)]
        if members:
            scale = np.log if min(members) > 0 else np.array
            low, high = scale(min(members)), scale(max(members))
            for label, value in means.items():
                with np.errstate(divide="ignore"):
                    place = (scale(max(value, 0.0)) - low) / (high - low) if high > low else 0.0
                found[label, column] = float(np.clip(place, 0, 1))
    return found


def _role(table, label):
    return "reference" if label in table.references else "member"


def _tex(text):
    escapes = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "~": r"\textasciitilde{}"}
    return text.translate(str.maketrans(escapes))


def _tex_cell(text, strong):
    text = text.replace("±", r"\pm").replace("−", "-").replace("∞", r"\infty")
    if text in ("–", "not finite"):
        return text.replace("–", "--")
    return rf"$\mathbf{{{text}}}$" if strong else f"${text}$"
