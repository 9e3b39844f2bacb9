"""What samplers make, a panel each: points in the plane, densities on a line, images, or paths on a surface.

An evaluation holds it under "drawn": {"points": [[x, y], ...], "target": the same of the data}, {"line":
{"x", "target", "made"}}, {"images": [N][rows][columns] from 0 to 255, "target"}, or {"paths": [N][places]
[x, y], "target": those of brute force, "surface": {"x", "y", "energy": [rows][columns]}}.
"""

from textwrap import fill

import numpy as np

from .canvas import FAINT, drawing

COLUMNS, ACROSS, GAP = 3, 6, 1  # panels in a row, images in a row of a panel, shades between images
KINDS = ("points", "line", "images", "paths")
APART = {"images": "the data", "paths": "brute force"}  # what is aimed at has a panel of its own


def drawn(chapter, look):
    """The figure of the chapter's first seed, or None where nothing was drawn."""
    runs = [r for label in chapter.labels for r in chapter.of(label) if r.record.get("drawn")]
    runs = [r for r in runs if r.seed == min(run.seed for run in runs)]
    kind = next((k for k in KINDS if runs and k in runs[0].record["drawn"]), None)
    runs = [r for r in runs if kind in r.record["drawn"]]
    if kind is None:
        return None
    also = kind in APART
    rows = -(-(len(runs) + also) // COLUMNS)
    with drawing(width=6.9, height=0.3 + rows * (1.5 if kind == "line" else 2.2)) as figure:
        panels = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True).ravel()
        for panel in panels[len(runs) + also :]:
            panel.set_axis_off()
        if also:
            _target(kind, panels[0], runs[0].record["drawn"])
            panels[0].set_title(APART[kind], fontsize=9.2)
        each = {"points": _points, "line": _line, "images": _images, "paths": _paths}[kind]
        for panel, run in zip(panels[also:], runs, strict=False):
            each(panel, run, look[run.key])
            panel.set_title(fill(run.label, 30), fontsize=9.2, color=look[run.key].colour)
        if kind == "points":
            _bound(panels[0], runs)
        return figure


def caption(chapter):
    """What is to be seen, or nothing."""
    found = next((r.record["drawn"] for r in chapter.runs if r.record.get("drawn")), {})
    seed = f"Seed {min((r.seed for r in chapter.runs if r.record.get('drawn')), default=0)}. "
    if "images" in found:
        return seed + "Samples as they came, ordered by the class that was asked for, if one was."
    if "paths" in found:
        return seed + "Paths from last departure to first arrival, over the energy: darker is higher."
    if "points" in found:
        return seed + "Grey: the data."
    return seed + "Densities, of both with some noise added. Grey: the target's."


def _target(kind, panel, recorded):
    if kind == "images":
        _tiles(panel, recorded["target"])
    else:
        _lines(panel, recorded["target"], recorded["surface"], "#3c4650")


def _points(panel, run, style):
    for name, colour, size in (("target", "#c3cad1", 5), ("points", style.colour, 4)):
        x, y = np.array(run.record["drawn"][name]).T
        panel.scatter(x, y, s=size, c=colour, lw=0, alpha=0.8, rasterized=True)
    panel.set_aspect("equal")


def _bound(panel, runs):
    """Axes that show the data whole: a student that has run away must not shrink them to a dot."""
    target = np.array(runs[0].record["drawn"]["target"])
    low, high = target.min(0), target.max(0)
    room = 0.25 * (high - low).max()
    panel.set(xlim=(low[0] - room, high[0] + room), ylim=(low[1] - room, high[1] + room))


def _line(panel, run, style):
    line = run.record["drawn"]["line"]
    panel.fill_between(line["x"], line["target"], color="#d5dbe1", lw=0)
    panel.plot(line["x"], line["made"], color=style.colour, ls=style.dash)
    panel.set_ylim(0, 1.6 * max(line["target"]))


def _paths(panel, run, style):
    recorded = run.record["drawn"]
    _lines(panel, recorded["paths"], recorded["surface"], style.colour)


def _lines(panel, paths, surface, colour):
    panel.contourf(surface["x"], surface["y"], surface["energy"], levels=10, cmap="Greys", alpha=0.4)
    for path in paths:
        panel.plot(*np.array(path).T, color=colour, lw=0.5, alpha=0.7)
    panel.set_aspect("equal")
    panel.grid(False)


def _images(panel, run, style):
    _tiles(panel, run.record["drawn"]["images"])


def _tiles(panel, images):
    panel.imshow(_tiled(images), cmap="gray", vmin=0, vmax=255, interpolation="none")
    panel.set(xticks=[], yticks=[])
    panel.grid(False)
    for spine in panel.spines.values():
        spine.set_color(FAINT)


def _tiled(images):
    """One picture of all, ACROSS a row."""
    images = np.array(images)
    across = ACROSS if images.shape[1] > 1 else 1  # signals lie below each other
    short = -len(images) % across
    images = np.concatenate([images, np.full((short, *images.shape[1:]), 128)])
    images = np.pad(images, ((0, 0), (0, GAP), (0, GAP)), constant_values=128)
    rows = images.reshape(-1, across, *images.shape[1:])
    return rows.swapaxes(1, 2).reshape(len(rows) * images.shape[1], -1)
