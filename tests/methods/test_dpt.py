"""DPT: what each divergence learns from experts that differ, and how algorithms cover one another."""

import math
from itertools import product

import pytest
import torch
from tests.worlds import close, each_other_object, gradient, random_rows

from fdiv import JS, KL, TV, Alpha, Exact, MonteCarlo, Neyman, Pearson, Renyi, ReverseKL, SquaredHellinger
from fdiv.environments.bandits import Bandits, BetaThompson, Explored, LinUCB, play, uniform
from fdiv.methods.rl.dpt import DPT, coverage, of_actions

ACTIONS = 4
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # of three experts behind one history
EXPERTS = torch.tensor(
    [[0.7, 0.1, 0.15, 0.05], [0.2, 0.5, 0.2, 0.1], [0.05, 0.15, 0.2, 0.6]], dtype=torch.float64
)
MEAN = WEIGHTS @ EXPERTS


def learnt(divergence, log_p, weights):
    """The action distribution of least mean divergence from rows of log_p, each as often as weighted."""
    logits = torch.zeros(ACTIONS, dtype=torch.float64, requires_grad=True)
    times = (weights * 1000).round().long()
    log_p = log_p.repeat_interleave(times, 0)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        log_q = logits.log_softmax(-1).expand(len(log_p), -1)
        loss = DPT(divergence)(log_p=log_p, log_q=log_q).loss
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().softmax(-1)


def normalised(x):
    return x / x.sum(-1, keepdim=True)


# -- what is learnt ------------------------------------------------------------------------------------


def test_kl_learns_the_mean_of_the_experts():
    close(learnt(KL(), EXPERTS.log(), WEIGHTS), MEAN, 1e-6)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.5, 2.0, -1.0])
def test_alpha_learns_a_power_mean(alpha):
    expected = normalised((WEIGHTS @ EXPERTS**alpha) ** (1 / alpha))
    close(learnt(Alpha(alpha), EXPERTS.log(), WEIGHTS), expected, 1e-6)


def test_the_named_members_learn_theirs():
    for divergence, expected in (
        (Pearson(), (WEIGHTS @ EXPERTS.square()).sqrt()),
        (SquaredHellinger(), (WEIGHTS @ EXPERTS.sqrt()).square()),
        (ReverseKL(), (WEIGHTS @ EXPERTS.log()).exp()),  # the geometric mean
        (Neyman(), 1 / (WEIGHTS @ (1 / EXPERTS))),  # the harmonic mean
    ):
        close(learnt(divergence, EXPERTS.log(), WEIGHTS), normalised(expected), 1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_from_actions_alone_alpha_learns_the_mean_at_another_temperature(alpha):
    """Rows are the actions that experts took, in proportion to their mean distribution."""
    chances = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    actions = of_actions(torch.arange(ACTIONS), ACTIONS).double()
    close(learnt(Alpha(alpha), actions, chances), normalised(chances ** (1 / alpha)), 1e-6)


def test_one_expert_is_learnt_under_any_divergence():
    for divergence in (KL(), ReverseKL(), JS(0.3), Pearson(), 0.5 * KL() + 0.5 * SquaredHellinger()):
        close(learnt(divergence, EXPERTS[:1].log(), torch.ones(1)), EXPERTS[0], 1e-6)


# -- the loss ------------------------------------------------------------------------------------------


def test_with_actions_kl_is_their_cross_entropy():
    actions = torch.tensor([[0, 3, 1], [2, 2, 0]])
    logits = random_rows(6, ACTIONS).view(2, 3, ACTIONS).requires_grad_()
    out = DPT()(log_p=of_actions(actions, ACTIONS).double(), log_q=logits.log_softmax(-1))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), actions.flatten())
    close(out.loss, expected)
    close(gradient(out.loss, logits), gradient(expected, logits))


def test_masked_steps_do_not_count_and_the_global_batch_does():
    log_p, log_q = random_rows(6, ACTIONS).view(2, 3, -1), random_rows(6, ACTIONS, seed=1).view(2, 3, -1)
    log_p[1, 2] = math.nan
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rows = JS(0.5)(log_p, log_q)
    out = DPT(JS(0.5))(log_p=log_p, log_q=log_q, mask=mask, count=12)
    close(out.loss, rows[mask].sum() / 12)
    close(out.metrics["divergence"], rows[mask].mean())
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    close(out.metrics["agreement"], agree[mask].mean())
    none = DPT()(log_p=log_p, log_q=log_q, mask=torch.zeros_like(mask))
    assert none.loss == 0


@pytest.mark.parametrize(
    ("divergence", "size"),
    # At 1e4 the chi-square itself, e^10000, is beyond any float.
    [(KL(), 1e4), (JS(0.5), 1e4), (TV(), 1e4), (SquaredHellinger(), 1e4), (Pearson(), 40.0)],
    ids=repr,
)
def test_extreme_models_have_finite_losses_and_gradients(divergence, size):
    logits = torch.tensor([[size, -size, 0.0, 0.0], [0.0, 30.0, -30.0, 0.0]], requires_grad=True)
    out = DPT(divergence)(log_p=random_rows(2, ACTIONS).float(), log_q=logits.log_softmax(-1))
    assert out.loss.isfinite()
    assert gradient(out.loss, logits).isfinite().all()


@pytest.mark.parametrize("divergence", [ReverseKL(), Neyman()], ids=repr)
def test_an_infinite_price_of_what_the_expert_never_does_is_refused(divergence):
    with pytest.raises(ValueError, match="the expert never takes"):
        DPT(divergence)(log_p=of_actions(torch.tensor([1]), ACTIONS), log_q=random_rows(1, ACTIONS))


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="DPT takes an f-divergence"):
        DPT(other)


def test_wrong_evidence_is_refused():
    with pytest.raises(TypeError, match=r"write Exact\(\)"):
        DPT(KL(), MonteCarlo())
    with pytest.raises(TypeError, match="reads log_p, log_q"):
        DPT()(log_p=torch.zeros(1, 2))
    assert DPT(KL(), Exact()) == DPT()


# -- coverage ------------------------------------------------------------------------------------------


def all_trajectories(expert):
    """Two steps of two arms, all equally likely under `uniform` and fair rewards: [16] of each."""
    actions = torch.tensor([[a, b] for a, _, b, _ in product(range(2), repeat=4)])
    rewards = torch.tensor([[r, s] for _, r, _, s in product(range(2), repeat=4)])
    steps = torch.stack([expert[0].expand(16, 2), expert[1][actions[:, 0], rewards[:, 0]]], 1)
    return actions, steps.log(), torch.full((16, 2, 2), math.log(0.5), dtype=torch.float64)


FIRST = torch.tensor([0.6, 0.4], dtype=torch.float64)
SECOND = torch.tensor([[[0.2, 0.8], [0.9, 0.1]], [[0.5, 0.5], [0.3, 0.7]]], dtype=torch.float64)


def test_the_ratio_is_one_plus_the_chi_square_of_whole_trajectories():
    actions, log_expert, log_context = all_trajectories((FIRST, SECOND))
    found = coverage(log_expert, log_context, actions)

    def joint(log_steps):
        return log_steps.gather(-1, actions.unsqueeze(-1)).sum((1, 2)) + math.log(0.25)

    close(found.log_ratio.exp(), 1 + Pearson()(joint(log_expert), joint(log_context)))
    close(found.log_ratio, Renyi(2.0)(joint(log_expert), joint(log_context)))
    # The mean of the ratio under the expert is the same number.
    ratio = (joint(log_expert) - joint(log_context)).exp()
    close(found.log_ratio.exp(), (joint(log_expert).exp() * ratio).sum())
    close(found.effective, 1 / found.log_ratio.exp())  # the mean weight is exactly one here
    largest = (joint(log_expert) - joint(log_context)).max()
    close(found.largest, largest)


def test_an_algorithm_covers_itself_and_a_blind_one_does_not_cover():
    actions, log_expert, log_context = all_trajectories((FIRST, SECOND))
    same = coverage(log_context, log_context, actions)
    assert same.log_ratio.abs() < 1e-12 and abs(same.effective - 1) < 1e-12 and same.largest.abs() < 1e-12
    sure = torch.where(torch.arange(2) == 0, 0.0, -math.inf).double().expand(16, 2, 2)
    assert coverage(log_expert, sure, torch.zeros_like(actions)).largest == math.inf
    never = coverage(sure, log_context, torch.ones_like(actions))
    assert never.log_ratio == -math.inf and never.effective == 0
    masked = coverage(log_expert, log_context, actions, torch.zeros(16, 2, dtype=torch.bool))
    assert masked.log_ratio.abs() < 1e-12 and masked.largest == 0


def test_long_trajectories_overflow_nothing():
    log_expert = random_rows(40, 3, scale=9.0).view(2, 20, 3) * 20
    found = coverage(
        log_expert.log_softmax(-1), torch.full((2, 20, 3), -math.log(3)), torch.zeros(2, 20).long()
    )
    assert found.log_ratio.isfinite() and found.largest.isfinite() and 0 <= found.effective <= 1


def test_exploration_bounds_the_ratio_of_each_step():
    generator = torch.Generator().manual_seed(0)
    bandits = Bandits.bernoulli(30, 3, generator)
    context = Explored(BetaThompson(), 0.5)
    made = play(bandits, context, 8, generator)
    for expert in (BetaThompson(), LinUCB()):
        found = coverage(made.judged_by(expert), made.log_context, made.history.actions)
        assert found.largest <= 8 * math.log(3 / 0.5) + 1e-5
        assert found.log_ratio <= 2 * found.largest
    assert coverage(made.log_context, made.log_context, made.history.actions).log_ratio.abs() < 1e-6
    assert uniform(made.history).shape == (30, 3)
