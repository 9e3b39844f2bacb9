"""How many different things a model says."""

import numpy as np

from .pass_at_k import _probabilities, pass_at_k


def distinct_n(token_sequences, n):
    """Distinct n-grams divided by all n-grams, over all sequences together, in [0, 1].

    Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models",
    arXiv 1510.03055. It falls with the amount of text: compare equal numbers of tokens only.
    token_sequences: sequences of hashable tokens. No n-gram at all gives 0.
    """
    if n < 1:
        raise ValueError(f"n is {n}; allowed are whole numbers from 1; use n=1 for distinct tokens")
    grams = [tuple(s[i : i + n]) for s in map(list, token_sequences) for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def effective_number(probabilities, axis=-1):
    """exp(entropy): how many equally likely outcomes have this entropy (Hill number of order 1).

    probabilities: [..., outcomes], normalised here; returns [...] or a float.
    """
    p = np.asarray(probabilities, float)
    p = p / p.sum(axis=axis, keepdims=True)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=axis)  # 0 log 0 = 0
    number = np.exp(entropy)
    return float(number) if number.ndim == 0 else number


def coverage_at_k(probabilities, k):
    """Expected number of distinct valid answers in k draws: sum over answers a of 1 - (1 - q_a)^k.

    probabilities: [..., answers], the model's probability of each valid answer (they may sum to
    less than one: the rest is invalid); returns [...] or a float.
    """
    q = _probabilities(probabilities, "probabilities")
    with np.errstate(divide="ignore"):  # q_a = 1 gives log 0 = -inf and counts as exactly one
        seen = -np.expm1(k * np.log1p(-q)).sum(axis=-1)
    return float(seen) if seen.ndim == 0 else seen


def rarefied_coverage(counts, k, samples=None):
    """Unbiased estimate of `coverage_at_k` from how often each valid answer was drawn.

    sum over a of 1 - C(n - c_a, k) / C(n, k) (Hurlbert 1971, "The Nonconcept of Species
    Diversity"). counts: [answers]; samples: all draws n, invalid ones included (default: the sum
    of counts).
    """
    counts = np.asarray(counts)
    return float(np.sum(pass_at_k(counts, counts.sum() if samples is None else samples, k)))
