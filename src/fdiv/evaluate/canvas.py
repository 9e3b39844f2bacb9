"""From a matplotlib figure to a file and to SVG that may stand beside other SVG in one page."""

import re
from contextlib import contextmanager
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

INK, FAINT, RULE = "#1d2733", "#5b6672", "#d5dbe1"
WIDTH = 4.6  # inches: at 390 px across, 10 pt type then shows at about 10 px
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    # measured in a wide face, so that the text fits in any
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 10,
    "axes.labelsize": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8ecf0",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 9.2,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
}


@contextmanager
def drawing(width=WIDTH, height=3.6):
    """A figure with the house settings; no pyplot, so no global state and no window."""
    with rc_context(SETTINGS):
        yield Figure(figsize=(width, height), layout="constrained")


def save(figure, folder, name):
    """Write NAME.svg and NAME.png under `folder`; returns the SVG to be put inside a page."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(SETTINGS):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, for both files
        figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
    svg = as_svg(figure, name)
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    return inline(svg, name)


def as_svg(figure, name):
    """The SVG document, reproducible: no date, and ids that depend on `name` alone."""
    text = StringIO()
    with rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def inline(svg, name):
    """An SVG document cut down to its element: no prologue, metadata, unused or shared ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)([\w-]+)', rf"\1{name}-\2", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # a hundredth of a point is finer than any screen
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return svg.replace("<svg", '<svg role="img"', 1)


def legend_below(figure, handles):
    """A legend under the axes, in height of its own: a phone has plenty of height, not width."""
    if handles:
        longest = sorted((len(h.get_label()) for h in handles), reverse=True)[:2]
        columns = 2 if len(handles) > 1 and sum(longest) <= 46 else 1
        figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
