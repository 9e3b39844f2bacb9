"""A small actor and critic on a gymnasium vector environment, with a penalty that keeps to a reference.

Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, for the loop; its clipped
surrogate is GRPO's without the penalty, on advantages of single steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

try:
    from gymnasium.vector import AutoresetMode, VectorEnv
except ImportError as error:
    raise ImportError('this needs gymnasium: pip install "fdiv[env]"') from error

from fdiv._divergence import Divergence
from fdiv.methods.rl.grpo import GRPO


class Rollout(NamedTuple):
    """`steps` steps of N environments, [steps, N] each; of observations [steps, N, ...]."""

    observation: Tensor
    action: Tensor
    log_behaviour: Tensor  # the policy's log-probability of the action
    reward: Tensor
    after: Tensor  # the observation that the step led to
    terminated: Tensor
    ended: Tensor  # terminated or truncated


class Penalty(Protocol):
    """What a policy pays for leaving the reference."""

    def costs(self, rollout: Rollout, policy: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """(what is taken off each reward, [steps, N], numbers to log); may learn from the rollout."""
        ...

    def loss(self, observation: Tensor, log_q: Tensor) -> Tensor:
        """What is differentiated through log_q [rows, actions] beside the costs; [rows]."""
        ...


@dataclass(frozen=True)
class ActionPenalty:
    """beta D(reference, policy)(.|s) at the states that the policy visits, with its exact gradient.

    Acting unlike the reference costs at once, by `loss`; going where one will act so, by `costs`.
    """

    divergence: Divergence
    beta: float
    reference: Callable[[Tensor], Tensor]  # observations -> log-probabilities

    @torch.no_grad()
    def costs(self, rollout: Rollout, policy: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        log_q = policy(rollout.observation).log_softmax(-1)
        value = self.divergence(self.reference(rollout.observation), log_q)
        return self.beta * value, {"action_divergence": value.mean()}

    def loss(self, observation: Tensor, log_q: Tensor) -> Tensor:
        return self.beta * self.divergence(self.reference(observation), log_q)


@dataclass(frozen=True)
class PPO:
    """discount 1 is for environments that end by chance, as Simulations do.

    smoothing: the lambda of generalised advantage estimation (arXiv 1506.02438).
    """

    steps: int = 32
    epochs: int = 4
    batches: int = 2
    clip: float = 0.2
    discount: float = 1.0
    smoothing: float = 0.95
    lr: float = 3e-3

    def train(
        self,
        envs: VectorEnv,
        policy: nn.Module,
        critic: nn.Module,
        iterations: int,
        seed: int,
        penalty: Penalty | None = None,
    ) -> list[dict[str, float]]:
        """Train policy (observations -> logits) and critic (observations -> [..., 1]); what was logged."""
        generator = torch.Generator().manual_seed(seed)
        observation = started(envs, seed)
        optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=self.lr, fused=True)
        logged = []
        for _ in range(iterations):
            rollout, observation = collect(envs, policy, observation, self.steps, generator)
            costs, numbers = penalty.costs(rollout, policy) if penalty else (torch.zeros(()), {})
            logged.append(
                {"reward": rollout.reward.mean().item()} | {k: v.item() for k, v in numbers.items()}
            )
            advantage, returns = self.advantages(rollout, rollout.reward - costs, critic)
            flat = [t.flatten(0, 1) for t in (*rollout[:3], advantage, returns)]
            for _ in range(self.epochs):
                rows = torch.randperm(len(returns.flatten()), generator=generator)
                for part in rows.chunk(self.batches):
                    loss = self.loss(policy, critic, penalty, *(t[part] for t in flat))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return logged

    @torch.no_grad()
    def advantages(self, rollout: Rollout, reward: Tensor, critic: nn.Module) -> tuple[Tensor, Tensor]:
        """(advantages, returns), [steps, N] each."""
        value = critic(rollout.observation).squeeze(-1)
        later = critic(rollout.after).squeeze(-1).masked_fill(rollout.terminated, 0.0)
        surprise = reward + self.discount * later - value
        carry, advantage = torch.zeros_like(value[0]), torch.empty_like(value)
        for step in reversed(range(len(value))):
            carry = surprise[step] + self.discount * self.smoothing * carry.masked_fill(
                rollout.ended[step], 0.0
            )
            advantage[step] = carry
        return advantage, advantage + value

    def loss(self, policy, critic, penalty, observation, action, log_behaviour, advantage, returns) -> Tensor:
        """Policy's and critic's, each on a scale of 1, so that one learning rate serves any reward."""
        log_q = policy(observation).log_softmax(-1)
        scale = advantage.std() + 1e-8
        out = GRPO(beta=0.0, clip=self.clip)(
            log_policy=log_q.gather(-1, action.unsqueeze(-1)),
            log_behaviour=log_behaviour.unsqueeze(-1),
            advantage=(advantage - advantage.mean()) / scale,
            mask=torch.ones(len(action), 1, dtype=torch.bool),
        )
        wrong = (critic(observation).squeeze(-1) - returns).square().mean() / (returns.var() + 1e-8)
        loss = out.loss + wrong
        return loss + penalty.loss(observation, log_q).mean() / scale if penalty else loss


@torch.no_grad()
def collect(
    envs: VectorEnv, policy: nn.Module, observation: Tensor, steps: int, generator: torch.Generator
) -> tuple[Rollout, Tensor]:
    """(a rollout from `observation` on, where it has come to)."""
    rows = []
    for _ in range(steps):
        log_q = policy(observation).log_softmax(-1)
        action = log_q.exp().multinomial(1, generator=generator)
        later, reward, terminated, truncated, info = envs.step(action.squeeze(-1).numpy())
        terminated, truncated = torch.as_tensor(terminated), torch.as_tensor(truncated)
        reward = torch.as_tensor(reward, dtype=torch.float32)
        later = torch.as_tensor(later)
        ended = terminated | truncated
        after = final(info, later, ended)
        log_behaviour = log_q.gather(-1, action).squeeze(-1)
        rows.append((observation, action.squeeze(-1), log_behaviour, reward, after, terminated, ended))
        observation = later
    return Rollout(*(torch.stack(column) for column in zip(*rows, strict=True))), observation


def started(envs: VectorEnv, seed: int) -> Tensor:
    """The first observations; refuses an environment whose steps after an end are none."""
    if envs.metadata.get("autoreset_mode") is not AutoresetMode.SAME_STEP:
        raise ValueError(
            f"{envs} begins a new episode in a step of its own, which is no step of the policy; make it with "
            "autoreset_mode=AutoresetMode.SAME_STEP"
        )
    return torch.as_tensor(envs.reset(seed=seed)[0])


def final(info: dict, later: Tensor, ended: Tensor) -> Tensor:
    """The observations that a step led to, those of ended episodes among them."""
    if not ended.any():
        return later
    after = later.clone()
    for n in ended.nonzero().flatten().tolist():
        after[n] = torch.as_tensor(info["final_obs"][n])
    return after
