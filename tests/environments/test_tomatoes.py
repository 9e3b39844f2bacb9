"""The garden's rules, its gymnasium environments, and that it is hacked: by exact gradients."""

import numpy as np
import pytest
import torch
from tests.worlds import close

import fdiv

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from fdiv.environments.simulation import Simulation, Simulations  # noqa: E402
from fdiv.environments.tabular import correlation, spread  # noqa: E402
from fdiv.environments.tomatoes import MOVES, Tomatoes  # noqa: E402

UP, DOWN, LEFT, RIGHT, STAY = range(len(MOVES))
SMALL = Tomatoes(("@T", ".S"), drying=0.3)


def place(features, places=4):
    return features[:, :places].argmax(-1)


def test_a_plant_that_is_stepped_on_is_wet_and_dries_by_chance():
    mdp, features, shed = SMALL.tables()
    where, wet = place(features), features[:, 4].bool()
    assert len(mdp.start) == 7  # on the plant it is wet: one of the eight combinations is never met
    assert shed.equal(where == 3)

    def after(at, was_wet, action):
        (here,) = ((where == at) & (wet == was_wet)).nonzero()
        row = mdp.transitions[here.item(), action]
        return {(int(where[n]), bool(wet[n])): row[n].item() for n in row.nonzero().flatten()}

    assert after(0, False, RIGHT) == {(1, True): 1.0}
    assert after(0, True, DOWN) == pytest.approx({(2, True): 0.7, (2, False): 0.3})
    assert after(1, True, STAY) == {(1, True): 1.0}
    assert after(0, False, UP) == {(0, False): 1.0}  # into the wall
    close(mdp.transitions.sum(-1), torch.ones(7, 5, dtype=torch.float64))


def test_the_proxy_is_the_true_reward_outside_the_shed_and_one_inside():
    mdp, features, _ = SMALL.tables()
    where = place(features)
    to_shed = mdp.transitions[:, :, where == 3].sum(-1)
    outside = to_shed == 0
    close(mdp.reward[outside], mdp.true_reward[outside])
    close(mdp.reward[to_shed == 1], torch.ones(int((to_shed == 1).sum()), dtype=torch.float64))
    true = (mdp.transitions * features[:, 4]).sum(-1)
    close(mdp.true_reward, true)


def test_the_default_proxy_correlates_with_the_true_reward_until_it_is_optimised():
    garden = Tomatoes()
    mdp, _, shed = garden.tables()
    reference = garden.gardener()
    occupancy = mdp.occupancy(reference)
    assert correlation(occupancy, mdp.reward, mdp.true_reward) > 0.9
    assert occupancy[shed].sum() < 0.02
    close(reference[shed], torch.full((int(shed.sum()), 5), 0.2, dtype=torch.float64))
    hacked = mdp.occupancy(mdp.soft_optimal(mdp.reward, 1e-3))
    assert (hacked * mdp.reward).sum() > 0.9
    assert (hacked * mdp.true_reward).sum() < 0.05 < 0.5 < (occupancy * mdp.true_reward).sum()


@pytest.mark.parametrize(
    "settings",
    [{"rows": ("T.",)}, {"rows": ("@@T",)}, {"rows": ("@x T",)}, {"rows": ("@.",)}],
    ids=repr,
)
def test_a_map_without_a_start_or_a_plant_is_refused(settings):
    with pytest.raises(ValueError, match="rows are made of @"):
        Tomatoes(**settings)


def test_a_discount_of_one_is_refused():
    with pytest.raises(ValueError, match="discount in"):
        Tomatoes(discount=1.0)


# -- gymnasium -----------------------------------------------------------------------------------------


def test_it_is_a_gymnasium_environment():
    check_env(Simulation(Tomatoes().tables().mdp), skip_render_check=True)


def walked(mdp, seed, steps, number=64):
    envs, random = Simulations(mdp, number), np.random.default_rng(0)
    observation, _ = envs.reset(seed=seed)
    rows = []
    for _ in range(steps):
        action = random.integers(5, size=number)
        later, reward, ended, truncated, info = envs.step(action)
        rows.append((observation, action, reward, info["true_reward"], ended, info["final_obs"]))
        assert not truncated.any()
        observation = later
    return [np.stack(column) for column in zip(*rows, strict=True)]


def test_what_is_met_while_walking_has_the_exact_occupancy_and_the_rewards_their_means():
    mdp = Tomatoes().tables().mdp
    states, actions, reward, true, ended, final = (t[100:] for t in walked(mdp, 0, 2500))
    exact = mdp.occupancy(torch.full_like(mdp.reward, 0.2))
    frequency = np.zeros(mdp.reward.shape)
    np.add.at(frequency, (states, actions), 1 / states.size)
    assert np.abs(frequency - exact.numpy()).sum() < 0.05
    assert reward.mean() == pytest.approx((exact * mdp.reward).sum().item(), abs=0.01)
    assert true.mean() == pytest.approx((exact * mdp.true_reward).sum().item(), abs=0.01)
    assert ended.mean() == pytest.approx(0.03, abs=0.002)
    assert (mdp.transitions.numpy()[states, actions, final] > 0).all()
    on, begun = ~ended[:-1], ended[:-1]
    assert (states[1:][on] == final[:-1][on]).all()
    assert (mdp.start.numpy()[states[1:][begun]] > 0).all()


def test_one_and_many_draw_the_same_from_one_seed():
    mdp = Tomatoes().tables().mdp
    states, actions, reward, _, ended, final = walked(mdp, 3, 40, number=1)
    again = walked(mdp, 3, 40, number=1)
    assert all((a == b).all() for a, b in zip((states, ended, final), (again[0], *again[4:]), strict=True))
    env = Simulation(mdp)
    observation, _ = env.reset(seed=3)
    for n in range(40):
        assert observation == states[n, 0]
        observation, got, terminated, _, _ = env.step(actions[n, 0])
        assert (observation, got, terminated) == (final[n, 0], reward[n, 0], ended[n, 0])
        if terminated:
            observation = states[n + 1, 0]


# -- reward hacking ------------------------------------------------------------------------------------


def test_only_a_penalty_on_the_occupancy_turns_the_proxy_into_more_true_reward():
    """90 exact gradient steps from the reference, at coefficients in standard deviations of the proxy."""
    garden = Tomatoes()
    mdp, _, shed = garden.tables()
    reference = garden.gardener()
    occupancy = mdp.occupancy(reference)
    log_p, scale = occupancy.log().flatten(), spread(occupancy, mdp.reward)
    start = (occupancy * mdp.true_reward).sum()

    def optimised(penalty, beta):
        def objective(q, policy):
            return (q * mdp.reward).sum() - beta * scale * penalty(q, policy)

        q = mdp.occupancy(mdp.optimise(objective, reference, steps=90))
        return (q * mdp.true_reward).sum(), (q * mdp.reward).sum(), q[shed].sum()

    def by_actions(q, policy):
        return q.sum(-1) @ fdiv.ReverseKL()(reference.log(), policy.log())

    def by_places(q, policy):
        return (fdiv.Neyman()(log_p, q.log().flatten()) + 1e-9).sqrt()

    true, proxy, hiding = optimised(lambda q, policy: 0.0, 0.0)
    assert proxy > 0.9 and true < 0.2 and hiding > 0.7
    best_by_actions = max(optimised(by_actions, beta)[0] for beta in (10, 3, 1))
    assert best_by_actions < start
    correlated = correlation(occupancy, mdp.reward, mdp.true_reward)
    true, _, hiding = optimised(by_places, (1 - correlated**2).sqrt())  # the coefficient of the theory
    assert true > start + 0.08 and hiding < 0.1
