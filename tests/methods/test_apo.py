"""APO: the published weights, the length factor written out, and the penalty's gradient by enumeration."""

import math

import pytest
import torch
from tests.worlds import (
    TRAJECTORIES,
    along_trajectories,
    close,
    each_divergence,
    gradient,
    of_tokens,
    prefix_table,
)

import fdiv
from fdiv import GRPO
from fdiv.methods._method import Method
from fdiv.methods.rl._groups import group_advantage
from fdiv.methods.rl.apo import APO

# -- weights -------------------------------------------------------------------------------------------


def weights(right, samples=8, **settings):
    """(of the right answers, of the wrong ones) in a group with so many right ones."""
    correct = torch.arange(samples) < right
    advantage = group_advantage(correct.unsqueeze(0).double()).squeeze(0)
    weight = APO(**settings).weight(advantage, correct, torch.zeros(samples, dtype=torch.long))
    return weight[correct], weight[~correct]


@pytest.mark.parametrize(("right", "weight"), [(1, 0.2881), (2, 0.4932), (4, 0.7431), (7, 0.9073)])
def test_the_weights_of_right_answers_are_the_published_ones(right, weight):
    of_right, of_wrong = weights(right)
    assert of_right.tolist() == [pytest.approx(weight, abs=5e-5)] * right
    assert of_right.tolist() == [pytest.approx(1 - math.exp(-math.e * right / 8), abs=1e-12)] * right
    assert (of_wrong == 1).all()


def test_the_easier_the_question_the_more_its_right_answers_are_held():
    rising = [weights(right)[0][0].item() for right in range(1, 8)]
    assert rising == sorted(rising) and rising[0] > 0 and rising[-1] < 1
    for right in (0, 8):  # no advantage, and no shaping
        assert all((part == 1).all() for part in weights(right))


def test_only_a_positive_advantage_is_shaped_whatever_the_verdict():
    correct = torch.tensor([True, True, False, False])
    advantage = torch.tensor([0.5, -0.1, 0.3, 0.0])  # of rewards that are no verdicts
    weight = APO().weight(advantage, correct, torch.zeros(4, dtype=torch.long))
    for all_alike in (torch.ones(4).bool(), torch.zeros(4).bool()):  # d is 0 or 1
        assert (APO().weight(advantage, all_alike, torch.zeros(4, dtype=torch.long)) == 1).all()
    shaped = 1 - math.exp(-math.e / 2)
    assert weight.tolist() == [pytest.approx(w) for w in (shaped, 1, shaped, 1)]


def test_without_sharpness_every_weight_is_one():
    assert all((part == 1).all() for part in weights(3, sharpness=None))


# -- lengths -------------------------------------------------------------------------------------------

LENGTH = torch.tensor([100, 300, 500, 201, 200, 40, 900, 7])
RIGHT = torch.tensor([1, 1, 0, 0, 0, 0, 0, 1]).bool()
GROUPS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])


def test_a_wrong_answer_longer_than_the_right_ones_on_average_loses_more():
    factor = APO().length_factor(LENGTH, RIGHT, GROUPS)
    expected = [1.0] * 8  # right, not longer, or nothing right to compare with
    expected[2] = 1 + (1 - 1.00001 ** -(500 - 200))
    expected[3] = 1 + (1 - 1.00001**-1)
    assert factor.tolist() == [pytest.approx(x, rel=1e-15) for x in expected]
    assert factor[3] > 1


def test_the_factor_stays_below_two_and_a_rate_of_zero_turns_it_off():
    lengths = torch.tensor([1, 10**7])
    both = torch.tensor([True, False]), torch.zeros(2, dtype=torch.long)
    assert 1.99 < APO().length_factor(lengths, *both)[1] <= 2
    assert (APO(length_rate=0.0).length_factor(lengths, *both) == 1).all()


# -- the loss ------------------------------------------------------------------------------------------

CORRECT = torch.tensor([1, 0, 0, 1, 0, 1, 1, 1, 0, 0]).bool()
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])


def batch(dtype=torch.float64, apart=0.3):
    generator = torch.Generator().manual_seed(5)
    log_policy = (-torch.rand(10, 6, generator=generator, dtype=dtype) - 0.2).requires_grad_()
    mask = torch.ones(10, 6, dtype=torch.bool)
    for row, length in enumerate((2, 6, 1, 3, 5, 4, 4, 6, 0, 2)):
        mask[row, length:] = False
    noise = torch.randn(2, 10, 6, generator=generator, dtype=dtype)
    return log_policy, {
        "log_policy": log_policy,
        "log_behaviour": log_policy.detach() + apart * noise[0],
        "mask": mask,
        "reward": CORRECT.to(dtype),
        "correct": CORRECT,
        "group": GROUP,
        "log_p": log_policy.detach() + apart * noise[1],
        "log_q": log_policy,
    }


def advantages(given):
    return torch.cat([group_advantage(r.unsqueeze(0))[0] for r in given["reward"].split([4, 4, 2])])


def test_without_weights_and_lengths_it_is_grpo_with_the_penalty_of_whole_answers():
    log_policy, given = batch(apart=0.0)
    given["log_p"] = given["log_p"] + 0.3
    out = APO(sharpness=None, length_rate=0.0, beta=0.5)(**given)
    names = ("log_policy", "log_behaviour", "mask", "log_p", "log_q")
    method = GRPO(beta=0.5, aggregate="sequences")
    grpo = method(**{name: given[name] for name in names}, advantage=advantages(given))
    close(out.loss, grpo.loss, 1e-13)
    # GRPO leaves out the values of earlier tokens, on which a token has no effect.
    value = fdiv.ReverseKL().f(given["log_p"] - log_policy.detach()) * given["mask"]
    earlier = value.cumsum(1) - value
    lengths = given["mask"].sum(1, keepdim=True).clamp(min=1)
    extra = (0.5 * earlier * given["mask"] / lengths / 10).flatten()
    close(gradient(out.loss, log_policy), gradient(grpo.loss, log_policy) + extra, 1e-12)
    for name in ("ratio", "clipped", "divergence"):
        close(out.metrics[name], grpo.metrics[name], 1e-13)


def test_the_loss_is_the_clipped_gain_of_shaped_advantages_and_the_weighted_penalty():
    log_policy, given = batch()
    method = APO(fdiv.JS(0.3), beta=0.7, clip=(0.1, 0.3), length_rate=0.05)
    out = method(**given)
    mask, lengths = given["mask"], given["mask"].sum(1)
    plain = advantages(given)
    shaped = (plain * method.length_factor(lengths, CORRECT, GROUP)).unsqueeze(1)
    assert (shaped.squeeze(1) != plain).any()
    ratio = (log_policy - given["log_behaviour"]).exp()
    gain = torch.minimum(ratio * shaped, ratio.clamp(0.9, 1.3) * shaped)
    weight = method.weight(plain, CORRECT, GROUP).unsqueeze(1)
    value = ratio * fdiv.JS(0.3).f(given["log_p"] - log_policy)  # a sample of who wrote, for the policy
    rows = torch.where(mask, 0.7 * weight * value - gain, 0.0).sum(1) / lengths.clamp(min=1)
    close(out.loss, rows.mean(), 1e-13)
    close(out.metrics["weight"], weight.mean())
    assert out.metrics["clipped"] > 0


CONDITIONALS = along_trajectories(prefix_table(seed=1))
ENDED = torch.cat([torch.ones(27, 1), (TRAJECTORIES[:, :2] != 2).cumprod(1)], dim=1).bool()


@pytest.mark.parametrize("aggregate", ["tokens", "sequences"])
@each_divergence
def test_the_penaltys_expected_gradient_is_that_of_the_weighted_mean(divergence, aggregate):
    """Enumerated with weights that depend on how the answer ends: a gradient without them would not do."""
    table = prefix_table(seed=2).requires_grad_()
    log_q, log_p = of_tokens(along_trajectories(table)), of_tokens(CONDITIONALS)
    weight = torch.linspace(0.2, 1.0, 27, dtype=torch.float64)[torch.randperm(27, generator=shuffle())]
    weight = torch.where(ENDED.all(1), weight, 0.6)  # one weight for what is one answer
    per_token = (weight if aggregate == "tokens" else weight / ENDED.sum(1)).unsqueeze(1)

    chance = log_q.sum(-1).exp()
    value = torch.where(ENDED, divergence.f(log_p - log_q), 0.0)
    exact = gradient(chance @ (per_token * value).sum(1), table)

    leaf = log_q.detach().requires_grad_()
    penalty, logged = APO(divergence)._penalty((log_p, leaf, leaf.detach()), leaf, ENDED)
    close(logged, value.detach(), 1e-12)
    (each,) = torch.autograd.grad((per_token * penalty)[ENDED].sum(), leaf)
    close(gradient((chance.detach().unsqueeze(1) * each * log_q).sum(), table), exact)


def shuffle():
    return torch.Generator().manual_seed(1)


def test_micro_batches_of_whole_groups_add_up():
    log_policy, given = batch()
    for method in (APO(beta=0.5, length_rate=0.05), APO(beta=0.5, aggregate="tokens"), APO(aggregate=9)):
        whole = method(**given).loss
        parts = []
        for rows in (GROUP == 0, GROUP > 0):
            some = {name: tensor[rows] for name, tensor in given.items()}
            some["group"] = some["group"] - some["group"][0]
            parts.append(method(**some, count=given["mask"].sum(), sequences=10).loss)
        close(sum(parts), whole, 1e-13)
        close(gradient(sum(parts), log_policy), gradient(whole, log_policy), 1e-12)


# -- what may go wrong ---------------------------------------------------------------------------------


def test_equal_rewards_have_no_advantage_and_leave_the_penalty():
    log_policy, given = batch()
    given["reward"] = torch.full((10,), 0.7, dtype=torch.float64)
    given["correct"] = torch.ones(10, dtype=torch.bool)
    given["log_p"] = log_policy.detach()
    assert APO()(**given).loss == 0
    assert not gradient(APO()(**given).loss, log_policy).any()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_masked_tokens_are_not_looked_at(rubbish):
    log_policy, given = batch()
    clean = APO(beta=0.5)(**given)
    for name in ("log_policy", "log_behaviour", "log_p", "log_q"):
        given[name] = torch.where(given["mask"], given[name], rubbish)
    out = APO(beta=0.5)(**given)
    close(out.loss, clean.loss)
    close(gradient(out.loss, log_policy), gradient(clean.loss, log_policy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", [fdiv.ReverseKL(), fdiv.KL(), fdiv.JS(0.5)], ids=repr)
def test_enormous_ratios_and_excluded_tokens_give_finite_losses_and_gradients(divergence, dtype):
    log_policy, given = batch(dtype)
    far = torch.tensor([1e4, -1e4, 100.0, -100.0, 0.0, 1.0], dtype=dtype)
    given["log_p"] = log_policy.detach() + far
    given["log_p"][:, 3] = -torch.inf
    given["log_behaviour"] = log_policy.detach() + far.flip(0)
    for name in ("log_policy", "log_q"):  # what the policy has stopped writing
        given[name] = torch.where(torch.arange(60).reshape(10, 6) == 7, -torch.inf, log_policy)
    out = APO(divergence)(**given)
    assert out.loss.dtype == dtype
    assert out.loss.isfinite() and gradient(out.loss, log_policy).isfinite().all()
    given["mask"] = torch.zeros_like(given["mask"])
    out = APO(divergence)(**given)
    assert out.loss == 0 and not gradient(out.loss, log_policy).any()


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"divergence": fdiv.Renyi(0.5)}, TypeError, "APO takes an f-divergence"),
        ({"beta": 0.0}, ValueError, r"write GRPO\(beta=0.0\)"),
        ({"clip": 1.0}, ValueError, "between 0 and 1"),
        ({"sharpness": 0.0}, ValueError, "None is for weights of 1"),
        ({"sharpness": math.inf}, ValueError, "None is for weights of 1"),
        ({"length_rate": -1e-5}, ValueError, "0 turns it off"),
        ({"aggregate": "groups"}, ValueError, "aggregate is 'tokens'"),
    ],
    ids=repr,
)
def test_wrong_settings_are_refused(settings, error, reason):
    with pytest.raises(error, match=reason):
        APO(**settings)


def test_a_verdict_that_is_a_number_is_refused():
    _, given = batch()
    with pytest.raises(TypeError, match="write reward > 0"):
        APO()(**given | {"correct": CORRECT.double()})


def test_the_object_is_its_recipe_and_keeps_the_contract():
    for method in (APO(), APO(fdiv.JS(0.3), 0.1, None, None, 0.0, "tokens")):
        assert fdiv.parse(repr(method), ["fdiv.methods.rl.apo"]) == method
        assert isinstance(method, Method)
    assert APO.unit == "group"
