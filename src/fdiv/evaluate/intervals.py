"""How far a number can be trusted: Student-t over seeds, bootstrap over items."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """mean ± half at 95% (unless told otherwise) over `count` values; half is None where unknown.

    over: "seeds" or "items"; what the spread was taken over, because the two answer other
    questions.
    """

    mean: float
    half: float | None
    count: int
    over: str = "seeds"

    def excludes(self, value):
        """Whether `value` lies outside; never true where the half-width is unknown."""
        return self.half is not None and abs(self.mean - value) > self.half


def student_interval(values, level=0.95):
    """mean ± t_{(1+level)/2, n-1} * s / sqrt(n) over independent repetitions (seeds).

    One value gives half None: nothing is known of its spread. A value that is not finite makes the
    mean not finite and the half None: a diverged seed is not averaged away.
    """
    values = np.asarray(list(values), float)
    if values.size == 0:
        raise ValueError("no values; pass at least one, or leave the row out")
    if values.size == 1 or not np.isfinite(values).all():
        return Interval(float(values.mean()), None, values.size)
    error = values.std(ddof=1) / np.sqrt(values.size)
    half = stats.t.ppf((1 + level) / 2, values.size - 1) * error
    return Interval(float(values.mean()), float(half), values.size)


def paired_difference(left, right, level=0.95):
    """Interval of mean(left) - mean(right); both are {seed: value}.

    Seeds that both share are compared seed by seed, which removes what the seed did to both;
    without two shared seeds it is Welch's interval, and with a single value on a side the half is
    None.
    """
    shared = sorted(left.keys() & right.keys())
    if len(shared) > 1:
        return student_interval([left[s] - right[s] for s in shared], level)
    a, b = np.array(list(left.values()), float), np.array(list(right.values()), float)
    if min(a.size, b.size) < 2:
        return Interval(float(a.mean() - b.mean()), None, int(min(a.size, b.size)))
    test = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    return Interval(float(a.mean() - b.mean()), float(test.high - test.low) / 2, int(min(a.size, b.size)))


def bootstrap_interval(items, statistic=np.mean, level=0.95, resamples=2000, seed=0):
    """(value, low, high): percentile bootstrap over items, for data of a single seed.

    It tells what other *items* (prompts) might have given, not what another training seed would.
    items: [items, ...]; statistic: callable of the resampled array; Efron 1979, "Bootstrap
    Methods".
    """
    items = np.asarray(items)
    random = np.random.default_rng(seed)
    rows = (random.integers(0, len(items), len(items)) for _ in range(resamples))
    drawn = [statistic(items[r]) for r in rows]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(items)), float(low), float(high)
