"""A Q-ensemble on a gymnasium environment: trained offline, then online (methods/rl/wsrl.py)."""

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

try:
    import gymnasium
except ImportError as error:
    raise ImportError('this needs gymnasium: pip install "fdiv[env]"') from error

from fdiv.methods.rl.wsrl import WSRL

Act = Callable[[Tensor], Tensor]  # observations [1] -> log-probabilities [1, actions]


class Steps(NamedTuple):
    """What happened in N steps, [N] each; observations are numbers of states."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    after: Tensor
    terminated: Tensor

    def rows(self, index: Tensor | slice) -> "Steps":
        return Steps(*(column[index] for column in self))

    @classmethod
    def empty(cls, count: int) -> "Steps":
        number = torch.zeros(count, dtype=torch.long)
        return cls(number, number.clone(), torch.zeros(count), number.clone(), number.bool())


class Walk:
    """One environment that is walked on through; writes into a buffer, from its first row on."""

    def __init__(self, env: gymnasium.Env, buffer: Steps, seed: int):
        self.env, self.buffer, self.count = env, buffer, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.observation, _ = env.reset(seed=seed)

    @torch.no_grad()
    def step(self, act: Act) -> None:
        chances = act(torch.tensor([self.observation])).exp()
        action = chances.multinomial(1, generator=self.generator).item()
        after, reward, terminated, truncated, _ = self.env.step(action)
        row = (self.observation, action, float(reward), after, terminated)
        for column, value in zip(self.buffer, row, strict=True):
            column[self.count] = value
        self.count += 1
        self.observation = self.env.reset()[0] if terminated or truncated else after

    @property
    def so_far(self) -> Steps:
        return self.buffer.rows(slice(0, self.count))


def walked(env: gymnasium.Env, act: Act, count: int, seed: int) -> Steps:
    """`count` steps of a policy that does not change."""
    walk = Walk(env, Steps.empty(count), seed)
    for _ in range(count):
        walk.step(act)
    return walk.buffer


class Learner:
    """An ensemble, its slow copy (which follows by the rate `polyak`) and its optimiser."""

    def __init__(
        self,
        method: WSRL,
        network: nn.Module,
        seed: int,
        lr: float = 1e-3,
        batch: int = 128,
        polyak: float = 0.01,
    ):
        self.method, self.network, self.slow = method, network, deepcopy(network).requires_grad_(False)
        self.batch, self.polyak = batch, polyak
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        self.generator = torch.Generator().manual_seed(seed)

    def log_policy(self, observation: Tensor) -> Tensor:
        return self.method.log_policy(self.network(observation))

    def frozen(self) -> Act:
        """The policy as it is now."""
        network = deepcopy(self.network)
        return lambda observation: self.method.log_policy(network(observation))

    def learn(self, steps: Steps, conservative: float = 0.0) -> None:
        """One update on a batch drawn from `steps`."""
        drawn = torch.randint(len(steps.action), (self.batch,), generator=self.generator)
        observation, action, reward, after, terminated = steps.rows(drawn)
        with torch.no_grad():
            target = self.method.target(
                reward, terminated, self.slow(after), self.log_policy(after), self.generator
            )
        quality = self.network(observation)
        loss = self.method.loss(quality, action, target)
        if conservative:
            loss = loss + conservative * self.method.conservative(quality, action)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.network.parameters(), strict=True):
                slow.lerp_(fast, self.polyak)


def fine_tune(
    env: gymnasium.Env,
    learner: Learner,
    steps: int,
    seed: int,
    measure: Callable[[], float],
    every: int,
) -> tuple[list[float], Steps]:
    """(`measure()` after each `every` steps, the buffer): warm-up steps count as any other."""
    method, walk, measured = learner.method, Walk(env, Steps.empty(steps), seed), []
    pretrained = learner.frozen()
    for step in range(1, steps + 1):
        walk.step(pretrained if step <= method.warmup else learner.log_policy)
        for _ in range(method.updates_after(step)):
            learner.learn(walk.so_far)
        if step % every == 0:
            measured.append(measure())
    return measured, walk.buffer
