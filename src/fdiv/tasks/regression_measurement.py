"""What a regression is measured by: errors of a prediction, and whether an ensemble's spread tells them.

Intervals are over test examples: what other examples might have given, not other seeds.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiv.adapters.classifier import Classifier
from fdiv.methods.forecast.crps import crps
from fdiv.methods.robust.attacks import Attack, evaluated
from fdiv.tasks.labelled import Labelled
from fdiv.tasks.labelled_measurement import ROWS, error

LEVEL = 0.9  # of the central interval whose coverage is counted


def regressed(
    model: Classifier, data: Labelled, members: int, attack: Attack | None, seed: int
) -> dict[str, Any]:
    """The evaluation of a network on `data`, in the form that the report reads.

    rmse, mae and r2 are of the prediction, the mean of an ensemble. crps is the fair one; of a network
    without draws it is the mae. spread: root of the ensemble's mean variance, its finite size made up for;
    that of a calibrated one is its rmse. coverage: how often the middle 90 % of it hold the target.
    """
    rows = per_example(model, data, members, seed)
    if attack is not None:
        moved = under_attack(model, data, attack, seed)
        rows["robust square"] = np.square(_predicted(model, moved) - data.labels.double().numpy()).mean(1)
    scalars, errors = {}, {}
    for name, (columns, statistic) in STATISTICS.items():
        if all(column in rows for column in columns):
            table = np.stack([rows[column] for column in columns], -1)
            scalars[name], errors[name] = statistic(table), error(table, statistic)
    found = {"exact": False, "scalars": scalars, "scalar_errors": errors}
    return found | {"divergences": {}, "calibration": {}, "curves": {}, "samples": []}


def per_example(model: Classifier, data: Labelled, members: int, seed: int) -> dict[str, np.ndarray]:
    """Numbers of each example, [N], over its outputs their mean."""
    truth = data.labels.double()
    ensemble = drawn(model, data.inputs, members, seed)
    middle = ensemble.mean(0)
    rows = {
        "square": (middle - truth).square(),
        "absolute": (middle - truth).abs(),
        "crps": crps(ensemble, truth, fair=True),
        "variation": (truth - truth.mean(0)).square(),
    }
    if len(ensemble) > 1:
        low, high = ensemble.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double(), dim=0)
        rows["inside"] = ((low <= truth) & (truth <= high)).double()
        rows["variance"] = ensemble.var(0) * (1 + 1 / members)  # of a member about the mean of the others
    return {name: row.mean(1).numpy() for name, row in rows.items()}


@torch.no_grad()
def drawn(model: Classifier, inputs: Tensor, members: int, seed: int) -> Tensor:
    """The ensemble [members, N, K] of a network that has one, else its prediction as [1, N, K]; float64."""
    network: Any = model.model
    device = next(network.parameters()).device
    with evaluated(network), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(network, "ensemble"):
            said = [network.ensemble(some.to(device), members) for some in inputs.split(ROWS)]
        else:
            said = [network(some.to(device)).unsqueeze(0) for some in inputs.split(ROWS)]
    return torch.cat([some.double().cpu() for some in said], 1)


def under_attack(model: Classifier, data: Labelled, attack: Attack, seed: int) -> Tensor:
    """The inputs, each moved to where the squared error of the network's own prediction is larger."""
    device = next(model.model.parameters()).device
    moved = []
    with evaluated(model.model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for inputs, targets in zip(data.inputs.split(ROWS), data.labels.split(ROWS), strict=True):

            def missed(moved: Tensor, targets: Tensor = targets.to(device)) -> Tensor:
                return (model.model(moved) - targets).square().mean(1)

            moved.append(attack(inputs.to(device), missed).cpu())
    return torch.cat(moved)


@torch.no_grad()
def _predicted(model: Classifier, inputs: Tensor) -> np.ndarray:
    device = next(model.model.parameters()).device
    with evaluated(model.model):
        return torch.cat([model.model(some.to(device)).double().cpu() for some in inputs.split(ROWS)]).numpy()


# -- of columns of rows, [N, columns] ---------------------------------------------------------------------


def _mean(table: np.ndarray) -> float:
    return float(table.mean())


def _root(table: np.ndarray) -> float:
    return math.sqrt(float(table.mean()))


def _explained(table: np.ndarray) -> float:
    """1 - squared error / variation: over several outputs, the share of all their variation together."""
    square, variation = table.mean(0)
    return float(1 - square / variation) if variation else math.nan


STATISTICS: dict[str, tuple[tuple[str, ...], Callable[[np.ndarray], float]]] = {
    "rmse": (("square",), _root),
    "mae": (("absolute",), _mean),
    "r2": (("square", "variation"), _explained),
    "crps": (("crps",), _mean),
    "spread": (("variance",), _root),
    "coverage": (("inside",), _mean),
    "robust rmse": (("robust square",), _root),
}
