"""The divergence matrix as a figure, for papers; the report itself shows it as an HTML table."""

from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from .canvas import INK, drawing
from .reading import trained_with
from .tables import shades

PALE, DEEP = (1.0, 1.0, 1.0), (0.95, 0.66, 0.42)  # light enough at its deepest for dark text


def shade(value):
    """Colour of 0 (closest to the target in its column: white) to 1 (farthest: deep orange)."""
    red, green, blue = (a + value * (b - a) for a, b in zip(PALE, DEEP, strict=True))
    return to_hex((red, green, blue))


def marks(chapter, table):
    """(best, own): sets of (label, column), the smallest of a column and the diagonal."""
    own = {(trained_with(chapter, c), c) for c in table.columns}
    best = set()
    for i, column in enumerate(table.columns):
        means = {m: table.rows[m][i].mean for m in chapter.members if table.rows[m][i]}
        best |= {(min(means, key=lambda m: means[m]), column)} if means else set()
    return best, own


def heatmap(chapter, table):
    """Rows trained with, columns measured under; outline = smallest, corner = the diagonal."""
    best, own = marks(chapter, table)
    colours = shades(table)
    with drawing(1.9 + 1.15 * len(table.columns), 1.0 + 0.5 * len(table.rows)) as figure:
        area = figure.subplots()
        for y, label in enumerate(table.rows):
            for x, (column, text) in enumerate(zip(table.columns, table.cells(label), strict=True)):
                _cell(
                    area,
                    x,
                    y,
                    text,
                    colours.get((label, column)),
                    (label, column) in best,
                    (label, column) in own,
                )
        area.set(xlim=(0, len(table.columns)), ylim=(len(table.rows), 0))
        area.set_xticks([i + 0.5 for i in range(len(table.columns))], table.columns, rotation=30, ha="left")
        area.set_yticks([i + 0.5 for i in range(len(table.rows))], list(table.rows))
        area.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        area.grid(visible=False)
        for side in area.spines.values():
            side.set_visible(False)
        area.set_ylabel("trained with")
        area.set_xlabel("measured under; white: closest to the target in its column")
        return figure


def _cell(area, x, y, text, value, is_best, is_own):
    face = "#f3f4f6" if value is None else shade(value)
    area.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white", lw=1))
    if is_own:
        area.add_patch(Rectangle((x + 0.02, y + 0.03), 0.1, 0.22, facecolor=INK, lw=0))
    if is_best:
        area.add_patch(
            Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, fill=False, edgecolor=INK, lw=1.8, zorder=3)
        )
    mean, *half = text.split(" ± ")
    area.text(x + 0.5, y + (0.36 if half else 0.5), mean, ha="center", va="center", fontsize=9.5)
    if half:
        area.text(x + 0.5, y + 0.7, f"± {half[0]}", ha="center", va="center", fontsize=7.5)
