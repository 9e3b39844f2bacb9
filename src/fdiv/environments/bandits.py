"""Bandits, many at a time, and algorithms that are experts on them: LinUCB and Thompson sampling.

An algorithm is a function of the history: log-probabilities of the arms. A Bernoulli bandit is a linear one
whose arms are unit vectors and whose rewards are 0 or 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

GRID = 512  # points of [0, 1] at which posteriors of means are compared


class History(NamedTuple):
    """What was seen so far: arms [B, arms, d], actions [B, t], rewards [B, t]."""

    arms: Tensor
    actions: Tensor
    rewards: Tensor

    @property
    def pulled(self) -> Tensor:
        """The features of the arms that were pulled, [B, t, d]."""
        return self.arms.gather(1, self.actions.unsqueeze(-1).expand(-1, -1, self.arms.shape[-1]))

    def until(self, step: int) -> "History":
        return History(self.arms, self.actions[:, :step], self.rewards[:, :step])


Algorithm = Callable[[History], Tensor]  # -> log-probabilities of the arms, [B, arms]


@dataclass(frozen=True)
class Bandits:
    """Reward = arms theta + noise N(0, deviation^2), or Bernoulli(arms theta) where deviation is None."""

    arms: Tensor  # [B, arms, d]
    theta: Tensor  # [B, d]
    deviation: float | None

    @classmethod
    def bernoulli(cls, number: int, arms: int, generator: torch.Generator) -> "Bandits":
        """Means are uniform on [0, 1]."""
        means = torch.rand(number, arms, generator=generator)
        return cls(torch.eye(arms).expand(number, arms, arms), means, None)

    @classmethod
    def linear(
        cls, number: int, arms: int, d: int, deviation: float, generator: torch.Generator
    ) -> "Bandits":
        """Arms are uniform on the unit sphere, theta is N(0, 1)."""
        features = torch.randn(number, arms, d, generator=generator)
        features = features / features.norm(dim=-1, keepdim=True)
        return cls(features, torch.randn(number, d, generator=generator), deviation)

    @property
    def means(self) -> Tensor:
        """[B, arms]."""
        return (self.arms @ self.theta.unsqueeze(-1)).squeeze(-1)

    def pull(self, actions: Tensor, generator: torch.Generator) -> Tensor:
        """Rewards [B] of actions [B]."""
        mean = self.means.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        if self.deviation is None:
            return torch.bernoulli(mean, generator=generator)
        return mean + self.deviation * torch.randn(mean.shape, generator=generator)


class Trajectories(NamedTuple):
    """History, the context algorithm's log-probabilities [B, T, arms], and the regret of each step [B, T]."""

    history: History
    log_context: Tensor
    regret: Tensor

    def judged_by(self, expert: Algorithm) -> Tensor:
        """The expert's log-probabilities at each step, after the history that the context algorithm made."""
        steps = self.history.actions.shape[1]
        return torch.stack([expert(self.history.until(step)) for step in range(steps)], 1)


def play(bandits: Bandits, context: Algorithm, steps: int, generator: torch.Generator) -> Trajectories:
    """What happens when an algorithm chooses; regret is of means."""
    number = len(bandits.arms)
    history = History(bandits.arms, torch.zeros(number, 0, dtype=torch.long), torch.zeros(number, 0))
    rows = []
    for _ in range(steps):
        rows.append(context(history))
        action = rows[-1].exp().multinomial(1, generator=generator)
        reward = bandits.pull(action.squeeze(-1), generator).unsqueeze(-1)
        history = History(
            bandits.arms, torch.cat([history.actions, action], 1), torch.cat([history.rewards, reward], 1)
        )
    means = bandits.means
    regret = means.amax(-1, keepdim=True) - means.gather(-1, history.actions)
    return Trajectories(history, torch.stack(rows, 1), regret)


def uniform(history: History) -> Tensor:
    """Every arm alike."""
    number, arms, _ = history.arms.shape
    return torch.full((number, arms), -math.log(arms))


@dataclass(frozen=True)
class Explored:
    """Another algorithm, but an arm at random with chance `epsilon`, so that every arm stays possible."""

    algorithm: Algorithm
    epsilon: float

    def __post_init__(self):
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon is a chance in (0, 1], got {self.epsilon!r}")

    def __call__(self, history: History) -> Tensor:
        log_p = self.algorithm(history)
        shares = log_p + math.log1p(-self.epsilon) if self.epsilon < 1 else log_p.new_full((), -math.inf)
        return torch.logaddexp(shares, uniform(history) + math.log(self.epsilon))


@dataclass(frozen=True)
class LinUCB:
    """The arm of highest estimate plus `width` of its deviation, by ridge regression; ties are shared."""

    width: float = 1.0
    ridge: float = 1.0

    def __call__(self, history: History) -> Tensor:
        mean, covariance = _ridge(history, self.ridge)
        spread = torch.einsum("bad,bde,bae->ba", history.arms, covariance, history.arms).clamp(min=0).sqrt()
        bound = (history.arms @ mean.unsqueeze(-1)).squeeze(-1) + self.width * spread
        best = bound >= bound.amax(-1, keepdim=True) - 1e-6
        return (best / best.sum(-1, keepdim=True)).log()


@dataclass(frozen=True)
class BetaThompson:
    """Each arm with the chance that its mean is the highest, under the uniform prior; for 0/1 rewards.

    The chances are integrals over [0, 1], by the trapezoidal rule on 512 points.
    """

    def __call__(self, history: History) -> Tensor:
        chosen = one_hot(history.actions, history.arms.shape[1]).to(history.rewards)
        won = (chosen * history.rewards.unsqueeze(-1)).sum(1).unsqueeze(-1)
        lost = chosen.sum(1).unsqueeze(-1) - won
        x = torch.linspace(0, 1, GRID, dtype=won.dtype)
        density = torch.special.xlogy(won, x) + torch.special.xlogy(lost, 1 - x)
        density = (density - density.amax(-1, keepdim=True)).exp()
        below = torch.cat([torch.zeros_like(won), torch.cumulative_trapezoid(density, dim=-1)], -1)
        below, density = below / below[..., -1:], density / below[..., -1:]
        # d/dx of the product of all distribution functions is the sum of what each arm wins at x.
        log_below = below.clamp(min=torch.finfo(below.dtype).tiny).log()
        wins = torch.trapezoid(density * (log_below.sum(1, keepdim=True) - log_below).exp(), dim=-1)
        return (wins / wins.sum(-1, keepdim=True)).log()


@dataclass(frozen=True)
class GaussianThompson:
    """Each arm with the chance that it is best, by `draws` of the posterior of theta; its prior is N(0, 1).

    `deviation` is that of the rewards. An arm that wins no draw has probability 0.
    """

    deviation: float
    generator: torch.Generator
    draws: int = 64

    def __call__(self, history: History) -> Tensor:
        mean, covariance = _ridge(history, self.deviation**2)
        root = torch.linalg.cholesky(covariance * self.deviation**2)
        number, d = mean.shape
        noise = torch.randn(number, d, self.draws, generator=self.generator, dtype=mean.dtype)
        worth = history.arms @ (mean.unsqueeze(-1) + root @ noise)  # [B, arms, draws]
        return one_hot(worth.argmax(1), worth.shape[1]).to(mean).mean(1).log()


def _ridge(history: History, strength: float) -> tuple[Tensor, Tensor]:
    """(estimate [B, d], (X'X + strength)^-1 [B, d, d])."""
    x = history.pulled
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    covariance = torch.linalg.inv(x.mT @ x + strength * eye)
    return (covariance @ x.mT @ history.rewards.to(x).unsqueeze(-1)).squeeze(-1), covariance
