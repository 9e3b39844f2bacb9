"""The few sentences and the one small table across chapters."""

from .wording import counted, listing

MOST_HEADLINES = 4


def overview(chapters, readings):
    """Three to six sentences: what was compared, moved, came out, and is not finished."""
    members = list(dict.fromkeys(m for c in chapters for m in c.members))
    what = f"{counted(len(members), 'trained member')} (a divergence, or one setting of it, each)"
    first = f"Compared are {what} in {counted(len(chapters), 'chapter')}; {_trust(chapters)}."
    pairs = list(zip(chapters, readings, strict=True))[:MOST_HEADLINES]
    moved = [f"{_title(c)}: {_lower(r.headline)}" for c, r in pairs]
    return [first, *moved, _claims(readings) + _missing(chapters)]


def rows(chapters, readings):
    """One dict a chapter for the small table."""
    return [_row(c, r) for c, r in zip(chapters, readings, strict=True)]


def reproducibility(chapters):
    """'python 3.11, torch 2.8, seeds 0, 1, 2': what the first environment states, no date."""
    found = chapters[0].environment
    versions = [f"{k} {found[k]}" for k in ("fdiv", "python", "torch", "transformers") if found.get(k)]
    seeds = ", ".join(str(s) for s in sorted({s for c in chapters for s in c.seeds}))
    threads = [f"{found['threads']} threads"] if found.get("threads") else []
    return ", ".join([*versions, *threads, f"seeds {seeds}"])


def _row(chapter, reading):
    checked = [c for c in reading.claims if c.came_out is not None]
    came = f"{sum(c.came_out for c in checked)} of {len(reading.claims)}" if reading.claims else "–"
    return {"chapter": chapter, "claims": came, "missing": len(chapter.missing)}


def _claims(readings):
    every = [c for r in readings for c in r.claims]
    if not every:
        return "No expectation was written down beforehand."
    came = [c for c in every if c.came_out]
    faint = sum(bool(c.caveat) for c in came)
    unclear = f" ({faint} of them not clear of the noise)" if faint else ""
    open_ = sum(c.came_out is None for c in every)
    left = f", {open_} could not be checked" if open_ else ""
    failed = len(every) - len(came) - open_
    of = f"Of {counted(len(every), 'expectation')}"
    return f"{of}, {len(came)} came out{unclear}, {failed} did not come out{left}."


def _trust(chapters):
    """What the intervals rest on; a chapter of one seed is named, because it has none."""
    counts = sorted({len(c.seeds) for c in chapters})
    if counts[-1] < 2:
        return "with one seed nothing here tells a difference from the noise of training"
    several = " or ".join(str(n) for n in counts if n > 1)
    single = [_title(c) for c in chapters if len(c.seeds) < 2]
    alone = f" ({listing(single)}: one seed, no interval)" if single else ""
    return f"intervals are 95% Student-t over {several} seeds{alone}"


def _missing(chapters):
    missing = sum(len(c.missing) for c in chapters)
    return f" Not finished: {counted(missing, 'run')}, named under the chapter." if missing else ""


def _title(chapter):
    return chapter.recipe.get("title") or chapter.name


def _lower(sentence):
    return sentence[:1].lower() + sentence[1:]
