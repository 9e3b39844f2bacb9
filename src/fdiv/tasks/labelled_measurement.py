"""What a classifier is measured by: the right classes, how sure it is of them, and its distance from another.

Intervals are over test examples: what other examples might have given, not other seeds.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.classifier import Classifier
from fdiv.evaluate.calibration import ece_null, expected_calibration_error, reliability
from fdiv.evaluate.intervals import bootstrap_interval
from fdiv.methods.robust.attacks import Attack, evaluated
from fdiv.tasks.labelled import Labelled

ROWS = 1024  # examples that a network reads at once
RESAMPLES = 300


def classified(
    model: Classifier,
    reference: Classifier | None,
    data: Labelled,
    measures: dict[str, Divergence],
    attack: Attack | None,
    seed: int,
) -> dict[str, Any]:
    """The evaluation of a classifier on `data`, in the form that the report reads."""
    rows = per_example(model, reference, data, measures)
    scalars = {name: _mean(row) for name, row in rows.items() if name not in ("confidence", "label", "guess")}
    errors = {name: error(row) for name, row in rows.items() if name in scalars}
    table = np.stack([rows["label"], rows["guess"]], -1)
    for name, statistic in OF_CLASSES.items():
        scalars[name], errors[name] = statistic(table), error(table, statistic)
    if attack is not None:
        moved = under_attack(model, data, attack, seed)
        robust = np.stack([rows["label"], moved], -1)
        scalars["robust accuracy"] = float(np.mean(robust[:, 0] == robust[:, 1]))
        errors["robust accuracy"] = error((robust[:, 0] == robust[:, 1]).astype(float))
        scalars["robust worst class"] = worst_class(robust)
        errors["robust worst class"] = error(robust, worst_class)
    confidence, correct = rows["confidence"], rows["accuracy"]
    scalars["ece"] = expected_calibration_error(confidence, correct)
    scalars["ece_null"] = ece_null(confidence, seed=seed, resamples=50)
    errors["ece"] = error(np.stack([confidence, correct], -1), _ece)
    calibration = {"ece": scalars["ece"], "ece_null": scalars["ece_null"]}
    return {
        "exact": False,
        "scalars": scalars,
        "scalar_errors": errors,
        "divergences": {name: scalars[name] for name in measures if reference is not None},
        "calibration": calibration | {"bins": reliability(confidence, correct)},
        "curves": {},
        "samples": [],
    }


@torch.no_grad()
def per_example(
    model: Classifier, reference: Classifier | None, data: Labelled, measures: dict[str, Divergence]
) -> dict[str, np.ndarray]:
    """Numbers of each example, [N]."""
    log_q, labels = predicted(model, data.inputs), data.labels
    chosen, guess = log_q.max(-1)
    log_label = log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    probabilities = log_q.exp()
    one_hot = torch.nn.functional.one_hot(labels, log_q.shape[-1])
    rows = {
        "accuracy": (guess == labels).float(),
        "nll": -log_label,  # infinite where a sparse link leaves the label out
        "brier": (probabilities - one_hot).square().sum(-1),
        "entropy": -torch.where(probabilities > 0, probabilities * log_q, 0.0).sum(-1),
        "confidence": chosen.exp(),
        "label": labels.float(),
        "guess": guess.float(),
    }
    if reference is not None:
        log_p = log_q if model is reference else predicted(reference, data.inputs)
        rows["teacher agreement"] = (guess == log_p.argmax(-1)).float()
        rows |= {name: divergence(log_p, log_q) for name, divergence in measures.items()}
    return {name: row.double().cpu().numpy() for name, row in rows.items()}


@torch.no_grad()
def predicted(model: Classifier, inputs: Tensor) -> Tensor:
    """Log-probabilities [N, C], on the CPU."""
    device = next(model.model.parameters()).device
    with evaluated(model.model):
        return torch.cat([model.log_probs(some.to(device)).float().cpu() for some in inputs.split(ROWS)])


def under_attack(model: Classifier, data: Labelled, attack: Attack, seed: int) -> np.ndarray:
    """The class that is guessed for each input once it has been moved against its label, [N]."""
    device = next(model.model.parameters()).device
    guesses = []
    with evaluated(model.model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for inputs, labels in zip(data.inputs.split(ROWS), data.labels.split(ROWS), strict=True):
            inputs, labels = inputs.to(device), labels.to(device)

            def wrong(moved: Tensor, labels: Tensor = labels) -> Tensor:
                return torch.nn.functional.cross_entropy(_scores(model, moved), labels, reduction="none")

            guesses.append(model.log_probs(attack(inputs, wrong)).argmax(-1).cpu())
    return torch.cat(guesses).double().numpy()


def _scores(model: Classifier, inputs: Tensor) -> Tensor:
    """What rises with a class's chance: its log-probability or, where a sparse link has none, the logit."""
    log_q = model.log_probs(inputs)
    return log_q if bool(log_q.isfinite().all()) else model.model(inputs)


# -- of label and guess, [N, 2] ---------------------------------------------------------------------------


def recalls(table: np.ndarray) -> np.ndarray:
    """The share of each class that is recognised, of the classes that occur."""
    label, guess = table.T
    return np.array([np.mean(guess[label == c] == c) for c in np.unique(label)])


def balanced(table: np.ndarray) -> float:
    return float(recalls(table).mean())


def worst_class(table: np.ndarray) -> float:
    return float(recalls(table).min())


def g_mean(table: np.ndarray) -> float:
    """The geometric mean of the classes' recalls."""
    found = recalls(table)
    return float(found.prod() ** (1 / len(found)))


def macro_f1(table: np.ndarray) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN)."""
    label, guess = table.T
    own, given = (np.stack([side == c for c in np.unique(label)]) for side in (label, guess))
    return float(np.mean(2 * (own & given).sum(1) / (own.sum(1) + given.sum(1))))


OF_CLASSES: dict[str, Callable[[np.ndarray], float]] = {
    "balanced accuracy": balanced,
    "worst class accuracy": worst_class,
    "g-mean": g_mean,
    "macro f1": macro_f1,
}


def error(items: np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean) -> float:
    """Standard error by bootstrap over examples, the first dimension; nan where the number is not finite."""
    if not np.isfinite(statistic(items)):
        return math.nan
    _, low, high = bootstrap_interval(items, statistic, resamples=RESAMPLES)
    return (high - low) / (2 * 1.96)


def _mean(row: np.ndarray) -> float:
    return float(row.mean())


def _ece(rows: np.ndarray) -> float:
    return expected_calibration_error(rows[:, 0], rows[:, 1])
