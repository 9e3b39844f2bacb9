"""Both are members of one family of distributions: chi-square and the alpha family in closed form.

For two members of an exponential family with log-partition A and natural parameters a and b,

    log E_q[(p/q)^t] = A(t a + (1 - t) b) - t A(a) - (1 - t) A(b)

which is infinite where t a + (1 - t) b is no parameter of the family. Known here: Categorical, Bernoulli,
Normal and Beta of torch.distributions, each event by itself; a policy over independent coordinates adds
the logarithms up.
Source: Nielsen and Nock, "On the chi square and higher-order chi distances for approximating
f-divergences", arXiv 1309.3029.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Categorical, Distribution, Normal


def log_power_moment(p: Distribution, q: Distribution, power: float) -> Tensor:
    """log E_q[(p/q)^power], inf where it is infinite; the batch shape of the two."""
    if type(p) is not type(q) or type(p) not in FAMILIES:
        known = ", ".join(family.__name__ for family in FAMILIES)
        raise TypeError(f"both have to be of one family among {known}; got {p!r} and {q!r}")
    parameters, log_partition, is_inside = FAMILIES[type(p)]
    of_p, of_q = parameters(p), parameters(q)
    between = [_between(a, b, power) for a, b in zip(of_p, of_q, strict=True)]
    inside = is_inside(*between)
    # Outside, any member of the family stands in, so that no nan enters a gradient.
    between = [torch.where(_as(inside, t), t, b) for t, b in zip(between, of_q, strict=True)]
    moment = log_partition(*between) - power * log_partition(*of_p) - (1 - power) * log_partition(*of_q)
    return torch.where(inside, moment, math.inf)


def chi_square(p: Distribution, q: Distribution) -> Tensor:
    """E_q[(p/q)^2] - 1, that is Pearson()(p, q); Neyman()(p, q) is chi_square(q, p).

    p policy and q reference give the chi-square between action distributions that RL uses.
    """
    return log_power_moment(p, q, 2.0).expm1()


def _between(a: Tensor, b: Tensor, power: float) -> Tensor:
    empty = (a == -math.inf) & (b == -math.inf)  # a category that neither has
    return torch.where(empty, -math.inf, power * a + (1 - power) * b)


def _as(inside: Tensor, parameter: Tensor) -> Tensor:
    """[...] as wide as a parameter that may have categories, [...] or [..., categories]."""
    return inside.unsqueeze(-1) if parameter.ndim > inside.ndim else inside


def _log_normal(precise_mean: Tensor, minus_half_precision: Tensor) -> Tensor:
    return -precise_mean.square() / (4 * minus_half_precision) - (-2 * minus_half_precision).log() / 2


def _log_beta(one: Tensor, zero: Tensor) -> Tensor:
    return one.lgamma() + zero.lgamma() - (one + zero).lgamma()


# Of each family: its natural parameters, the log-partition, and which parameters belong to it.
FAMILIES = {
    Categorical: (
        lambda d: (d.logits,),
        lambda logits: logits.logsumexp(-1),
        lambda logits: torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device),
    ),
    Bernoulli: (
        lambda d: (d.logits,),
        torch.nn.functional.softplus,
        lambda logits: torch.ones_like(logits, dtype=torch.bool),
    ),
    Normal: (
        lambda d: (d.loc / d.scale.square(), -1 / (2 * d.scale.square())),
        _log_normal,
        lambda precise_mean, minus_half_precision: minus_half_precision < 0,
    ),
    Beta: (
        lambda d: (d.concentration1, d.concentration0),
        _log_beta,
        lambda one, zero: (one > 0) & (zero > 0),
    ),
}
