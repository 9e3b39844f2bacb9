"""The scatter of a chapter: frontier and sweep, with labels that avoid each other."""

from itertools import pairwise

import numpy as np
from matplotlib.lines import Line2D

from .canvas import FAINT, RULE, drawing, legend_below
from .comparison import front
from .placement import place
from .reading import axes
from .sweep import sweep_lines

MOST_LABELS = 14  # beyond this a legend is easier to read than labels among the points
MOST_NUMBERS = 20


def frontier(chapter, styles):
    """Means with 95% bars, dots for single seeds, hollow references; None without both axes."""
    if len(axes(chapter)) < 2:
        return None
    (x, x_label), (y, y_label) = axes(chapter)
    points = {m: _means(chapter, m, x, y) for m in chapter.labels}
    points = {m: p for m, p in points.items() if p and all(np.isfinite(i.mean) for i in p)}
    if len(points) < 2:
        return None
    with drawing(height=4.1) as figure:
        area = figure.subplots()
        _front_line(area, chapter, points, x, y)
        for label in points:
            _point(area, chapter, label, points[label], _style(chapter, styles, label), (x, y))
        area.set(xlabel=_arrow(chapter, x, x_label, "→←"), ylabel=_arrow(chapter, y, y_label, "↑↓"))
        area.margins(0.12)
        _name(figure, area, chapter, points, styles)
        return figure


def sweep(chapter, styles):
    """One line a group through the means in order of the parameter, whose values are written on."""
    said, lines = chapter.recipe["sweep"], sweep_lines(chapter)
    x, y = said["x"], said["y"]
    with drawing(height=3.5) as figure:
        area, handles, notes = figure.subplots(), [], []
        for group, line in lines.items():
            points = [(p, _means(chapter, label, x, y)) for p, label in line]
            points = [(p, found) for p, found in points if found]
            if not points:
                continue
            style = styles[group]
            drawn = _line(area, points, style)
            notes += drawn if labels_every_point(lines) else [drawn[0], drawn[-1]]
            handles.append(_handle(group, style))
        for label in chapter.references:
            if _means(chapter, label, x, y):
                _point(area, chapter, label, _means(chapter, label, x, y), styles[label], (x, y))
                handles.append(_handle(label, styles[label], ls=""))
        named = dict(axes(chapter))
        area.set_xlabel(_arrow(chapter, x, named.get(x, x), "→←"))
        area.set_ylabel(_arrow(chapter, y, named.get(y, y), "↑↓"))
        area.margins(0.1)
        legend_below(figure, handles)
        _write(figure, area, notes)
        return figure


def labels_every_point(lines):
    """Whether a sweep is small enough for a number at every point; else the ends have to do."""
    return sum(len(line) for line in lines.values()) <= MOST_NUMBERS


def _line(area, points, style):
    """Draws one sweep line; returns (text, x, y, colour) of its parameter labels."""
    xs, ys = ([found[i].mean for _, found in points] for i in (0, 1))
    halves = [[found[i].half or 0 for _, found in points] for i in (0, 1)]
    area.errorbar(xs, ys, halves[1], halves[0], color=style.colour, fmt="none", elinewidth=0.8, alpha=0.6)
    area.plot(xs, ys, color=style.colour, marker=style.marker, ls=style.dash, mec="white", mew=0.6)
    return [(f"{p:g}", a, b, style.colour) for (p, _), a, b in zip(points, xs, ys, strict=True)]


def _point(area, chapter, label, means, style, names):
    seeds = [chapter.values(label, name) for name in names]
    for seed in seeds[0].keys() & seeds[1].keys() if len(seeds[0]) > 1 else ():
        area.plot(seeds[0][seed], seeds[1][seed], "o", color=style.colour, ms=3.6, alpha=0.65, mew=0)
    halves = [i.half or 0 for i in means]
    edge = {"mec": style.colour, "mew": 1.4} if style.hollow else {"mec": "white", "mew": 0.6}
    look = {
        "fmt": style.marker,
        "color": style.colour,
        "mfc": style.face,
        "ms": 8.5,
        "elinewidth": 1,
    }
    xerr, yerr = (half or None for half in halves)
    area.errorbar(means[0].mean, means[1].mean, yerr, xerr, zorder=4, **look, **edge)


def _front_line(area, chapter, points, x, y):
    """Joins the members nobody beats on both axes by a pale line; only where better is known."""
    signs = [chapter.better(name) for name in (x, y)]
    facing = {
        m: [s * i.mean for s, i in zip(signs, p, strict=True)]
        for m, p in points.items()
        if m in chapter.members
    }
    if all(signs) and len(facing) > 1:
        best = sorted([i.mean for i in points[m]] for m in front(facing))
        area.plot(*zip(*best, strict=True), color=RULE, lw=5, solid_capstyle="round", zorder=0.5)


def _name(figure, area, chapter, points, styles):
    """Direct labels where they fit, else a legend."""
    if len(points) > MOST_LABELS:
        keys = dict.fromkeys(chapter.of(m)[0].key for m in points)
        return legend_below(figure, [_handle(k, styles[k], ls="") for k in keys])
    _write(
        figure,
        area,
        [(m, p[0].mean, p[1].mean, _style(chapter, styles, m).colour) for m, p in points.items()],
    )


def _write(figure, area, notes):
    """Writes (text, x, y, colour) beside its point, with a leader where it had to move away."""
    figure.draw_without_rendering()  # constrained layout settles here; pixels are known afterwards
    figure.set_layout_engine("none")
    anchors = area.transData.transform([(x, y) for _, x, y, _ in notes])
    texts = [
        area.text(0, 0, text, fontsize=9.5, color=_dark(colour), zorder=6) for text, _, _, colour in notes
    ]
    boxes = [t.get_window_extent() for t in texts]
    sizes = np.array([(b.width, b.height) for b in boxes])
    low, high = area.get_window_extent().min, area.get_window_extent().max
    corners = place(anchors, sizes, _drawn(area), np.array([*low, *high]))
    back = area.transData.inverted()
    for text, corner, size, anchor in zip(texts, corners, sizes, anchors, strict=True):
        text.set_position(back.transform(corner))
        text.set_va("bottom")
        nearest = np.clip(anchor, corner, corner + size)
        if np.hypot(*(nearest - anchor)) > 16:
            area.plot(*zip(*back.transform([anchor, nearest]), strict=True), color=FAINT, lw=0.6, zorder=1)


def _drawn(area):
    """Pixels of all a label should keep clear of: points, single seeds, lines, error bars."""
    lines = [line.get_xydata() for line in area.get_lines() if len(line.get_xydata())]
    bars = [segment for bar in area.collections for segment in bar.get_segments()]
    lines += [np.linspace(s[0], s[-1], 15) for s in bars]
    drawn = [line.get_xydata() for line in area.get_lines()]
    lines += [np.linspace(a, b, 40) for line in drawn for a, b in pairwise(line)]
    return area.transData.transform(np.concatenate(lines)) if lines else np.empty((0, 2))


def _means(chapter, label, x, y):
    found = (chapter.interval(label, x), chapter.interval(label, y))
    return found if all(found) else None


def _style(chapter, styles, label):
    return styles[chapter.of(label)[0].key]


def _handle(label, style, ls=None):
    dash = style.dash if ls is None else ls
    return Line2D([], [], color=style.colour, marker=style.marker, ls=dash, mfc=style.face, label=label)


def _arrow(chapter, name, label, arrows):
    """The axis label with an arrow towards better, where better is known."""
    sign = chapter.better(name)
    return f"{label}  ({arrows[0] if sign > 0 else arrows[1]} better)" if sign else label


def _dark(colour):
    """Text needs more contrast than a marker: the colour at 70% of its brightness."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.7):02x}" for i in (1, 3, 5))
