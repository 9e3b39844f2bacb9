"""Numbers and lists as a reader wants them."""

import math


def decimals(intervals):
    """Decimals for one column: two significant figures of its typical half-width, 3 without any."""
    known = [i for i in intervals if i is not None and math.isfinite(i.mean)]
    halves = sorted(i.half for i in known if _real(i))
    if not halves:
        largest = max((abs(i.mean) for i in known), default=1.0)
        return max(0, min(4, 2 - math.floor(math.log10(largest)))) if largest > 0 else 2
    return max(0, min(4, 1 - math.floor(math.log10(halves[len(halves) // 2]))))


def number(value, places=3):
    """A value with `places` decimals, or in powers of ten where that would say nothing."""
    if math.isnan(value):
        return "not finite"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and (abs(value) >= 1e5 or abs(value) < 0.5 * 10**-places):
        text = f"{value:.1e}"
    else:
        text = f"{value:.{places}f}"
    return text.replace("-", "−", 1) if value < 0 else text


def plus_minus(interval, places=None):
    """'0.71 ± 0.02', '0.71' where the half-width is unknown, '–' where nothing was measured."""
    if interval is None:
        return "–"
    places = decimals([interval]) if places is None else places
    mean = number(interval.mean, places)
    if interval.half is None:
        return mean
    return f"{mean} ± {_half(interval, places)}"


def _half(interval, places):
    """Fixed decimals, unlike `number`: a half-width that rounds to nothing is one that small."""
    half = interval.half if _real(interval) else 0.0
    return f"{half:.{places}f}" if half < 1e5 else f"{half:.1e}"


def _real(interval):
    """Whether the half-width is more than the rounding dust of equal numbers."""
    return bool(interval.half) and interval.half > 1e-9 * max(1.0, abs(interval.mean))


def listing(words, most=6):
    """'a', 'a and b', 'a, b and c'; the tail beyond `most` is counted."""
    words = list(words)
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "none"


def counted(count, noun):
    """'1 seed', '3 seeds'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
