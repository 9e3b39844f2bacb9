"""Lines: pass@k over k and logged values over training."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .canvas import drawing, legend_below
from .intervals import student_interval

BINS = 60  # points a training curve: logged values are averaged within each, which also calms them
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
NOT_CURVES = ("step", "seconds", "time", "epoch", "lr", "learning_rate", "grad_norm", "tokens")


def evaluated(chapter, styles, name):
    """A curve of the evaluation: mean over seeds and its 95% band; log2 axis where x doubles."""
    with drawing(height=3.1) as figure:
        area, ends = figure.subplots(), []
        for label in chapter.labels:
            run = chapter.of(label)[0]
            x, bands = _seeds_of(chapter, label, name)
            if len(x):
                ends.append((bands[-1].mean, run, _band(area, x, bands, run, styles[run.key], label)))
        if _doubles(area):
            area.set_xscale("log", base=2)
            area.xaxis.set_major_formatter(PLAIN)
            area.xaxis.set_minor_locator(NullLocator())
        area.set(xlabel="k (log scale)" if "@k" in name else "x", ylabel=name)
        legend_below(figure, _handles(chapter, ends, styles))
        return figure


def logged_names(chapter):
    """Numeric keys of the members' metrics.jsonl worth a curve, loss first."""
    runs = (run for label in chapter.members for run in chapter.of(label))
    rows = (row for run in runs for row in run.metrics[:4])  # some numbers are not those of every step
    names = dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, int | float))
    return sorted((n for n in names if n.lower() not in NOT_CURVES), key=lambda n: n != "loss")


def logged(chapter, styles, name):
    """A logged value over training, averaged over seeds; losses over their own first value."""
    lines = {label: _logged_line(chapter, label, name) for label in chapter.members}
    lines = {label: line for label, line in lines.items() if len(line[0])}
    unit, scale = _unit(name, lines)
    with drawing(height=3.1) as figure:
        area, ends = figure.subplots(), []
        for label, (x, y) in lines.items():
            run = chapter.of(label)[0]
            style = styles[run.key]
            drawn = area.plot(x, y / scale(y), color=style.colour, ls=style.dash, lw=_width(chapter, run))[0]
            ends.append((y[-1] / scale(y), run, drawn))
        if name == "loss" and all((y > 0).all() for _, y in lines.values()):
            area.set_yscale("log")
            area.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            area.yaxis.set_major_formatter(PLAIN)
            area.yaxis.set_minor_locator(NullLocator())
        area.set(xlabel="training step", ylabel=f"{name}{unit}")
        legend_below(figure, _handles(chapter, ends, styles))
        return figure


def _seeds_of(chapter, label, name):
    """(x, [Interval a point]) over the x that every seed of this label has."""
    found = [(r.record.get("curves") or {}).get(name) for r in chapter.of(label)]
    maps = [dict(zip(c["x"], c["y"], strict=True)) for c in found if c]
    x = sorted(set.intersection(*map(set, maps))) if maps else []
    return np.array(x, float), [student_interval(m[v] for m in maps) for v in x]


def _band(area, x, bands, run, style, label):
    mean, half = np.array([b.mean for b in bands]), np.array([b.half or 0 for b in bands])
    if half.any():
        area.fill_between(x, mean - half, mean + half, color=style.colour, alpha=0.1, lw=0)
    marks = {"marker": style.marker, "ms": 5, "mfc": style.face, "mec": style.colour} if len(x) < 20 else {}
    return area.plot(x, mean, color=style.colour, ls=style.dash, **marks)[0]


def _handles(chapter, ends, styles):
    """Legend in the order in which the lines end, highest first; a sweep gets one entry a group."""
    keys = dict.fromkeys(run.key for _, run, _ in sorted(ends, key=lambda e: -e[0]))
    first = {run.key: line for _, run, line in reversed(ends)}
    return [_entry(first[key], key) for key in keys]


def _entry(line, label):
    twin = Line2D([], [])
    twin.update_from(line)
    twin.set(label=label, linewidth=1.8)
    return twin


def _width(chapter, run):
    """In a sweep the line grows with the parameter, since its colour already tells the group."""
    values = sorted({r.parameter for r in chapter.runs if r.key == run.key and r.parameter is not None})
    return 0.8 + 1.8 * values.index(run.parameter) / (len(values) - 1) if len(values) > 1 else 1.8


def _logged_line(chapter, label, name):
    """(x, y) of a member: steps in BINS bins, mean over the bin and the seeds."""
    rows = (row for r in chapter.of(label) for row in r.metrics)
    pairs = [(row["step"], row[name]) for row in rows if "step" in row and _is(row.get(name))]
    if not pairs:
        return np.array([]), np.array([])
    step, value = np.array(pairs, float).T
    edges = np.linspace(step.min(), step.max() + 1e-9, min(BINS, len(set(step))) + 1)
    place = np.clip(np.searchsorted(edges, step, side="right") - 1, 0, len(edges) - 2)
    count = np.bincount(place, minlength=len(edges) - 1)
    x, y = (np.bincount(place, v, len(edges) - 1)[count > 0] / count[count > 0] for v in (step, value))
    return x, y


def _unit(name, lines):
    """(end of the axis label, scale of a line): losses of different divergences share no unit."""
    if name != "loss":
        return "", lambda y: 1.0
    if all((y > 0).all() for _, y in lines.values()):
        return " ÷ its first value", lambda y: y[0]
    return " ÷ its median size", lambda y: np.median(np.abs(y)) or 1.0


def _doubles(area):
    x = np.concatenate([line.get_xdata() for line in area.get_lines()] or [[1.0]])
    return x.min() > 0 and x.max() / x.min() >= 16


def _is(value):
    return isinstance(value, int | float) and np.isfinite(value)
