"""The pictures of a chapter with their captions, in the order of the page."""

from dataclasses import dataclass

from markupsafe import Markup

from . import curves, figures
from .calibration_figures import calibration_names, ece_rows, reliability_grid, reliability_panel
from .canvas import as_svg, inline, save
from .drawn import caption, drawn
from .heatmap import heatmap
from .reading import axes
from .sweep import sweep_lines

MOST_LOGGED = 4


@dataclass(frozen=True)
class Picture:
    """A figure as it stands in the page: its file name, its SVG and what it shows."""

    name: str
    svg: Markup
    caption: str


def pictures(chapter, look, folder, grid):
    """{section: [Picture]}; a section without data has no pictures."""

    def take(name, figure, caption):
        if figure is None:
            return []
        name = f"{chapter.name}-{name}"
        return [Picture(name, Markup(save(figure, folder, name)), caption)]

    if grid:
        take("matrix", heatmap(chapter, grid), "")
    if calibration_names(chapter):
        take("reliability", reliability_grid(chapter, look), "")
    return {
        "frontier": _scatters(chapter, look, take) + _evaluated(chapter, look, take),
        "calibration": _calibration(chapter, look, take),
        "training": _training(chapter, look, take),
        "drawn": take("drawn", drawn(chapter, look), caption(chapter)),
    }


def _scatters(chapter, look, take):
    made, sweep = [], chapter.recipe.get("sweep")
    same = sweep and [sweep["x"], sweep["y"]] == [name for name, _ in axes(chapter)]
    if chapter.recipe.get("frontier") and not (same and sweep_lines(chapter)):
        caption = (
            f"Large marker: mean; bars: {spread(chapter)}; small dots: single seeds; "
            "hollow: references. Pale line: members that no other beats on both axes."
        )
        made += take("frontier", figures.frontier(chapter, look), caption)
    if sweep and sweep_lines(chapter):
        lines, knob = sweep_lines(chapter), sweep.get("parameter", "its parameter")
        where = "at a point" if figures.labels_every_point(lines) else "at the end of a line"
        values = ", ".join(f"{v:g}" for v in sorted({v for line in lines.values() for v, _ in line}))
        caption = f"One line a divergence; the number {where} is {knob} ({values}). "
        caption += f"Bars: {spread(chapter)}."
        made += take("sweep", figures.sweep(chapter, look), caption)
    return made


def _evaluated(chapter, look, take):
    made = []
    for i, name in enumerate(chapter.names("curves")):
        caption = f"{name}, mean over seeds. Band: {spread(chapter)}. Legend: highest at the right first."
        made += take(f"curve-{i + 1}", curves.evaluated(chapter, look, name), caption)
    return made


def _calibration(chapter, look, take):
    made = []
    if any(chapter.interval(m, "ece") for m in chapter.labels):
        caption = (
            "The black tick is the null bias: the ECE that a perfectly calibrated model with the "
            "same confidences would show. Only what lies beyond it is miscalibration. "
            f"Bars: {spread(chapter)}."
        )
        made += take("ece", ece_rows(chapter, look), caption)
    return made


def panels(chapter, look):
    """[(label, SVG)]: the small reliability diagrams."""
    made = []
    for i, label in enumerate(calibration_names(chapter)):
        name = f"{chapter.name}-reliability-{i + 1}"
        svg = inline(as_svg(reliability_panel(chapter, look, label), name), name)
        made.append((label, Markup(svg)))
    return made


def _training(chapter, look, take):
    made = []
    for i, name in enumerate(curves.logged_names(chapter)[:MOST_LOGGED]):
        caption = f"{name} as logged, averaged over seeds and neighbouring steps."
        if any(r.record.get("group") for r in chapter.runs):
            caption += " The thicker a line, the larger its parameter."
        if name == "loss":
            caption += " Losses of different divergences have no common unit: "
            caption += "compare shapes, never heights."
        made += take(f"logged-{i + 1}", curves.logged(chapter, look, name), caption)
    return made


def spread(chapter):
    count = len(chapter.seeds)
    if chapter.items_vary:
        return "95% interval over evaluation items, of one training seed"
    return f"95% Student-t interval over {count} seeds" if count > 1 else "one seed, so no interval"
