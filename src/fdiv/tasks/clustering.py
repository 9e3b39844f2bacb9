"""Inputs to be put into groups, without labels; those there are tell in the end how it went."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.classifier import Classifier
from fdiv.methods.represent.k_means import k_means, scikit
from fdiv.methods.represent.reconstruction import Reconstruction
from fdiv.methods.robust.attacks import evaluated
from fdiv.tasks.labelled import Labelled, Split, loaded, opened, reopened, standardised
from fdiv.tasks.labelled_measurement import ROWS, error


@dataclass(frozen=True)
class Clustering:
    """All examples of `source` (see fdiv.tasks.labelled), trained on and measured alike.

    target: the field that is the class, in a file of records. clusters: their number, None for as many as
    classes. standardise: inputs of mean 0 and variance 1; None: if they are rows of numbers, and not images
    or signals.
    restarts: of the k-means that is measured beside, on inputs and on features.
    A reference learns to restore its inputs and nobody trains its scores: its clusters are those of k-means.
    """

    source: str = "digits"
    target: str | None = None
    clusters: int | None = None
    standardise: bool | None = None
    restarts: int = 20

    def __post_init__(self):
        if self.clusters is not None and not (isinstance(self.clusters, int) and self.clusters >= 2):
            raise ValueError(
                f"clusters are at least 2, or None for as many as classes, got {self.clusters!r}"
            )
        if not (isinstance(self.restarts, int) and self.restarts >= 1):
            raise ValueError(f"restarts is a whole number >= 1, got {self.restarts!r}")

    # -- models -------------------------------------------------------------------------------------------

    default_method = Reconstruction()  # what a reference is trained by

    def load(self, spec, seed: int, reference: Path | None = None) -> Classifier:
        return opened(spec, _data(self).inputs.shape[1:], self.outputs, seed)

    def reopen(self, path: str | Path, spec, seed: int) -> Classifier:
        return reopened(path, spec)

    @property
    def outputs(self) -> int:
        return int(_data(self).labels.max()) + 1 if self.clusters is None else self.clusters

    # -- data ---------------------------------------------------------------------------------------------

    def examples(self, kind: str | None, count: int, generator: torch.Generator) -> Labelled:
        """All examples; every label is 0."""
        if kind not in (None, "truth"):
            raise ValueError(f"Clustering has data 'truth', got {kind!r}")
        data = _data(self)
        if count < len(data.inputs):
            raise ValueError(
                f"all {len(data.inputs)} examples of {self.source} are put into clusters; write "
                f"train.examples: {len(data.inputs)} or more"
            )
        return Labelled(data.inputs, torch.zeros_like(data.labels))

    def held_out(self, kind: str | None) -> Labelled:
        raise ValueError("nothing is held out of a clustering; leave out train.validate_every")

    def log_prior(self, data: Labelled) -> Tensor:
        raise ValueError("what share a cluster has is not known, so there is no log_prior")

    # -- evaluation ---------------------------------------------------------------------------------------

    def evaluate(
        self, model: Classifier, reference: Classifier | None, measures: dict[str, Divergence], seed: int
    ) -> dict[str, Any]:
        """accuracy under the best matching of clusters to classes, NMI, ARI; the same of two k-means.

        `measures` are between predictions over named classes, and clusters have no names.
        """
        inputs, labels = _data(self)
        features, guess = read(model, inputs)
        of_features = k_means(features, self.outputs, self.restarts, seed)
        found = {"": of_features if model is reference else guess, "features ": of_features}
        found["inputs "] = _of_inputs(self, seed)
        scalars: dict[str, float] = {}
        for who, clusters in found.items():
            scalars |= {who + name: value for name, value in agreement(labels, clusters).items()}
        right = (matched(labels, found[""]) == labels).double().numpy()
        result = {"exact": False, "scalars": scalars, "scalar_errors": {"accuracy": error(right)}}
        return result | {"divergences": {}, "calibration": {}, "curves": {}, "samples": []}


@lru_cache(maxsize=8)
def _data(task: Clustering) -> Labelled:
    data = loaded(task.source, task.target, numeric=False)
    rows_of_numbers = data.inputs.ndim == 2
    wanted = rows_of_numbers if task.standardise is None else task.standardise
    return standardised(Split(data, data)).training if wanted else data


@lru_cache(maxsize=32)
def _of_inputs(task: Clustering, seed: int) -> Tensor:
    return k_means(_data(task).inputs.flatten(1), task.outputs, task.restarts, seed)


@torch.no_grad()
def read(model: Classifier, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, width], and the cluster of the largest score [N]."""
    network = model.model
    device = next(network.parameters()).device
    with evaluated(network):
        features = torch.cat([network.features(some.to(device)) for some in inputs.split(ROWS)])
        return features.cpu(), network.head(features).argmax(-1).cpu()


def agreement(labels: Tensor, clusters: Tensor) -> dict[str, float]:
    """How well clusters [N] agree with classes [N]: 1 for the same groups under other names."""
    metrics = scikit("metrics")
    return {
        "accuracy": (matched(labels, clusters) == labels).double().mean().item(),
        "nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "ari": float(metrics.adjusted_rand_score(labels, clusters)),
    }


def matched(labels: Tensor, clusters: Tensor) -> Tensor:
    """Each example's cluster as a class, one for one so that most are right [N]; -1 for one left over."""
    size = int(max(labels.max(), clusters.max())) + 1
    table = np.zeros((size, size), int)
    np.add.at(table, (clusters.numpy(), labels.numpy()), 1)
    classes = torch.from_numpy(linear_sum_assignment(table, maximize=True)[1])
    classes[classes > int(labels.max())] = -1
    return classes[clusters]
