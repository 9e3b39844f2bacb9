"""The warm-up fills the buffer with the frozen policy's steps, and the Q-ensemble learns a known world."""

import pytest
import torch
from tests.worlds import close

import fdiv

gymnasium = pytest.importorskip("gymnasium")

from tests.environments.walks import rolled_out  # noqa: E402

from fdiv.environments.networks import Ensemble, OfStateAndAction  # noqa: E402
from fdiv.environments.occupancy import Follower, occupancy_divergence  # noqa: E402
from fdiv.environments.off_policy import Learner, Steps, fine_tune, walked  # noqa: E402
from fdiv.environments.tabular import MDP  # noqa: E402
from fdiv.environments.tomatoes import Tomatoes  # noqa: E402
from fdiv.methods.rl.wsrl import WSRL  # noqa: E402

FEATURES = torch.eye(16)


def lake(slippery=False):
    return gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=slippery)


def world(env, discount=0.9):
    return MDP.of_table(env.unwrapped.P, FEATURES[0], discount)


def value(mdp, log_policy):
    policy = log_policy.detach().exp().double()
    return (mdp.occupancy(policy) * mdp.reward).sum().item() / (1 - mdp.discount)


def learner(method=None, seed=0):
    torch.manual_seed(seed)
    method = method or WSRL(members=3, discount=0.9, temperature=0.003)
    return Learner(method, Ensemble(FEATURES, 4, method.members), seed, lr=3e-3, polyak=0.05)


def test_a_table_of_gymnasium_gives_its_process_and_what_ended_stays_without_reward():
    mdp = world(lake(slippery=True))
    close(mdp.transitions.sum(-1), torch.ones(16, 4, dtype=torch.float64))
    assert mdp.transitions[15, :, 15].tolist() == [1.0] * 4 and not mdp.reward[15].any()
    close(mdp.reward[14, 2], torch.tensor(1 / 3, dtype=torch.float64))  # right, where one slips
    shortest = value(world(lake()), world(lake()).soft_optimal(world(lake()).reward, 1e-4).log())
    assert shortest == pytest.approx(0.9**5)  # six steps to the goal
    for state in (5, 7, 11, 12):  # the holes
        assert mdp.transitions[state, :, state].tolist() == [1.0] * 4


def test_offline_the_ensemble_finds_the_shortest_way():
    env, made = lake(), learner()
    mdp = world(env)
    anything = torch.full((16, 4), 0.25).log()
    data = walked(env, lambda states: anything[states], 4000, seed=0)
    assert data.reward.sum() > 5  # the goal was met
    for _ in range(500):
        made.learn(data)
    assert value(mdp, made.log_policy(torch.arange(16))) > 0.95 * 0.9**5


def test_during_the_warm_up_the_frozen_policy_walks_and_nothing_is_learned():
    env, method = lake(), WSRL(warmup=200, updates=1, members=3, discount=0.9)
    made = learner(method)
    before = made.log_policy(torch.arange(16)).detach()
    seen, buffer = fine_tune(env, made, 250, 5, lambda: made.log_policy(torch.arange(16)).detach(), 50)
    for measured in seen[:4]:
        assert measured.equal(before)
    assert not seen[4].equal(before)
    frozen = walked(env, lambda states: before[states], 200, seed=5)
    for ours, theirs in zip(buffer.rows(slice(0, 200)), frozen, strict=True):
        assert ours.equal(theirs)


def test_steps_follow_one_another_and_begin_again_where_an_episode_ended():
    env = lake(slippery=True)
    anything = torch.full((16, 4), 0.25).log()
    steps = walked(env, lambda states: anything[states], 500, seed=1)
    mdp = world(env)
    assert steps.terminated.sum() > 20
    goes_on = ~steps.terminated[:-1]
    assert steps.observation[1:][goes_on].equal(steps.after[:-1][goes_on])
    assert not steps.observation[1:][~goes_on].any()
    assert (mdp.transitions[steps.observation, steps.action, steps.after] > 0).all()
    assert steps.reward.equal((steps.after == 15).float())
    assert isinstance(steps.rows(slice(0, 3)), Steps)


@pytest.mark.parametrize("tilt", [0.0, 0.7])
def test_the_shift_between_two_policies_states_is_bounded_by_what_a_discriminator_sees(tilt):
    tables = Tomatoes().tables()
    mdp, reference = tables.mdp, Tomatoes().gardener()
    other = (1 - tilt) * reference + tilt * mdp.soft_optimal(mdp.reward, 0.01)
    old, new = (rolled_out(mdp, policy, seed, steps=200) for seed, policy in enumerate((reference, other)))
    torch.manual_seed(0)
    samples = (old.observation.flatten(), old.action.flatten())
    follower = Follower(OfStateAndAction(tables.features, 5), samples, seed=0)
    new = (new.observation.flatten(), new.action.flatten())
    seen = occupancy_divergence(fdiv.JS(0.5), follower, *new)
    p, q = (mdp.occupancy(policy).log().flatten() for policy in (reference, other))
    exact = fdiv.JS(0.5)(p, q).item()
    assert seen == pytest.approx(exact, abs=0.03 if tilt == 0 else 0.25 * exact)
