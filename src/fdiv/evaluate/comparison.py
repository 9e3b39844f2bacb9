"""Who is ahead, and whether the seeds allow saying so."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from .intervals import Interval, paired_difference


@dataclass(frozen=True)
class Ranking:
    """Members ordered by one number, best first; `sign` +1 if higher is better, -1 if lower is.

    tied: members whose difference from the best does not exclude zero (with one seed: all of them).
    behind: the others. gap: the best against the nearest member that follows it, as an Interval.
    """

    name: str
    sign: int
    means: dict
    tied: tuple
    behind: tuple
    gap: Interval

    @property
    def best(self):
        return next(iter(self.means))

    @property
    def last(self):
        return next(reversed(self.means))


def ranking(chapter, name, field="scalars", sign=None):
    """Ranking of the chapter's members, or None where fewer than two finite means exist."""
    sign = chapter.better(name) if sign is None else sign
    means = {x: chapter.interval(x, name, field) for x in chapter.members}
    means = {x: i for x, i in means.items() if i is not None and np.isfinite(i.mean)}
    if len(means) < 2:
        return None
    means = dict(sorted(means.items(), key=lambda pair: -(sign or 1) * pair[1].mean))
    best, *others = means
    apart = {x: difference(chapter, (best, name), (x, name), field).excludes(0) for x in others}
    behind = tuple(x for x in others if apart[x])
    tied = tuple(x for x in others if not apart[x])
    return Ranking(
        name, sign, means, tied, behind, difference(chapter, (best, name), (others[0], name), field)
    )


def difference(chapter, left, right, field="scalars"):
    """Interval of left - right, each a measured (label, name) or a number.

    A reference that has one value (a teacher does not depend on the seed) counts as a fixed number.
    """
    a, b = (_side(chapter, side, field) for side in (left, right))
    if isinstance(a, dict) and isinstance(b, dict):
        return paired_difference(a, b)
    if isinstance(a, dict):
        known = chapter.interval(*left, field)
        return Interval(known.mean - b[0], known.half, known.count, known.over)
    if isinstance(b, dict):
        known = chapter.interval(*right, field)
        return Interval(a[0] - known.mean, known.half, known.count, known.over)
    return Interval(a[0] - b[0], None, 1)


def front(points):
    """Labels that no other dominates; points: {label: (x, y)} oriented so that higher is better."""

    def dominated(label):
        x, y = points[label]
        return any(a >= x and b >= y and (a > x or b > y) for a, b in points.values())

    return [label for label in points if not dominated(label)]


def order(chapter, x, y):
    """(rank correlation of the members' means, [that of every seed]) or None below four members.

    Spearman's rho of x against y: -1 is a clean trade-off, +1 means one member order serves both.
    """
    means = [(chapter.interval(m, x), chapter.interval(m, y)) for m in chapter.members]
    means = [(a.mean, b.mean) for a, b in means if a and b]
    if len(means) < 4 or not _varies(means):
        return None
    by_seed = ([_pair(chapter, m, x, y, s) for m in chapter.members] for s in chapter.seeds)
    single = [[pair for pair in pairs if None not in pair] for pairs in by_seed]
    return _rho(means), [_rho(pairs) for pairs in single if len(pairs) > 3 and _varies(pairs)]


def _pair(chapter, member, x, y, seed):
    return tuple(chapter.values(member, name).get(seed) for name in (x, y))


def _varies(pairs):
    return np.isfinite(pairs).all() and (np.ptp(np.array(pairs), axis=0) > 0).all()


def _rho(pairs):
    return float(np.corrcoef(stats.rankdata(np.array(pairs), axis=0).T)[0, 1])


def _side(chapter, side, field):
    """{seed: value}, or (value,) for what does not vary with the seed."""
    if not isinstance(side, list | tuple):
        return (float(side),)
    values = chapter.values(*side, field)
    return tuple(values.values()) if len(values) == 1 and side[0] in chapter.references else values
