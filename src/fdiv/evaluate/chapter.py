"""A chapter of results as it lies on disk: one folder, one recipe, a run a seed and a label.

    CHAPTER/recipe.json  CHAPTER/environment.json
    CHAPTER/seed-<s>/<slug>/evaluation.json  CHAPTER/seed-<s>/<slug>/metrics.jsonl

Whatever is absent stays absent: nothing here fills in a value.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .intervals import Interval, student_interval

# first letters of a word in a scalar's name; LOWER is asked first, so that "invalid" is not "valid"
LOWER = (
    "ece",
    "brier",
    "nll",
    "kl",
    "reversekl",
    "loss",
    "perplexity",
    "divergence",
    "distance",
    "invalid",
    "error",
)
HIGHER = (
    "pass",
    "coverage",
    "modes",
    "distinct",
    "accuracy",
    "reward",
    "win",
    "valid",
    "effective",
    "margin",
)


@dataclass(frozen=True)
class Run:
    """One finished run: its evaluation record and its logged steps."""

    label: str
    slug: str
    seed: int
    record: dict
    metrics: tuple

    @property
    def is_member(self):
        return self.record.get("role", "member") != "reference"

    @property
    def key(self):
        """What the run is drawn as: its sweep line where it has one, else its label."""
        return self.record.get("group") or self.label

    @property
    def parameter(self):
        values = (self.record.get("parameter") or {}).values()
        return next((v for v in values if isinstance(v, int | float)), None)


@dataclass(frozen=True)
class Missing:
    """A run that was begun, or that other seeds have, without a readable evaluation."""

    slug: str
    seed: int
    why: str


@dataclass(frozen=True, eq=False)
class Chapter:
    """One chapter; look-ups by label return {seed: value} and an Interval over seeds."""

    name: str
    recipe: dict
    environment: dict
    runs: tuple
    missing: tuple

    @cached_property
    def seeds(self):
        return sorted({run.seed for run in self.runs})

    @property
    def items_vary(self):
        """Whether ± is over evaluation items, for want of a second seed."""
        return len(self.seeds) == 1 and any(run.record.get("scalar_errors") for run in self.runs)

    @cached_property
    def members(self):
        return self._labels(True)

    @cached_property
    def references(self):
        return self._labels(False)

    @property
    def labels(self):
        return self.members + self.references

    def of(self, label):
        return [run for run in self.runs if run.label == label]

    def values(self, label, name, field="scalars"):
        """{seed: value} of one scalar (or, with field="divergences", of one divergence)."""
        pairs = ((run.seed, (run.record.get(field) or {}).get(name)) for run in self.of(label))
        return {seed: float(value) for seed, value in pairs if value is not None}

    def interval(self, label, name, field="scalars"):
        """Interval over seeds, or None where no run has the value.

        With one seed and a standard error in the record it is the interval over evaluation items.
        """
        values = self.values(label, name, field)
        if not values:
            return None
        errors = (self.of(label)[0].record.get("scalar_errors") or {}) if field == "scalars" else {}
        if len(values) == 1 and errors.get(name) is not None:
            return Interval(next(iter(values.values())), 1.96 * float(errors[name]), 1, "items")
        return student_interval(values.values())

    def names(self, field="scalars"):
        """Every name any run has under `field`, in order of first appearance."""
        return list(dict.fromkeys(name for run in self.runs for name in (run.record.get(field) or {})))

    @property
    def table(self):
        """The scalars of the table, in the recipe's order; those nobody measured are left out."""
        known = self.names()
        return [name for name in self.recipe.get("table") or known if name in known]

    def better(self, name):
        """+1 where higher is better, -1 where lower is, 0 where neither is (entropy, length)."""
        said = (self.recipe.get("better") or {}).get(name)
        if said is not None:
            return {"higher": 1, "lower": -1}.get(said, 0)
        words = re.findall("[a-z]+", name.lower())
        if "null" in words:
            return 0
        lower, higher = (any(w.startswith(start) for w in words) for start in (LOWER, HIGHER))
        return -1 if lower else int(higher)

    def _labels(self, members):
        listed = self.recipe.get("order" if members else "references") or []
        order = {label: i for i, label in enumerate(listed)}
        first = {run.label: run for run in self.runs if run.is_member == members}
        return sorted(
            first,
            key=lambda x: (order.get(x, len(order)), first[x].key, first[x].parameter or 0, x),
        )


def load_chapter(folder):
    """Chapter of a run folder; FileNotFoundError where it has no recipe.json."""
    folder = Path(folder)
    if not (folder / "recipe.json").is_file():
        raise FileNotFoundError(f"no recipe.json in '{folder.name}'; pass the folder of one chapter")
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    environment = _json(folder / "environment.json") or {}
    begun = sorted(
        p for p in folder.glob("seed-*/*") if p.is_dir() and re.fullmatch(r"seed-\d+", p.parent.name)
    )
    runs = tuple(run for run in map(_run, begun) if run)
    name = re.sub(r"[^a-z0-9]+", "-", str(recipe.get("name") or folder.name).lower()).strip("-")
    return Chapter(
        name or "chapter",
        recipe,
        environment,
        runs,
        tuple(_missing(begun, runs, recipe, environment)),
    )


def _run(folder):
    record = _json(folder / "evaluation.json")
    if not isinstance(record, dict) or "scalars" not in record:
        return None
    lines = folder / "metrics.jsonl"
    metrics = tuple(_lines(lines)) if lines.is_file() else ()
    slug = record.get("slug", folder.name)
    return Run(record.get("label", slug), slug, int(record.get("seed", _seed(folder))), record, metrics)


def _missing(begun, runs, recipe, environment):
    """Begun and not finished; never begun though another seed has it; listed but nowhere."""
    for folder in begun:
        if not _json(folder / "evaluation.json"):
            why = (
                "unreadable evaluation.json"
                if (folder / "evaluation.json").exists()
                else "no evaluation.json"
            )
            yield Missing(folder.name, _seed(folder), why)
    seeds = {_seed(folder) for folder in begun}
    if isinstance(environment.get("seeds"), list):
        seeds |= set(environment["seeds"])
    there = {(folder.name, _seed(folder)) for folder in begun}
    slugs = {run.slug for run in runs if run.is_member}
    yield from (
        Missing(x, s, "never begun") for s in sorted(seeds) for x in sorted(slugs) if (x, s) not in there
    )
    wanted = set(recipe.get("order") or []) - {run.label for run in runs}
    yield from (Missing(label, seed, "no finished run") for label in sorted(wanted) for seed in sorted(seeds))


def _seed(folder):
    return int(folder.parent.name.removeprefix("seed-"))


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut off while being written: both mean not finished
        return None


def _lines(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the last line of a run that was stopped
            continue
