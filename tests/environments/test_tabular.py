"""Occupancies and gradients of small decision processes, against sums over time and finite differences."""

import pytest
import torch
from tests.environments.processes import random_mdp, random_policy
from tests.worlds import close

from fdiv.environments.tabular import correlation, spread


def test_the_occupancy_is_the_discounted_sum_over_time():
    mdp, policy = random_mdp(), random_policy()
    here, total = mdp.start, torch.zeros(4, 3, dtype=torch.float64)
    for step in range(400):
        total += 0.1 * 0.9**step * here.unsqueeze(-1) * policy
        here = torch.einsum("s,sa,sat->t", here, policy, mdp.transitions)
    close(mdp.occupancy(policy), total, 1e-12)
    close(total.sum(), torch.ones((), dtype=torch.float64), 1e-12)


def test_the_gradient_of_a_return_is_the_policy_gradient_theorems():
    mdp, logits = random_mdp(), random_policy().log().requires_grad_()
    policy = logits.softmax(-1)
    occupancy = mdp.occupancy(policy)
    (exact,) = torch.autograd.grad((occupancy * mdp.reward).sum(), logits)
    value = torch.zeros(4, dtype=torch.float64)
    for _ in range(400):
        quality = mdp.reward + 0.9 * mdp.transitions @ value
        value = (policy.detach() * quality).sum(-1)
    close(exact, (occupancy * (quality - value.unsqueeze(-1))).detach())


def test_the_soft_optimal_policy_beats_all_others_by_its_own_measure_and_the_cold_one_by_return():
    mdp = random_mdp()

    def measure(policy):
        entropy = -torch.special.xlogy(policy, policy).sum(-1)
        occupancy = mdp.occupancy(policy)
        return (occupancy * mdp.reward).sum() + 0.3 * (occupancy.sum(-1) * entropy).sum()

    best = mdp.soft_optimal(mdp.reward, 0.3)
    logits = best.log().requires_grad_()
    (slope,) = torch.autograd.grad(measure(logits.softmax(-1)), logits)
    assert slope.abs().max() < 1e-10
    assert all(measure(best) > measure(random_policy(seed=seed)) for seed in range(20))
    cold = (mdp.occupancy(mdp.soft_optimal(mdp.reward, 1e-4)) * mdp.reward).sum()
    pure = torch.cartesian_prod(*[torch.arange(3)] * 4)  # all 81 policies without chance
    returns = [(mdp.occupancy(torch.eye(3).double()[each]) * mdp.reward).sum() for each in pure]
    close(cold, max(returns))


def test_the_exact_gradient_finds_it_too():
    mdp = random_mdp()
    found = mdp.optimise(
        lambda occupancy, policy: (occupancy * mdp.reward).sum() - 0.3 * (occupancy * policy.log()).sum(),
        random_policy(),
        steps=400,
    )
    close(found, mdp.soft_optimal(mdp.reward, 0.3), 2e-3)


def test_only_states_that_some_policy_reaches_are_kept():
    mdp = random_mdp()
    start = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    transitions = torch.zeros(4, 3, 4, dtype=torch.float64)
    transitions[[0, 1, 2, 3], :, [2, 0, 2, 1]] = 1.0  # 0 -> 2 -> 2; 3 -> 1 -> 0
    closed = mdp._replace(start=start, transitions=transitions)
    assert closed.reachable().tolist() == [True, False, True, False]
    less, policy = closed.restricted(closed.reachable()), random_policy()
    close(less.occupancy(policy[[0, 2]]), closed.occupancy(policy)[[0, 2]])


def test_spread_and_correlation_are_weighted_by_the_occupancy():
    occupancy = torch.tensor([[0.5, 0.25], [0.25, 0.0]], dtype=torch.float64)
    one = torch.tensor([[0.0, 0.0], [4.0, 99.0]], dtype=torch.float64)
    close(spread(occupancy, one), torch.tensor(3.0, dtype=torch.float64).sqrt())
    drawn = torch.tensor([[0.0, 0.0, 0.0, 4.0], [1.0, 1.0, 5.0, 7.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 5.0], [7.0, -1.0]], dtype=torch.float64)
    close(correlation(occupancy, one, other), torch.corrcoef(drawn)[0, 1])
    assert correlation(occupancy, one, -2 * one) == pytest.approx(-1)
