"""Inputs with numbers to be predicted: from a data set that a package ships, or from a file."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.classifier import Classifier
from fdiv.methods.robust.attacks import Attack
from fdiv.methods.supervise.squared_error import SquaredError
from fdiv.tasks.labelled import Labelled, Split, loaded, opened, reopened, separated, standardised
from fdiv.tasks.regression_measurement import regressed

OUTLYING = 5.0  # deviations: far, and not so far that clipped gradients alone would disarm them


@dataclass(frozen=True)
class Regression:
    """Examples of `source` (see fdiv.tasks.labelled), a `test` share of them held out for the evaluation.

    target: the field that is to be predicted, in a file of records. split: seed of what is held out, the same
    for every seed of training. Inputs have the training inputs' mean 0 and variance 1 (standardise=False: as
    they are). Targets always have, so that every number of the evaluation is in standard deviations.
    outliers: the share of the student's training targets that are replaced by normal draws of deviation 5;
    the reference, trained on "truth", sees the right ones, and so does the evaluation. members: of the
    ensemble that a network with draws is measured by. attack: on the inputs, for the numbers called
    robust; in standard deviations, with bounds=None.
    """

    source: str = "diabetes"
    target: str | None = None
    test: float = 0.25
    split: int = 0
    standardise: bool = True
    outliers: float = 0.0
    members: int = 64
    attack: Attack | None = None

    def __post_init__(self):
        if not 0 < self.test < 1:
            raise ValueError(f"test is a share of the examples, between 0 and 1, got {self.test!r}")
        if not 0 <= self.outliers < 1:
            raise ValueError(f"outliers is a share of the targets, in [0, 1), got {self.outliers!r}")
        if not (isinstance(self.members, int) and self.members >= 2):
            raise ValueError(f"members are at least 2, got {self.members!r}")

    # -- models -------------------------------------------------------------------------------------------

    default_method = SquaredError()  # what a reference is trained by

    def load(self, spec, seed: int, reference: Path | None = None) -> Classifier:
        training = _sides(self).training
        return opened(spec, training.inputs.shape[1:], training.labels.shape[1], seed)

    def reopen(self, path: str | Path, spec, seed: int) -> Classifier:
        return reopened(path, spec)

    # -- data ---------------------------------------------------------------------------------------------

    def examples(self, kind: str | None, count: int, generator: torch.Generator) -> Labelled:
        """At most `count` training examples, drawn from the right ones ("truth") or the student's (None)."""
        if kind not in (None, "truth"):
            raise ValueError(f"Regression has data 'truth', got {kind!r}")
        data = _sides(self).training if kind else _students(self)
        if count >= len(data.inputs):
            return data
        return data.rows(torch.randperm(len(data.inputs), generator=generator)[:count])

    def held_out(self, kind: str | None) -> Labelled:
        return _sides(self).test

    def log_prior(self, data: Labelled) -> Tensor:
        raise ValueError("a regression has no classes, and so no log_prior")

    # -- evaluation ---------------------------------------------------------------------------------------

    def evaluate(
        self, model: Classifier, reference: Classifier | None, measures: dict[str, Divergence], seed: int
    ) -> dict[str, Any]:
        """`measures` are between distributions, of which a regression's network states none."""
        return regressed(model, _sides(self).test, self.members, self.attack, seed)


@lru_cache(maxsize=8)
def _sides(task: Regression) -> Split:
    split = separated(loaded(task.source, task.target, numeric=True), task.test, task.split)
    split = standardised(split) if task.standardise else split
    mean, scale = split.training.labels.mean(0), split.training.labels.std(0)
    if not bool((scale > 0).all()):
        raise ValueError(
            f"{task.source} has a target that never changes in training: nothing is to be learnt"
        )
    return Split(*(Labelled(side.inputs, (side.labels - mean) / scale) for side in split))


@lru_cache(maxsize=8)
def _students(task: Regression) -> Labelled:
    """The training side with outliers among its targets, the same ones for every seed of training."""
    data, generator = _sides(task).training, torch.Generator().manual_seed(task.split)
    wrong = torch.rand(len(data.labels), 1, generator=generator) < task.outliers
    anything = OUTLYING * torch.randn(data.labels.shape, generator=generator)
    return Labelled(data.inputs, torch.where(wrong, anything, data.labels))
