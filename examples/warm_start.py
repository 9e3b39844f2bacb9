"""Fine-tuning online what offline RL has trained, with and without a warm-up (WSRL): a table.

python examples/warm_start.py        about 2 minutes on one thread, no downloads

gymnasium's FrozenLake-v1, 4x4 and slippery. Pretraining is conservative Q-learning on 5000 steps of a policy
that is right 85 times in 100. The numbers are the discounted chance of reaching the goal, exactly.
"""

from copy import deepcopy

import gymnasium
import torch

import fdiv
from fdiv.environments.networks import Ensemble, OfStateAndAction
from fdiv.environments.occupancy import Follower, occupancy_divergence
from fdiv.environments.off_policy import Learner, fine_tune, walked
from fdiv.environments.tabular import MDP
from fdiv.evaluate.intervals import student_interval
from fdiv.methods.rl.wsrl import WSRL

SEEDS, WARMUPS, LEARNING, EVERY, LR = (0, 1, 2), (0, 400, 2000), 500, 50, 3e-4
PRETRAINING, DATA, CONSERVATIVE, SAMPLES = 3000, 5000, 1.0, 4000
LAKE = gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=True)
FEATURES = torch.eye(16)
STATES = torch.arange(16)
WORLD = MDP.of_table(LAKE.unwrapped.P, FEATURES[0], discount=0.99)


def main():
    torch.set_num_threads(1)
    runs = {warmup: [] for warmup in WARMUPS}
    for seed in SEEDS:
        learner = pretrained(WSRL(warmup=0), seed)
        for warmup, those in runs.items():
            those.append(run(learner, warmup, seed))
    print(f"the {LEARNING} steps after a warm-up of so many; mean ± 95% interval over {len(SEEDS)} seeds")
    print(f"{'':<14}" + "".join(f"{warmup:>8}{'':7}" for warmup in WARMUPS))
    for name in ("pretrained", "lowest", "mean", "last", "JS from then"):
        cells = [student_interval([one[name] for one in those]) for those in runs.values()]
        print(f"{name:<14}" + "".join(f"{cell.mean:>8.3f} ± {cell.half:.2f}" for cell in cells))
    for n in range(1, LEARNING // EVERY, 2):
        means = [sum(one["curve"][n] for one in those) / len(those) for those in runs.values()]
        print(f"step {(n + 1) * EVERY:<9}" + "".join(f"{mean:>8.3f}       " for mean in means))
    lowest = [sum(one["lowest"] for one in those) for those in runs.values()]
    assert lowest[0] < lowest[-1], "without a warm-up it should forget more"


def run(before, warmup, seed):
    """What `before`, a pretrained learner, becomes after this warm-up; it is left as it is."""
    learner = renewed(before, WSRL(warmup=warmup), seed)
    steps = warmup + LEARNING
    curve, _ = fine_tune(LAKE, learner, steps, 100 + seed, lambda: value(learner), EVERY)
    curve = curve[warmup // EVERY :]
    return {
        "pretrained": value(before),
        "lowest": min(curve),
        "mean": sum(curve) / len(curve),
        "last": curve[-1],
        "curve": curve,
        "JS from then": how_far(before, learner, seed),
    }


def how_far(before, after, seed):
    """JS between the occupancies of two policies, by a discriminator of their steps; at most log 2."""
    old, new = (
        walked(LAKE, learner.frozen(), SAMPLES, 200 + n + seed) for n, learner in ((0, before), (50, after))
    )
    torch.manual_seed(seed)
    follower = Follower(OfStateAndAction(FEATURES, 4), (old.observation, old.action), seed)
    return occupancy_divergence(fdiv.JS(0.5), follower, new.observation, new.action)


def pretrained(method, seed):
    best = WORLD.soft_optimal(WORLD.reward, 1e-3)
    behaviour = (0.85 * best + 0.15 / 4).log().float()
    data = walked(LAKE, lambda states: behaviour[states], DATA, seed)
    torch.manual_seed(seed)
    learner = Learner(method, Ensemble(FEATURES, 4, method.members), seed)
    for _ in range(PRETRAINING):
        learner.learn(data, CONSERVATIVE)
    return learner


def renewed(learner, method, seed):
    """The same networks, copied, under an optimiser that remembers nothing."""
    fresh = Learner(method, deepcopy(learner.network), seed, lr=LR)
    fresh.slow.load_state_dict(learner.slow.state_dict())
    return fresh


@torch.no_grad()
def value(learner):
    policy = learner.log_policy(STATES).exp().double()
    return (WORLD.occupancy(policy) * WORLD.reward).sum().item() / (1 - WORLD.discount)


if __name__ == "__main__":
    main()
