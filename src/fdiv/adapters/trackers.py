"""Copies of a run's numbers in TensorBoard, trackio or Weights & Biases.

trackers = open_trackers(["tensorboard"], folder, project="demo", run="seed-0/kl", config={}, start_step=0)

metrics.jsonl in the run folder is the truth, a tracker a copy of it: a run that goes on from step n takes
back what was logged after step n, and adds from the file what the tracker lacks of the steps before.
"""

import difflib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Where numbers are shown as they come."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers after so many steps, in rising order of steps."""
        ...

    def close(self) -> None:
        """Hand over what is on its way still."""
        ...


@dataclass(frozen=True)
class Place:
    """What a tracker is opened for."""

    folder: Path  # the run folder, which holds metrics.jsonl
    project: str
    run: str
    config: dict[str, Any]  # plain data
    start_step: int  # steps that are done already

    def past(self) -> list[tuple[int, dict[str, float]]]:
        """What metrics.jsonl holds of the steps that are done."""
        log = self.folder / "metrics.jsonl"
        if not self.start_step or not log.exists():
            return []
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [(line.pop("step"), line) for line in lines if line["step"] <= self.start_step]


# name: module of this folder, and what in it opens the tracker of a Place
TRACKERS = {
    "tensorboard": ("tensorboard", "TensorBoard"),
    "trackio": ("trackio", "Trackio"),
    "wandb": ("wandb", "online"),
    "wandb-offline": ("wandb", "offline"),
}


def open_trackers(
    names: list[str], folder: Path, project: str, run: str, config: dict[str, Any], start_step: int = 0
) -> list[Tracker]:
    """The trackers of these names, each showing steps up to `start_step` as metrics.jsonl has them.

    Raises ValueError for a name that is not known, ImportError where its package is missing.
    """
    openers = [find_tracker(name) for name in names]  # mistakes first: nothing has been written yet
    folder.mkdir(parents=True, exist_ok=True)
    place, opened = Place(folder, project, run, config, start_step), []
    try:
        for opener in openers:
            opened.append(opener(place))
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def find_tracker(name: str) -> Callable[[Place], Tracker]:
    """What opens the tracker of this name; its package is imported here."""
    if name not in TRACKERS:
        near = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"no tracker is called {name!r}{hint} There are {', '.join(TRACKERS)}")
    module, opener = TRACKERS[name]
    return getattr(importlib.import_module(f"fdiv.adapters.{module}"), opener)
