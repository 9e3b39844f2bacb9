"""What was expected beforehand, and whether it came out."""

from dataclasses import dataclass

from .comparison import difference
from .intervals import Interval
from .wording import plus_minus


@dataclass(frozen=True)
class Claim:
    """One expectation: mean(left) > mean(right) + margin.

    came_out is None where a side was not measured. caveat is empty where zero lies outside the 95%
    interval of the (seed by seed) difference, so that the verdict may be read.
    """

    text: str
    came_out: bool | None
    caveat: str
    numbers: str

    @property
    def verdict(self):
        if self.came_out is None:
            return "could not be checked"
        return "came out" if self.came_out else "did not come out"

    @property
    def sign(self):
        return {None: "?", True: "✓", False: "✗"}[self.came_out]


def claims(chapter):
    """Every expectation of the recipe, checked against the measured means."""
    return [_check(chapter, said) for said in chapter.recipe.get("expect") or []]


def _check(chapter, said):
    left, right, margin = said["left"], said["right"], float(said.get("margin") or 0)
    absent = [s for s in (left, right) if isinstance(s, list) and not chapter.values(*s)]
    if absent:
        names = "; ".join(f"{label} has no {name}" for label, name in absent)
        return Claim(said["claim"], None, "", f"{names} among the finished runs")
    gap = difference(chapter, left, right)
    numbers = _numbers(chapter, left, right, margin, gap)
    return Claim(said["claim"], bool(gap.mean > margin), _caveat(gap, margin), numbers)


def _caveat(gap, margin):
    if gap.half is None:
        return "one seed, noise unknown"
    clear = Interval(gap.mean - margin, gap.half, gap.count).excludes(0)
    return "" if clear else "within the noise"


def _numbers(chapter, left, right, margin, gap):
    sides = " against ".join(_side(chapter, side) for side in (left, right))
    wanted = f", more than {margin:g} expected" if margin else ""
    return f"{sides}: difference {plus_minus(gap)}{wanted}"


def _side(chapter, side):
    if not isinstance(side, list):
        return f"{side:g}"
    return f"{side[0]} {side[1]} {plus_minus(chapter.interval(*side))}"
