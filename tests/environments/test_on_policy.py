"""The actor-critic loop: advantages by their definition, penalties by exact gradients, and that it learns."""

import pytest
import torch
from tests.environments.processes import Table, random_mdp, random_policy
from tests.worlds import close
from torch import nn

import fdiv

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.vector import AutoresetMode  # noqa: E402
from tests.environments.walks import rolled_out  # noqa: E402

from fdiv.environments.networks import OfState, OfStateAndAction, perceptron  # noqa: E402
from fdiv.environments.occupancy import Follower, OccupancyPenalty  # noqa: E402
from fdiv.environments.on_policy import PPO, ActionPenalty, Rollout  # noqa: E402
from fdiv.environments.simulation import Simulations  # noqa: E402
from fdiv.environments.tomatoes import Tomatoes  # noqa: E402
from fdiv.methods.rl.occupancy import OccupancyReward  # noqa: E402


def some_rollout(steps=7, number=3):
    generator = torch.Generator().manual_seed(0)
    observation, after = torch.randint(5, (2, steps, number), generator=generator)
    terminated, truncated = torch.rand(2, steps, number, generator=generator) < 0.2
    reward = torch.randn(steps, number, generator=generator)
    blank = torch.zeros(steps, number)
    return Rollout(observation, blank.long(), blank, reward, after, terminated, terminated | truncated)


def test_an_advantage_is_the_discounted_sum_of_surprises_until_the_episode_ends():
    rollout, critic = some_rollout(), Table(torch.randn(5, 1))
    method = PPO(discount=0.9, smoothing=0.7)
    advantage, returns = method.advantages(rollout, rollout.reward, critic)
    value, later = critic(rollout.observation)[..., 0], critic(rollout.after)[..., 0]
    surprise = rollout.reward + 0.9 * torch.where(rollout.terminated, 0.0, later) - value
    for step in range(7):
        for n in range(3):
            total, weight = 0.0, 1.0
            for then in range(step, 7):
                total += weight * surprise[then, n].item()
                weight *= 0.63
                if rollout.ended[then, n]:
                    break
            assert advantage[step, n].item() == pytest.approx(total, abs=1e-5)
    close(returns, (advantage + value).detach(), 1e-6)


def test_costs_of_later_states_and_the_loss_of_this_one_make_the_penaltys_exact_gradient():
    mdp, logits = random_mdp(), random_policy().log().requires_grad_()
    log_p = random_policy(seed=7).log()
    penalty = ActionPenalty(fdiv.JS(0.3), 0.7, lambda states: log_p[states])
    policy = logits.softmax(-1)
    occupancy = mdp.occupancy(policy)
    value = fdiv.JS(0.3)(log_p, logits.log_softmax(-1))
    (exact,) = torch.autograd.grad(0.7 * occupancy.sum(-1) @ value, logits, retain_graph=True)

    states = torch.arange(4)
    rollout = some_rollout()._replace(observation=states.unsqueeze(0))
    costs, numbers = penalty.costs(rollout, Table(logits.detach()))
    close(numbers["action_divergence"], value.mean().detach())
    later = torch.zeros(4, dtype=torch.float64)
    for _ in range(400):  # what a critic of the costs would say
        quality = costs[0].unsqueeze(-1) + 0.9 * mdp.transitions @ later
        later = (policy.detach() * quality).sum(-1)
    here = occupancy.detach()
    through_places = (here * quality * policy.log()).sum()
    own = here.sum(-1) @ penalty.loss(states, logits.log_softmax(-1))
    (made,) = torch.autograd.grad(through_places + own, logits)
    close(made, exact)


def garden():
    tables = Tomatoes().tables()
    return tables.mdp, tables.features, Tomatoes().gardener()


def test_without_a_penalty_it_finds_the_shed():
    mdp, features, reference = garden()
    torch.manual_seed(0)
    policy, critic = OfState(features, 5, reference.log(), 32), OfState(features, 1, width=32)
    before = (mdp.occupancy(reference) * mdp.reward).sum()
    close(policy.table().softmax(-1), reference, 1e-6)
    logged = PPO(lr=5e-3).train(Simulations(mdp, 64), policy, critic, 45, seed=0)
    q = mdp.occupancy(policy.table().softmax(-1))
    assert (q * mdp.reward).sum() > before + 0.1
    assert (q * mdp.true_reward).sum() < before - 0.1
    assert logged[-1]["reward"] > logged[0]["reward"] + 0.1


def test_one_seed_gives_one_run_and_a_heavy_penalty_keeps_the_reference():
    mdp, features, reference = garden()
    log_p = reference.log().float()
    policies = []
    for seed, beta in ((1, 0.0), (1, 0.0), (2, 0.0), (1, 100.0)):
        torch.manual_seed(0)
        policy, critic = OfState(features, 5, reference.log(), 16), OfState(features, 1, width=16)
        penalty = ActionPenalty(fdiv.ReverseKL(), beta, lambda states: log_p[states])
        PPO(steps=8).train(Simulations(mdp, 16), policy, critic, 3, seed, penalty)
        policies.append(policy.table().softmax(-1))
    one, again, other, kept = policies
    assert one.equal(again) and not one.equal(other)
    assert (kept - reference).abs().max() < 0.1 * (one - reference).abs().max()


def test_the_discriminators_chi_square_is_that_of_the_exact_occupancies():
    mdp, features, reference = garden()
    best = mdp.soft_optimal(mdp.true_reward, 0.05)
    policy = 0.5 * reference + 0.5 * best
    of_reference = rolled_out(mdp, reference, seed=0, steps=800)
    samples = of_reference.observation.flatten(), of_reference.action.flatten()
    rollout = rolled_out(mdp, policy, seed=1, steps=800)
    torch.manual_seed(0)
    follower = Follower(OfStateAndAction(features, 5), samples, seed=0, updates=300, batch=512)
    penalty = OccupancyPenalty(OccupancyReward(trim=0.0), 0.5, follower)
    costs, numbers = penalty.costs(rollout, nn.Identity())
    p, q = mdp.occupancy(reference), mdp.occupancy(policy)
    exact = fdiv.Neyman()(p.log().flatten(), q.log().flatten())
    assert numbers["chi_square"].item() == pytest.approx(exact.item(), rel=0.25)
    # and its prices are those that the exact ratio gives
    price = ((q / p) - 1)[rollout.observation, rollout.action] / exact.sqrt()
    assert torch.corrcoef(torch.stack([costs.flatten().double(), price.flatten()]))[0, 1] > 0.9
    assert costs.mean().item() == pytest.approx(0.5 * price.mean().item(), rel=0.15)
    assert penalty.loss(rollout.observation, torch.zeros(2, 5)) == 0


def test_it_trains_on_gymnasiums_own_environments_whose_episodes_are_cut_off():
    settings = {"autoreset_mode": AutoresetMode.SAME_STEP}
    envs = gymnasium.make_vec("CartPole-v1", 8, vectorization_mode="sync", vector_kwargs=settings)
    torch.manual_seed(0)
    policy, critic = perceptron(4, 2), perceptron(4, 1)
    method, ended = PPO(steps=64, discount=0.99, lr=5e-3), []

    class Count:
        def costs(self, rollout, policy):
            ended.append(rollout.ended.float().mean().item())
            assert rollout.after.isfinite().all()
            return torch.zeros(()), {}

        def loss(self, observation, log_q):
            return torch.zeros(())

    method.train(envs, policy, critic, 12, seed=0, penalty=Count())
    assert ended[-1] < 0.6 * ended[0]  # the pole stands longer


def test_an_environment_with_steps_that_are_none_is_refused():
    envs = gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync")
    with pytest.raises(ValueError, match=r"autoreset_mode=AutoresetMode\.SAME_STEP"):
        PPO().train(envs, nn.Linear(4, 2), nn.Linear(4, 1), 1, seed=0)
