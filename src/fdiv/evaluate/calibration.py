"""Whether a model that says 0.7 is right seven times in ten.

Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"; the bins are
those of Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599. The bias
that finite samples give the estimate: Kumar et al. 2019, "Verified Uncertainty Calibration",
arXiv 1909.10155.
"""

import numpy as np


def expected_calibration_error(confidence, correct, bins=15, weight=None):
    """sum over bins of (weight of the bin) * abs(mean confidence - mean correct).

    confidence: [items] in [0, 1]; correct: [items], 0/1 or an expected correctness in [0, 1];
    weight: [items] or None for equal weights. Bins have equal width and are (lo, hi]; a confidence
    of 0 belongs to the first. Read it beside `ece_null`: it is positive even for a perfect model.
    """
    mass, mean_confidence, accuracy = _binned(confidence, correct, bins, weight)
    return float(np.sum(mass * np.abs(mean_confidence - accuracy)) / mass.sum())


def reliability(confidence, correct, bins=15, weight=None):
    """A reliability diagram: [{"confidence", "accuracy", "weight"}] of the non-empty bins.

    The weights sum to one; arguments as in `expected_calibration_error`.
    """
    mass, mean_confidence, accuracy = _binned(confidence, correct, bins, weight)
    rows = zip(mean_confidence, accuracy, mass / mass.sum(), strict=True)
    return [{"confidence": float(c), "accuracy": float(a), "weight": float(w)} for c, a, w in rows if w > 0]


def ece_null(confidence, bins=15, resamples=200, seed=0, weight=None, count=None):
    """Mean ECE of a perfectly calibrated model that has these confidences.

    Labels are redrawn as Bernoulli(confidence), `resamples` times. With `count` the items
    themselves are redrawn too, `count` of them in proportion to `weight`: the null of an
    evaluation that samples `count` answers from a known distribution. Arguments otherwise as in
    `expected_calibration_error`.
    """
    confidence, weight = _items(confidence, weight)
    random = np.random.default_rng(seed)
    total = 0.0
    for _ in range(resamples):
        drawn, mass = confidence, weight
        if count is not None:
            drawn, mass = random.choice(confidence, int(count), p=weight / weight.sum()), None
        total += expected_calibration_error(drawn, random.random(drawn.shape) < drawn, bins, mass)
    return total / resamples


def brier(confidence, correct, weight=None):
    """Weighted mean of (confidence - correct)^2; [items] each. A proper score: lower is better."""
    confidence, weight = _items(confidence, weight)
    return float(np.average((confidence - np.asarray(correct, float).ravel()) ** 2, weights=weight))


def _binned(confidence, correct, bins, weight):
    """Mass, mean confidence and accuracy, each [bins]; the means of an empty bin are 0."""
    confidence, weight = _items(confidence, weight)
    correct = np.asarray(correct, float).ravel()
    if correct.shape != confidence.shape:
        raise ValueError(f"correct has {correct.size} items, confidence {confidence.size}; pass one each")
    # searchsorted on the left edge puts a value that equals an edge in the bin below: (lo, hi]
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1
    bin_of = np.clip(bin_of, 0, bins - 1)
    mass = np.bincount(bin_of, weight, bins)
    safe = np.where(mass > 0, mass, 1.0)
    return mass, *(np.bincount(bin_of, weight * x, bins) / safe for x in (confidence, correct))


def _items(confidence, weight):
    confidence = np.asarray(confidence, float).ravel()
    if confidence.size == 0 or (confidence < 0).any() or (confidence > 1 + 1e-6).any():
        raise ValueError(
            "confidence must hold values in [0, 1], at least one; pass probabilities, not logits"
        )
    weight = np.ones_like(confidence) if weight is None else np.asarray(weight, float).ravel()
    if weight.shape != confidence.shape or weight.sum() <= 0:
        raise ValueError(
            "weight needs one non-negative value an item and a positive sum; pass None for equal"
        )
    return np.minimum(confidence, 1.0), weight
