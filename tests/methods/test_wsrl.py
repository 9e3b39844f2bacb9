"""WSRL: the rule, and its losses against the definitions."""

import pytest
import torch
from tests.worlds import close

from fdiv.methods.rl.wsrl import WSRL


def some(members=5, rows=4, actions=3, seed=0):
    return torch.randn(
        members, rows, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_nothing_is_learned_until_the_warm_up_is_over():
    method = WSRL(warmup=3, updates=4)
    assert [method.updates_after(step) for step in range(1, 6)] == [0, 0, 0, 4, 4]
    assert WSRL(warmup=0).updates_after(1) == 4


def test_the_defaults_are_the_papers():
    method = WSRL()
    assert (method.warmup, method.updates, method.members, method.subset) == (5000, 4, 10, 2)


def test_the_policy_is_soft_optimal_for_the_mean_of_the_members():
    method, quality = WSRL(temperature=0.5), some()
    chances = (quality.mean(0) / 0.5).exp()
    close(method.log_policy(quality).exp(), chances / chances.sum(-1, keepdim=True))


def test_the_target_is_soft_and_takes_the_smallest_of_two_members():
    method = WSRL(members=5, discount=0.9, temperature=0.3)
    quality, log_policy = some(), some(1, seed=1)[0].log_softmax(-1)
    reward = torch.tensor([1.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    terminated = torch.tensor([False, False, False, True])
    possible = []
    for i in range(5):
        for j in range(i):
            soft = torch.minimum(quality[i], quality[j]) - 0.3 * log_policy
            value = (log_policy.exp() * soft).sum(-1)
            value[3] = 0.0
            possible.append(reward + 0.9 * value)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        target = method.target(reward, terminated, quality, log_policy, generator)
        distance = [(target - one).abs().max().item() for one in possible]
        assert min(distance) < 1e-12
        seen.add(distance.index(min(distance)))
    assert len(seen) == len(possible)  # each pair is drawn now and then
    whole = WSRL(members=5, subset=5, discount=0.9, temperature=0.3)
    soft = quality.amin(0) - 0.3 * log_policy
    expected = (reward + 0.9 * (log_policy.exp() * soft).sum(-1) * ~terminated).double()
    close(whole.target(reward, terminated, quality, log_policy), expected)


def test_every_member_is_drawn_to_the_one_target_which_has_no_gradient():
    method, quality = WSRL(members=5), some().requires_grad_()
    action, target = torch.tensor([0, 2, 1, 1]), some(1, seed=2)[0, :, 0].requires_grad_()
    reached = method.target(target, torch.ones(4).bool(), quality, quality[0])
    loss = method.loss(quality, action, reached)
    loss.backward()
    wrong = quality.detach()[:, torch.arange(4), action] - target.detach()
    close(loss.detach(), wrong.square().mean())
    assert target.grad is None
    moved = torch.zeros_like(quality)
    moved[:, torch.arange(4), action] = 2 * wrong / 20
    close(quality.grad, moved)


def test_conservatism_lowers_what_the_data_did_not_do_and_raises_what_it_did():
    method, quality = WSRL(members=5, temperature=0.7), some().requires_grad_()
    action = torch.tensor([0, 2, 1, 1])
    value = method.conservative(quality, action)
    (slope,) = torch.autograd.grad(value, quality)
    chances = (quality / 0.7).softmax(-1)
    chances[:, torch.arange(4), action] -= 1.0
    close(slope, chances / 20)
    assert value > 0


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"warmup": -1}, "warmup >= 0"),
        ({"updates": 0}, "updates >= 1"),
        ({"subset": 11}, "subset <= members"),
        ({"discount": 0.0}, "discount is in"),
        ({"temperature": 0.0}, "temperature > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            WSRL(**settings)
