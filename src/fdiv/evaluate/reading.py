"""The plain-words reading of a chapter, made from measured means and intervals alone."""

from dataclasses import dataclass

from .claims import claims
from .comparison import difference, front, order, ranking
from .sweep import sweep_reading
from .wording import counted, decimals, listing, number, plus_minus


@dataclass(frozen=True)
class Reading:
    """headline: one sentence; findings: [(subject, sentence)]; claims: [Claim]."""

    headline: str
    findings: list
    claims: list


def read(chapter):
    """Reading of one chapter; subjects without measurements are left out."""
    said = [(name, _scalar(chapter, name)) for name in chapter.table if not name.endswith("_null")]
    said += [("Frontier", _frontier(chapter)), ("Trained with, measured under", _matrix(chapter))]
    said += [("Calibration", _calibration(chapter)), ("Sweep", sweep_reading(chapter))]
    return Reading(_headline(chapter), [(a, b) for a, b in said if b], claims(chapter))


def axes(chapter):
    """[(scalar, axis label)] of the frontier, or of the first two scalars of the table."""
    given = chapter.recipe.get("frontier") or {}
    if given.get("x") and given.get("y"):
        return [(given[a], given.get(f"{a}_label") or given[a]) for a in ("x", "y")]
    return [(name, name) for name in chapter.table[:2]]


def _headline(chapter):
    """The range the choice of divergence moved both axes over, best first where there is a best."""
    moved = []
    for name, label in axes(chapter):
        rank = ranking(chapter, name)
        if rank:
            places = decimals(rank.means.values())
            ends = [f"{plus_minus(rank.means[x], places)} ({x})" for x in (rank.last, rank.best)]
            moved.append(f"{label} from {ends[0]} to {ends[1]}")
    if not moved:
        return "Too few finished runs to compare divergences."
    return f"The choice among {counted(len(chapter.members), 'member')} moved {' and '.join(moved)}."


def _scalar(chapter, name):
    rank = ranking(chapter, name)
    if rank is None:
        return ""
    places = decimals(rank.means.values())
    best, last = (f"{x} ({plus_minus(rank.means[x], places)})" for x in (rank.best, rank.last))
    if rank.means[rank.best].mean == rank.means[rank.last].mean:
        return f"the same for every member ({plus_minus(rank.means[rank.best], places)})."
    if rank.sign == 0:
        return f"runs from {last} to {best}; neither end is better by itself."
    extreme = "highest" if rank.sign > 0 else "lowest"
    return f"{extreme} for {best}{_noise(rank)} {'Lowest' if rank.sign > 0 else 'Highest'} for {last}."


def _noise(rank):
    second = list(rank.means)[1]
    gap = f"{number(abs(rank.gap.mean), decimals([rank.gap]))}"
    if rank.gap.half is None:
        return f", {gap} from {second}; one seed, so whether that is more than noise is unknown."
    half = f"± {number(rank.gap.half, decimals([rank.gap]))}"
    if not rank.tied:
        return f", ahead of every other member; the next is {second}, {gap} {half} away."
    verb = "is" if len(rank.tied) == 1 else "are"
    return f"; {listing(rank.tied)} {verb} within the seeds' noise of it, so read no order among them."


def _frontier(chapter):
    pair = axes(chapter)
    if len(pair) < 2 or not chapter.recipe.get("frontier"):
        return ""
    (x, x_label), (y, y_label) = pair
    signs = [chapter.better(name) or 1 for name in (x, y)]
    means = {m: (chapter.interval(m, x), chapter.interval(m, y)) for m in chapter.members}
    points = {m: (signs[0] * a.mean, signs[1] * b.mean) for m, (a, b) in means.items() if a and b}
    if len(points) < 2:
        return ""
    best = front(points)
    who = f"{listing(best, 8)} {'is' if len(best) == 1 else 'are'} not"
    who = "no member is" if len(best) == len(points) else who
    first = f"{who} beaten by another in both {x_label} and {y_label} (comparing means)."
    return f"{first} {_ordered(chapter, x, y, signs)}".strip()


def _ordered(chapter, x, y, signs):
    """A trade-off shows as opposite orders once both axes point to better."""
    found = order(chapter, x, y)
    if found is None:
        return ""
    rho, single = found
    facing = rho * signs[0] * signs[1]
    what = (
        "The members line up along a trade-off"
        if facing <= -0.8
        else "The members do not line up in one order"
    )
    if facing >= 0.8:
        what = "The same order of members serves both axes"
    span = (
        f"; {number(min(single), 2)} to {number(max(single), 2)} in single seeds" if len(single) > 1 else ""
    )
    return f"{what}: rank correlation {number(rho, 2)} between the two means{span}."


def _matrix(chapter):
    """How often training with a divergence makes that very divergence smallest."""
    wins, lost = [], []
    minimised = chapter.recipe.get("kind") not in ("rollouts", "pairs")  # there p is only stayed near to
    shown = minimised and chapter.recipe.get("matrix", True)
    for column in chapter.names("divergences") if shown else []:
        own = trained_with(chapter, column)
        rank = ranking(chapter, column, "divergences", sign=-1)
        if own and rank and own in rank.means:
            (wins if own == rank.best else lost).append((column, own, rank))
    if not wins and not lost:
        return ""
    told = [f"under {c} the smallest is {r.best}'s{_against(chapter, c, own, r)}" for c, own, r in lost]
    share = f"{len(wins)} of {len(wins) + len(lost)} columns"
    first = f"training with a divergence makes that divergence smallest in {share}"
    return "; ".join([first, *told]) + "."


def _against(chapter, column, own, rank):
    gap = difference(chapter, (own, column), (rank.best, column), "divergences")
    if gap.half is None:
        return ""
    return " (a clear difference)" if gap.excludes(0) else " (within the seeds' noise)"


def trained_with(chapter, column):
    """The member trained with the divergence of a column; None where there is none or several."""
    wanted = _plain(column)
    same = {r.label for r in chapter.runs if r.is_member and _plain(r.record.get("divergence")) == wanted}
    return same.pop() if len(same) == 1 else None


def _plain(text):
    return (text or "").replace(" ", "")


def _calibration(chapter):
    """ECE against its own null: only the excess is miscalibration."""
    measured = [m for m in chapter.labels if chapter.values(m, "ece") and chapter.values(m, "ece_null")]
    excess = {m: difference(chapter, (m, "ece"), (m, "ece_null")) for m in measured}
    if not excess:
        return ""
    clear = [m for m, gap in excess.items() if gap.mean > 0 and _stands_clear(chapter, m, gap)]
    if not clear:
        return "no ECE stands clear of its null bias, that of a perfectly calibrated model."
    worst = max(clear, key=lambda m: excess[m].mean)
    rest = (
        f" {len(excess) - len(clear)} of {len(excess)} show no more than that."
        if len(clear) < len(excess)
        else ""
    )
    verb = "exceeds its" if len(clear) == 1 else "exceed their"
    most = f"most for {worst} (by {plus_minus(excess[worst])})"
    return f"the ECE of {listing(clear)} {verb} null bias, {most}.{rest}"


def _stands_clear(chapter, member, excess):
    """Over seeds; with a single one, over the evaluation's items where their spread is known."""
    half = excess.half if excess.half is not None else chapter.interval(member, "ece").half
    return half is not None and excess.mean > half
