"""Inputs with a class each: from a data set that a package ships, or from a file."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.classifier import Classifier
from fdiv.methods.distill.sft import SFT
from fdiv.methods.robust.attacks import Attack
from fdiv.tasks.labelled import Labelled, Split, loaded, opened, reopened, separated, standardised
from fdiv.tasks.labelled_measurement import classified
from fdiv.tasks.shifts import shifted

PLAIN = "truth"  # the data that a reference is trained on: without noise in its labels, without a shift


@dataclass(frozen=True)
class Classification:
    """Examples of `source` (see fdiv.tasks.labelled), a `test` share of them held out for the evaluation.

    target: the field that is the class, in a file of records. split: seed of what is held out, of the noise
        and of the shift; they are the same for every seed of training.
    label_noise: the share of training labels that are wrong: any other class ("uniform") or the next one
        ("pairs"). Test labels stay right. The reference, trained on "truth", sees right ones; on "noisy",
        the student's.
    keep: (class, share) pairs: the shares of these classes' training examples that are kept.
    standardise: inputs with the training inputs' mean 0 and variance 1; None: if they are rows of numbers,
        and not images or signals.
    shift: "rotate:DEGREES", "noise:SCALE" or "scale:FACTOR": the student is trained and all are tested on
        inputs so shifted, of which the reference has seen none.
    prior: the classes' shares that methods with a prior are told, () for those of the training labels.
    attack: on the inputs, for the numbers called robust.
    """

    source: str = "digits"
    target: str | None = None
    test: float = 0.25
    split: int = 0
    label_noise: float = 0.0
    noise: str = "uniform"
    keep: tuple[tuple[int, float], ...] = ()
    standardise: bool | None = None
    shift: str | None = None
    prior: tuple[float, ...] = ()
    attack: Attack | None = None

    def __post_init__(self):
        if not 0 < self.test < 1:
            raise ValueError(f"test is a share of the examples, between 0 and 1, got {self.test!r}")
        if not 0 <= self.label_noise < 1:
            raise ValueError(f"label_noise is a share of the labels, in [0, 1), got {self.label_noise!r}")
        if self.noise not in ("uniform", "pairs"):
            raise ValueError(f"noise is 'uniform' or 'pairs', got {self.noise!r}")
        if any(not 0 < share <= 1 for _, share in self.keep):
            raise ValueError(f"keep is (class, share) pairs with shares in (0, 1], got {self.keep!r}")
        if self.prior and abs(sum(self.prior) - 1) > 1e-6:
            raise ValueError(f"prior is a share of each class, together 1, got {self.prior!r}")

    # -- models -------------------------------------------------------------------------------------------

    default_method = SFT()  # what a reference is trained by: cross-entropy

    def load(self, spec, seed: int, reference: Path | None = None) -> Classifier:
        data = _sides(self)
        return opened(spec, data.training.inputs.shape[1:], self.classes, seed)

    def reopen(self, path: str | Path, spec, seed: int) -> Classifier:
        return reopened(path, spec)

    @property
    def classes(self) -> int:
        return int(_sides(self).training.labels.max()) + 1

    # -- data ---------------------------------------------------------------------------------------------

    def examples(self, kind: str | None, count: int, generator: torch.Generator) -> Labelled:
        """At most `count` training examples, drawn from those of `kind`; None: the student's."""
        if kind not in (None, PLAIN, "noisy"):
            raise ValueError(f"Classification has data 'truth' and 'noisy', got {kind!r}")
        data = _plain(self) if kind == PLAIN else _students(self)
        if count >= len(data.inputs):
            return data
        return data.rows(torch.randperm(len(data.inputs), generator=generator)[:count])

    def held_out(self, kind: str | None) -> Labelled:
        return _sides(self).test if kind == PLAIN else _tested(self)

    def log_prior(self, data: Labelled) -> Tensor:
        """Log of the classes' shares."""
        if self.prior and len(self.prior) != self.classes:
            raise ValueError(f"prior has {len(self.prior)} shares for {self.classes} classes")
        counts = torch.bincount(data.labels.cpu(), minlength=self.classes).float()
        shares = torch.tensor(self.prior) if self.prior else counts / counts.sum()
        return shares.log().to(data.inputs.device)

    # -- evaluation ---------------------------------------------------------------------------------------

    def evaluate(
        self, model: Classifier, reference: Classifier | None, measures: dict[str, Divergence], seed: int
    ) -> dict[str, Any]:
        return classified(model, reference, _tested(self), measures, self.attack, seed)


@lru_cache(maxsize=8)
def _sides(task: Classification) -> Split:
    """Training and test examples as they are."""
    split = separated(loaded(task.source, task.target, numeric=False), task.test, task.split)
    rows_of_numbers = split.training.inputs.ndim == 2
    wanted = rows_of_numbers if task.standardise is None else task.standardise
    return standardised(split) if wanted else split


@lru_cache(maxsize=8)
def _plain(task: Classification) -> Labelled:
    """Training examples with right labels; thinned classes are thin here too."""
    data, generator = _sides(task).training, torch.Generator().manual_seed(task.split)
    kept = torch.ones(len(data.labels), dtype=torch.bool)
    for label, share in task.keep:
        places = (data.labels == label).nonzero()[:, 0]
        if not len(places):
            raise ValueError(f"keep names class {label}, and {task.source} has none of it")
        order = places[torch.randperm(len(places), generator=generator)]
        kept[order[max(1, round(share * len(places))) :]] = False
    return data.rows(kept)


@lru_cache(maxsize=8)
def _students(task: Classification) -> Labelled:
    """As a student sees them: with wrong labels and shifted inputs, if the task says so."""
    data, generator = _plain(task), torch.Generator().manual_seed(task.split)
    wrong = torch.rand(len(data.labels), generator=generator) < task.label_noise
    steps = torch.ones_like(data.labels)
    if task.noise == "uniform":
        steps = torch.randint(1, task.classes, data.labels.shape, generator=generator)
    labels = torch.where(wrong, (data.labels + steps) % task.classes, data.labels)
    return Labelled(_shifted(task, data.inputs, generator), labels)


@lru_cache(maxsize=8)
def _tested(task: Classification) -> Labelled:
    data = _sides(task).test
    return Labelled(_shifted(task, data.inputs, torch.Generator().manual_seed(task.split + 1)), data.labels)


def _shifted(task: Classification, inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs if task.shift is None else shifted(inputs, task.shift, generator)
