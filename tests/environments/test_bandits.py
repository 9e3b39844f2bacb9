"""Bandits and the algorithms that play them, against closed forms."""

import math
from functools import partial

import pytest
import torch

from fdiv.environments.bandits import (
    Bandits,
    BetaThompson,
    Explored,
    GaussianThompson,
    History,
    LinUCB,
    play,
    uniform,
)

torch.set_num_threads(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def seen(arms, actions, rewards):
    """One history on unit arms."""
    return History(torch.eye(arms).expand(1, -1, -1), torch.tensor([actions]).long(), torch.tensor([rewards]))


# -- worlds --------------------------------------------------------------------------------------------


def test_rewards_have_the_means_of_their_arms():
    bernoulli, linear = Bandits.bernoulli(3, 4, seeded()), Bandits.linear(3, 4, 2, 0.5, seeded())
    torch.testing.assert_close(bernoulli.means, bernoulli.theta)
    assert torch.allclose(linear.arms.norm(dim=-1), torch.ones(3, 4))
    for bandits in (bernoulli, linear):
        actions = torch.tensor([0, 3, 2])
        draws = torch.stack([bandits.pull(actions, seeded(i)) for i in range(4000)])
        expected = bandits.means[torch.arange(3), actions]
        assert (draws.mean(0) - expected).abs().max() < 0.04
    assert abs(draws.std(0).mean() - 0.5) < 0.02


def test_a_play_is_repeated_by_its_seed_and_counts_its_regret():
    bandits = Bandits.bernoulli(5, 3, seeded())
    first, second = (play(bandits, uniform, 6, seeded(1)) for _ in range(2))
    assert torch.equal(first.history.actions, second.history.actions)
    assert first.history.actions.shape == (5, 6) and first.log_context.shape == (5, 6, 3)
    best = bandits.means.amax(-1, keepdim=True)
    torch.testing.assert_close(first.regret, best - bandits.means.gather(-1, first.history.actions))
    assert (first.history.rewards * (1 - first.history.rewards) == 0).all()
    judged = first.judged_by(BetaThompson())
    torch.testing.assert_close(judged[:, 4], BetaThompson()(first.history.until(4)))


def test_experts_beat_chance_on_their_worlds():
    bernoulli = Bandits.bernoulli(60, 4, seeded())
    linear = Bandits.linear(60, 6, 2, 0.3, seeded())
    for bandits, experts in (
        (bernoulli, (BetaThompson(), LinUCB(0.5))),
        (linear, (LinUCB(), GaussianThompson(0.3, seeded(3)))),
    ):
        by_chance = play(bandits, uniform, 40, seeded(1)).regret.sum(-1).mean()
        for expert in experts:
            assert play(bandits, expert, 40, seeded(2)).regret.sum(-1).mean() < 0.5 * by_chance


# -- Thompson sampling ---------------------------------------------------------------------------------


def better(a, b, c, d):
    """P(X > Y) of X ~ Beta(a, b), Y ~ Beta(c, d) for whole numbers."""
    log_beta = lambda x, y: math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)  # noqa: E731
    return sum(
        math.exp(log_beta(c + i, b + d) - math.log(b + i) - log_beta(1 + i, b) - log_beta(c, d))
        for i in range(a)
    )


@pytest.mark.parametrize(
    ("won", "lost"), [((0, 0), (0, 0)), ((1, 0), (0, 0)), ((3, 1), (2, 4)), ((9, 9), (1, 9))]
)
def test_two_arms_are_chosen_with_the_closed_chances(won, lost):
    actions = [0] * (won[0] + lost[0]) + [1] * (won[1] + lost[1])
    rewards = [1.0] * won[0] + [0.0] * lost[0] + [1.0] * won[1] + [0.0] * lost[1]
    chances = BetaThompson()(seen(2, actions, rewards)).exp()[0]
    exact = 1 - better(won[1] + 1, lost[1] + 1, won[0] + 1, lost[0] + 1)
    assert chances[0].item() == pytest.approx(exact, abs=1e-4)


def test_arms_that_were_not_pulled_are_alike_and_chances_sum_to_one():
    chances = BetaThompson()(seen(4, [2, 2, 2], [1.0, 1.0, 1.0])).exp()[0]
    assert chances.sum().item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(chances[[0, 1]], chances[[1, 3]])
    # The best of three uniform means is below x with chance x^3; the fourth has density 4 x^3.
    assert chances[2].item() == pytest.approx(4 / 7, abs=1e-4)


def test_gaussian_chances_are_those_of_the_posterior():
    """One arm of theta against one of -theta: the first is best if theta > 0."""
    arms = torch.tensor([[[1.0], [-1.0]]])
    history = History(arms, torch.tensor([[0, 0, 1]]), torch.tensor([[0.4, 0.1, -0.2]]))
    deviation = 0.8
    precision = 1 + 3 / deviation**2
    mean = (0.4 + 0.1 + 0.2) / deviation**2 / precision
    exact = 0.5 * (1 + math.erf(mean * math.sqrt(precision / 2)))
    chances = GaussianThompson(deviation, seeded(), draws=40_000)(history).exp()[0]
    assert chances[0].item() == pytest.approx(exact, abs=0.01)


# -- LinUCB --------------------------------------------------------------------------------------------


def test_on_unit_arms_linucb_is_the_bound_of_each_arm():
    history = seen(3, [0, 0, 1], [1.0, 0.0, 1.0])
    # estimate sum/(n + 1), deviation 1/sqrt(n + 1)
    bounds = lambda width: [1 / 3 + width / 3**0.5, 1 / 2 + width / 2**0.5, width]  # noqa: E731
    for width in (0.0, 0.5, 5.0):
        best = max(range(3), key=bounds(width).__getitem__)
        assert LinUCB(width)(history).exp()[0].argmax().item() == best


def test_ties_are_shared():
    assert torch.allclose(LinUCB()(seen(3, [], [])).exp(), torch.full((1, 3), 1 / 3))
    torch.testing.assert_close(LinUCB()(seen(3, [1], [-9.0])).exp()[0], torch.tensor([0.5, 0.0, 0.5]))


def test_explored_algorithms_keep_every_arm_possible():
    history = seen(4, [1], [-9.0])
    chances = Explored(LinUCB(), 0.2)(history).exp()[0]
    torch.testing.assert_close(chances, 0.8 * torch.tensor([1, 0, 1, 1]) / 3 + 0.05)
    torch.testing.assert_close(Explored(LinUCB(), 1.0)(history), uniform(history))
    for epsilon in (0.0, 1.5):
        with pytest.raises(ValueError, match="epsilon is a chance"):
            Explored(partial(uniform), epsilon)
