"""The lines of a sweep: one a divergence, its points the values of a parameter."""

import numpy as np

from .intervals import paired_difference, student_interval
from .wording import decimals, listing, number, plus_minus


def sweep_lines(chapter):
    """{group: [(parameter, label)] by parameter} of the runs that belong to a line of the sweep."""
    runs = (r for r in chapter.runs if r.record.get("group") and r.parameter is not None)
    lines = {}
    for group, parameter, label in sorted({(r.record["group"], float(r.parameter), r.label) for r in runs}):
        lines.setdefault(group, []).append((parameter, label))
    return lines


def sweep_reading(chapter):
    """Which line lies above the others where all can be compared, and what each line spans."""
    said = chapter.recipe.get("sweep")
    if not said:
        return ""
    spans = [_span(chapter, group, line) for group, line in sweep_lines(chapter).items()]
    spans = "; ".join(span for span in spans if span)
    return " ".join(
        part for part in (_level(chapter), f"Ends of the lines: {spans}." if spans else "") if part
    )


def at_equal_x(chapter):
    """(x, {group: {seed: y}}): every line read off at the middle of the x that all lines share.

    Seed by seed, by linear interpolation between neighbouring points; None where the lines share
    no x.
    """
    x, y = (chapter.recipe["sweep"][a] for a in ("x", "y"))
    lines = {g: _points(chapter, line, x, y) for g, line in sweep_lines(chapter).items()}
    lines = {g: by_seed for g, by_seed in lines.items() if by_seed}
    every = [points for by_seed in lines.values() for points in by_seed.values()]
    if len(lines) < 2:
        return None
    low, high = max(p[0].min() for p in every), min(p[0].max() for p in every)
    if not low < high:
        return None
    middle = (low + high) / 2
    read = {g: {s: float(np.interp(middle, *p)) for s, p in by_seed.items()} for g, by_seed in lines.items()}
    return middle, read


def _level(chapter):
    """The lines ranked at equal x."""
    found, sweep = at_equal_x(chapter), chapter.recipe["sweep"]
    if found is None:
        return ""
    x, read = found
    sign = chapter.better(sweep["y"]) or 1
    means = {g: student_interval(v.values()) for g, v in read.items()}
    best, *others = sorted(means, key=lambda g: -sign * means[g].mean)
    tied = [g for g in others if not paired_difference(read[best], read[g]).excludes(0)]
    places = decimals(means.values())
    told = "; ".join(f"{g} {plus_minus(means[g], places)}" for g in (best, *others))
    noise = f" (not told apart from the first: {listing(tied)})" if tied else ""
    where = f"at equal {sweep['x']} ({number(x, 2)}, by linear interpolation)"
    return f"{where} {sweep['y']} is {told}{noise}."


def _points(chapter, line, x, y):
    """{seed: (x, y)} of a line by rising x; seeds with fewer than two finite points are out."""
    found = {}
    for _, label in line:
        xs, ys = chapter.values(label, x), chapter.values(label, y)
        for seed in xs.keys() & ys.keys():
            if np.isfinite([xs[seed], ys[seed]]).all():
                found.setdefault(seed, []).append((xs[seed], ys[seed]))
    return {seed: np.array(sorted(points)).T for seed, points in found.items() if len(points) > 1}


def _span(chapter, group, line):
    sweep = chapter.recipe["sweep"]
    ends = [[chapter.interval(label, sweep[a]) for a in ("x", "y")] for _, label in (line[0], line[-1])]
    if len(line) < 2 or not all(all(end) for end in ends):
        return ""
    (x0, y0), (x1, y1) = [[number(i.mean, 2) for i in end] for end in ends]
    knob = f"{sweep.get('parameter', 'parameter')} {line[0][0]:g} to {line[-1][0]:g}"
    return f"{group}, {knob}: {sweep['x']} {x0} to {x1}, {sweep['y']} {y0} to {y1}"
