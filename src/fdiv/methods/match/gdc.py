"""GDC: the law nearest to a language model under which features have given means.

Khalifa, Elsahar and Dymetman, "A Distributional Approach to Controlled Text Generation", arXiv 2012.11635.
Among all p with E_p phi = mu the one with the least KL(p, a) is

    p = a e^(lambda . phi) / Z(lambda),    lambda = argmin log Z(lambda) - lambda . mu,

a convex problem whose gradient is E_p phi - mu and whose Hessian is the covariance of phi under p.
Expectations are self-normalised sums over samples of a, or over anything with log-weights. phi is `features`,
the paper's mu-bar is `moments`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STEPS = 100
ARRIVED = 1e-7  # the largest change of any log-weight by a step, which then is right to its square
SAFE = (
    0.5  # by a step that small Newton's method needs no line search, whose comparison would drown in rounding
)
FLAT = 1e-12  # of the largest variance: a direction in which the features are constant
EDGE = "(a moment on the edge of what the features reach has its lambda at infinity)"


class Fit(NamedTuple):
    """lambda of each feature, the moments reached, the samples that they are worth, and Newton's steps.

    ess: (sum w)^2 / sum w^2 of the samples' weights under the fitted law.
    """

    lambdas: tuple[float, ...]
    moments: tuple[float, ...]
    ess: float
    iterations: int


def fit(
    features: Tensor,
    moments: tuple[float, ...],
    *,
    log_weights: Tensor | None = None,
    group: Tensor | None = None,
    least_ess: float = 10.0,
) -> Fit:
    """lambda with which the features [N, K] of N samples have these K means.

    log_weights [N]: of samples that are not a's, log a - log proposal; of atoms, log a; -inf leaves one out.
    group [N]: the prompt that a sample answers, 0, 1, ...; each prompt's law is normalised on its own, and
    the moments are means over prompts. Raises ValueError where no such law exists, or where fewer than
    `least_ess` samples would carry it.

    >>> found = fit(torch.tensor([[0.0], [0.0], [0.0], [1.0]]), (0.5,), least_ess=1)
    >>> round(found.lambdas[0], 6)  # log 3
    1.098612
    """
    phi, log_a, place, mu = _checked(features, moments, log_weights, group)
    _check_ranges(phi, place, mu)
    largest = (phi - mu).abs().amax(0)
    scale = torch.where(largest > 0, largest, 1.0)  # features come in units of their own
    dual = _Dual((phi - mu) / scale, log_a, place)
    basis = _basis(dual, mu)
    reduced = _Dual(dual.phi @ basis, log_a, place)
    found, steps = _newton(reduced)
    weights, _, _ = reduced.at(found)
    ess = (weights.sum().square() / weights.square().sum()).item()
    if ess < least_ess:
        raise ValueError(
            f"only {ess:.3g} of {len(phi)} samples carry the fitted law, fewer than least_ess {least_ess:g}: "
            "draw more, ask for moments nearer to the base model's, or lower least_ess where rows are atoms"
        )
    reached = mu + scale * dual.moments(weights)
    return Fit(tuple((basis @ found / scale).tolist()), tuple(reached.tolist()), ess, steps)


class _Dual:
    """Mean over groups of log Z(lambda) - lambda . mu, its gradient and Hessian; phi is centred at mu."""

    def __init__(self, phi: Tensor, log_a: Tensor, place: Tensor):
        self.phi, self.log_a, self.place = phi, log_a, place
        self.groups = int(place.max()) + 1

    def per_group(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.groups, *values.shape[1:]).index_add(0, self.place, values)

    def at(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(weights [N] that sum to 1 in each group, log-weights, the dual's value)."""
        logs = self.log_a + self.phi @ point
        top = logs.new_full((self.groups,), -math.inf).scatter_reduce(0, self.place, logs, "amax")
        log_z = self.per_group((logs - top[self.place]).exp()).log() + top
        logs = logs - log_z[self.place]
        return logs.exp(), logs, log_z.mean()

    def moments(self, weights: Tensor) -> Tensor:
        return (weights[:, None] * self.phi).sum(0) / self.groups

    def hessian(self, weights: Tensor) -> Tensor:
        means = self.per_group(weights[:, None] * self.phi)
        centred = self.phi - means[self.place]
        return (centred.T * weights) @ centred / self.groups


def _newton(dual: _Dual) -> tuple[Tensor, int]:
    """The minimiser, by Newton's steps, halved while they do not descend."""
    point = dual.phi.new_zeros(dual.phi.shape[1])
    for taken in range(MAX_STEPS if len(point) else 0):
        weights, _, value = dual.at(point)
        slope = dual.moments(weights)
        step, failed = torch.linalg.solve_ex(dual.hessian(weights), -slope)
        if int(failed) or not bool(step.isfinite().all()):
            break
        size, change = 1.0, (dual.phi @ step).abs().max()
        if change <= ARRIVED:
            return point + step, taken + 1
        while change > SAFE and dual.at(point + size * step)[2] > value + 1e-4 * size * (slope @ step):
            size /= 2
            if size < 1e-8:
                break
        point = point + size * step
    if not len(point):
        return point, 0
    raise ValueError(
        "these moments cannot be reached together by any law on these samples, or only by one that leaves "
        f"samples out {EDGE}. Each is within its range: move them towards the base model's, or draw more"
    )


def _basis(dual: _Dual, mu: Tensor) -> Tensor:
    """Directions [K, rank] in which the features vary, each with variance 1 under a.

    Along the others they are constant in every group: lambda is 0 there, and the moments have no choice.
    """
    weights, _, _ = dual.at(dual.phi.new_zeros(dual.phi.shape[1]))
    variance, direction = torch.linalg.eigh(dual.hessian(weights))
    varies = variance > FLAT * variance.max().clamp(min=1e-300)
    off = (direction[:, ~varies].T @ dual.moments(weights)).abs()
    if bool((off > 1e-9).any()):
        raise ValueError(
            f"on these samples the features depend on one another, in a way that the moments {mu.tolist()} "
            "contradict; leave a feature out, or draw more samples"
        )
    return direction[:, varies] / variance[varies].sqrt()


def _check_ranges(phi: Tensor, place: Tensor, mu: Tensor) -> None:
    """Refuse a moment that is not inside what its own feature reaches."""
    groups = int(place.max()) + 1
    least, most = (
        phi.new_full((groups, phi.shape[1]), -end)
        .scatter_reduce(0, place[:, None].expand_as(phi), phi, kind)
        .mean(0)
        for end, kind in ((-math.inf, "amin"), (math.inf, "amax"))
    )
    for i, (low, moment, high) in enumerate(zip(least.tolist(), mu.tolist(), most.tolist(), strict=True)):
        constant = high - low <= 1e-12 * (1 + abs(low)) and abs(moment - low) <= 1e-9 * (1 + abs(low))
        if low < moment < high or constant:
            continue
        if moment == high and bool(((phi[:, i] == 0) | (phi[:, i] == 1)).all()):
            raise ValueError(
                f"feature {i} is to hold always: that is no e^(lambda phi) {EDGE}; write Accept(feature)"
            )
        raise ValueError(
            f"the mean of feature {i} is to be {moment:g}, but on these samples it lies between {low:g} and "
            f"{high:g}, both excluded {EDGE}; for a constraint that always holds write Accept(function)"
        )


def _checked(
    features: Tensor, moments: tuple[float, ...], log_weights: Tensor | None, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(features [N, K], log-weights [N], groups [N], moments [K]) of the samples that have weight."""
    phi = features.detach().cpu().double()
    mu = torch.tensor(moments, dtype=torch.float64)
    if phi.ndim != 2 or mu.shape != phi.shape[1:] or not len(mu):
        raise ValueError(f"features are [samples, {len(mu)}], one column a moment; got {tuple(phi.shape)}")
    log_a = phi.new_zeros(len(phi)) if log_weights is None else log_weights.detach().cpu().double()
    place = torch.zeros(len(phi), dtype=torch.long) if group is None else group.cpu()
    if not len(phi) == len(log_a) == len(place):
        raise ValueError(f"{len(phi)} samples, {len(log_a)} log_weights and {len(place)} groups; one each")
    if not (bool(phi.isfinite().all()) and bool(mu.isfinite().all())) or bool(
        (log_a.isnan() | (log_a == math.inf)).any()
    ):
        raise ValueError("features and moments are finite, log-weights finite or -inf; these are not")
    some = log_a > -math.inf
    if not bool(some.any()):
        raise ValueError("no sample has weight: the target gives mass to none of them; draw more")
    _, place = place[some].unique(return_inverse=True)  # prompts without a sample left are left out
    return phi[some], log_a[some], place, mu
