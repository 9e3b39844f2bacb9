"""A Markov decision process in tables as gymnasium environments: one, and many side by side."""

from typing import Any

import numpy as np

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError('this needs gymnasium: pip install "fdiv[env]"') from error

from fdiv.environments.tabular import MDP


class Simulation(gymnasium.Env):
    """Observes the number of the state. An episode terminates with chance 1 - discount after each step.

    So returns are summed without a discount, and the states that are met have the discounted occupancy.
    `info["true_reward"]` stands beside the reward, which is the proxy.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, gymnasium's own form

    def __init__(self, mdp: MDP):
        self.many = Simulations(mdp, 1)
        self.observation_space = self.many.single_observation_space
        self.action_space = self.many.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        states, info = self.many.reset(seed=seed)
        return states[0], info

    def step(self, action):
        _, reward, ended, truncated, info = self.many.step([action])
        true = {"true_reward": float(info["true_reward"][0])}
        return info["final_obs"][0], float(reward[0]), bool(ended[0]), bool(truncated[0]), true


class Simulations(VectorEnv):
    """`number` copies, stepped together; one that ends begins again in the same step."""

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, mdp: MDP, number: int):
        size, actions = mdp.reward.shape
        self.num_envs, self.discount = number, mdp.discount
        self.single_observation_space = spaces.Discrete(size)
        self.single_action_space = spaces.Discrete(actions)
        self.observation_space = batch_space(self.single_observation_space, number)
        self.action_space = batch_space(self.single_action_space, number)
        # Drawn by inversion: the last entry is 1 whatever the rounding, so that no draw lies beyond.
        self.below, self.below_start = (_cumulative(t.numpy()) for t in (mdp.transitions, mdp.start))
        self.reward, self.true_reward = mdp.reward.numpy(), mdp.true_reward.numpy()
        self.states = np.zeros(number, np.int64)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.states = self._started()
        return self.states.copy(), {}

    def step(self, actions):
        """`info["final_obs"]`: the state that the step led to, also where a new episode has begun."""
        here, actions = self.states, np.asarray(actions)
        to = self._drawn(self.below[here, actions])
        ended = self.np_random.random(self.num_envs) >= self.discount
        self.states = np.where(ended, self._started(), to)
        info = {"true_reward": self.true_reward[here, actions], "final_obs": to, "_final_obs": ended}
        return self.states.copy(), self.reward[here, actions], ended, np.zeros_like(ended), info

    def _started(self) -> np.ndarray:
        return self._drawn(self.below_start)

    def _drawn(self, below: np.ndarray) -> np.ndarray:
        return (self.np_random.random((self.num_envs, 1)) >= below).sum(-1)


def _cumulative(chances: np.ndarray) -> np.ndarray:
    below = chances.cumsum(-1)
    below[..., -1] = 1.0
    return below
