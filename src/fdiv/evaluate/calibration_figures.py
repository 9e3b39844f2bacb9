"""Calibration drawn: reliability diagrams, and every ECE beside its null bias."""

import numpy as np
from matplotlib.lines import Line2D

from .canvas import FAINT, INK, RULE, drawing, legend_below


def calibration_names(chapter):
    return [
        m
        for m in chapter.labels
        if any((r.record.get("calibration") or {}).get("bins") for r in chapter.of(m))
    ]


def reliability_grid(chapter, styles):
    """All labels' reliability diagrams as one figure, for papers; the page has them one by one."""
    names = calibration_names(chapter)
    rows = -(-len(names) // 4)
    with drawing(9, 0.5 + 2.1 * rows) as figure:
        panels = np.atleast_1d(figure.subplots(rows, 4, sharex=True, sharey=True)).ravel()
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        for panel, label in zip(panels, names, strict=False):
            panel.set_title(label, fontsize=9.5, loc="left", pad=4)
            _reliability(panel, chapter, label, styles[chapter.of(label)[0].key])
        figure.supxlabel("confidence", fontsize=10.5)
        figure.supylabel("accuracy", fontsize=10.5)
        return figure


def reliability_panel(chapter, styles, label):
    """Accuracy over confidence of one label; area of a dot = weight of its bin."""
    with drawing(2.0, 1.95) as figure:
        panel = figure.subplots()
        _reliability(panel, chapter, label, styles[chapter.of(label)[0].key])
        panel.set(xlabel="confidence", ylabel="accuracy")
        return figure


def ece_rows(chapter, styles):
    """ECE of every label with its 95% interval, and a tick where its null bias lies."""
    names = [m for m in chapter.labels if chapter.interval(m, "ece")][::-1]
    with drawing(height=1.1 + 0.32 * len(names)) as figure:
        area = figure.subplots()
        for row, label in enumerate(names):
            style = styles[chapter.of(label)[0].key]
            ece, null = (chapter.interval(label, name) for name in ("ece", "ece_null"))
            if null:
                area.plot(
                    [null.mean] * 2,
                    [row - 0.34, row + 0.34],
                    color=INK,
                    lw=2.2,
                    solid_capstyle="butt",
                )
                area.plot([null.mean, ece.mean], [row, row], color=RULE, lw=3, zorder=1)
            area.errorbar(
                ece.mean,
                row,
                xerr=ece.half,
                fmt=style.marker,
                color=style.colour,
                mfc=style.face,
                ms=7.5,
            )
        area.set_yticks(range(len(names)), names)
        area.set_xlim(left=0)
        area.set(xlabel="ECE (← better)")
        area.grid(axis="y", visible=False)
        marks = [Line2D([], [], marker="o", color=FAINT, ls="", label="ECE, 95% interval")]
        marks += [Line2D([], [], marker="|", color=INK, ls="", ms=12, mew=2.2, label="null bias")]
        legend_below(figure, marks)
        return figure


def _reliability(panel, chapter, label, style):
    bins = _merged(chapter, label)
    panel.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=(0, (4, 3)))
    panel.plot(bins[:, 0], bins[:, 1], color=style.colour, lw=1.2)
    area = 8 + 220 * bins[:, 2]
    panel.scatter(bins[:, 0], bins[:, 1], area, color=style.colour, alpha=0.75, lw=0, marker=style.marker)
    panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))


def _merged(chapter, label):
    """[bins, 3] confidence, accuracy and share of weight; the seeds' bins pooled into 15."""
    found = [b for r in chapter.of(label) for b in (r.record.get("calibration") or {}).get("bins") or []]
    table = np.array([(b["confidence"], b["accuracy"], b["weight"]) for b in found], float)
    place = np.clip(np.ceil(table[:, 0] * 15).astype(int) - 1, 0, 14)
    mass = np.bincount(place, table[:, 2], 15)
    means = [np.bincount(place, table[:, 2] * table[:, i], 15)[mass > 0] / mass[mass > 0] for i in (0, 1)]
    return np.stack([*means, mass[mass > 0] / mass.sum()], axis=1)
