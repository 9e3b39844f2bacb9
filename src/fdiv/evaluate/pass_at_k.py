"""pass@k: the chance that at least one of k answers is right.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
"""

import numpy as np


def pass_at_k(correct, samples, k):
    """Unbiased estimate of pass@k from `correct` right answers among `samples`, a problem each.

    1 - C(n - c, k) / C(n, k), as the product over i < k of (n - c - i) / (n - i): every factor
    lies in [0, 1], so nothing overflows and n - c < k gives exactly 1. `1 - (1 - c/n)**k` would be
    biased.

    correct, samples: broadcastable integers, [problems] or a number; k: one integer in 1..samples.
    Returns a float for numbers and an array [problems] otherwise; average it over problems
    yourself.
    """
    correct, samples = np.broadcast_arrays(np.asarray(correct, float), np.asarray(samples, float))
    _check(correct, samples, k)
    step = np.arange(int(k))
    wrong = np.clip((samples - correct)[..., None] - step, 0, None)  # [problems, k]
    chance = 1 - np.prod(wrong / (samples[..., None] - step), axis=-1)
    return float(chance) if chance.ndim == 0 else chance


def exact_pass_at_k(accuracy, k):
    """Mean over prompts of 1 - (1 - p)^k where p, the chance that one answer is right, is known.

    accuracy: [prompts] in [0, 1]; k: a number or an array [ks], which gives an array [ks].
    """
    accuracy = _probabilities(accuracy, "accuracy")
    k = np.asarray(k, float)
    if (k < 1).any():
        raise ValueError(f"k is {k.min():g}; it must be at least 1: pass the number of answers drawn")
    with np.errstate(divide="ignore"):  # p = 1 gives log 0 = -inf and so a chance of exactly 1
        chance = -np.expm1(np.multiply.outer(k, np.log1p(-accuracy))).mean(axis=-1)
    return float(chance) if chance.ndim == 0 else chance


def _check(correct, samples, k):
    if int(k) != k or k < 1:
        raise ValueError(f"k is {k}; allowed are whole numbers from 1; pass one k a call")
    if (samples < k).any():
        raise ValueError(
            f"k is {k} but a problem has only {samples.min():g} samples; allowed is k <= samples; "
            "draw more samples, ask for a smaller k, or use exact_pass_at_k for a known accuracy"
        )
    if (correct < 0).any() or (correct > samples).any():
        raise ValueError("correct must lie in 0..samples; pass the count of right answers, not a rate")


def _probabilities(values, name):
    values = np.atleast_1d(np.asarray(values, float))
    if (values < 0).any() or (values > 1 + 1e-9).any():
        raise ValueError(f"{name} holds values outside [0, 1]; pass probabilities, not counts or logits")
    return np.minimum(values, 1.0)
