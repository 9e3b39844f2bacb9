"""Correlated proxies: the bound on random draws, and gradients summed over all 27 trajectories."""

import math

import pytest
import torch
from scipy import stats
from tests.worlds import (
    TRAJECTORIES,
    along_trajectories,
    close,
    each_divergence,
    each_other_object,
    gradient,
    of_tokens,
    prefix_table,
)

import fdiv
from fdiv import GRPO, MonteCarlo
from fdiv.methods._method import Method
from fdiv.methods.rl.occupancy import OccupancyPO, OccupancyReward, guarantee, priced

LOG_P = of_tokens(along_trajectories(prefix_table(seed=1)))  # the reference's, [27, 3]
ALL = torch.ones(27, 3, dtype=torch.bool)
UNTIL_STOP = torch.cat([torch.ones(27, 1), (TRAJECTORIES[:, :2] != 2).cumprod(1)], dim=1).bool()
FAR = {"cap": 300.0, "floor": 1e-12}  # nothing is continued


def policy():
    """(table, log-probabilities of the trajectories' tokens [27, 3])."""
    table = prefix_table(seed=2).requires_grad_()
    return table, of_tokens(along_trajectories(table))


def answers(divergence, log_q):
    """D(reference, policy) of whole answers."""
    return divergence(LOG_P.sum(-1), log_q.sum(-1))


def called(method, log_q, mask=ALL, **changes):
    given = {"log_policy": log_q, "log_behaviour": log_q.detach(), "advantage": torch.zeros(len(log_q))}
    return method(**given | {"mask": mask, "log_p": LOG_P[: len(log_q)]} | changes)


def surveyed(method, log_q, mask=ALL, count=27 * 3):
    """The batch value when each trajectory comes as often as it is likely."""
    rows = method.survey(log_q, log_q, log_p=LOG_P, mask=mask)
    return (log_q.detach().sum(-1).exp() * rows.sum(-1)).sum() * 27 / count


def expected_gradient(method, **changes):
    """The gradient in the policy's table on one trajectory, averaged over all by their chances."""
    table, log_q = policy()
    leaf = log_q.detach().requires_grad_()
    value = {"batch_value": surveyed(method, leaf), "sequences": 27} if method.root else {}
    # 27 answers of 3 tokens: a sum over 81 tokens that a count of 81 divides is a mean over the batch.
    out = called(method, leaf, count=27 * 3, **value | changes)
    (each,) = torch.autograd.grad(out.loss * 27 * 3, leaf)
    chance = leaf.sum(-1).exp().detach()
    return gradient((chance.unsqueeze(-1) * each * log_q).sum(), table)


# -- the theory ----------------------------------------------------------------------------------------


def correlated(generator, atoms=6):
    """(reference, true and proxy standardised over it, their correlation r > 0)."""
    reference = torch.rand(atoms, generator=generator, dtype=torch.float64) + 0.02
    reference = reference / reference.sum()
    true, proxy = (standardised(torch.randn(atoms, generator=generator), reference) for _ in range(2))
    r = (reference * true * proxy).sum()
    return reference, true, proxy * r.sign(), r.abs()


def standardised(reward, reference):
    reward = reward.double() - (reference * reward).sum()
    return reward / (reference * reward.square()).sum().sqrt()


def test_no_policy_has_less_true_reward_than_the_proxy_and_chi_square_guarantee():
    generator = torch.Generator().manual_seed(0)
    slack = []
    for _ in range(3000):
        reference, true, proxy, r = correlated(generator)
        logits = 2 * torch.randn(len(reference), generator=generator, dtype=torch.float64)
        visited = logits.softmax(-1)
        chi_square = fdiv.Neyman()(reference.log(), visited.log())
        close(chi_square, ((visited - reference).square() / reference).sum())
        least = guarantee((visited * proxy).sum(), chi_square, r.item())
        slack.append(((visited * true).sum() - least).item())
    assert min(slack) > -1e-9
    assert min(slack) < 0.05  # it is close for some


def test_the_guarantee_is_reached_where_the_policy_follows_what_the_proxy_gets_wrong():
    reference, true, proxy, r = correlated(torch.Generator().manual_seed(3))
    wrong = proxy - r * true  # the part of the proxy that is uncorrelated with the true reward
    visited = reference * (1 + 0.1 * wrong)
    assert visited.min() > 0
    chi_square = fdiv.Neyman()(reference.log(), visited.log())
    close((visited * true).sum(), guarantee((visited * proxy).sum(), chi_square, r.item()), 1e-9)


@pytest.mark.parametrize("correlation", [0.0, -0.3, 1.2])
def test_a_proxy_that_does_not_go_with_the_true_reward_guarantees_nothing(correlation):
    with pytest.raises(ValueError, match="correlation is in"):
        guarantee(torch.tensor(1.0), torch.tensor(1.0), correlation)


# -- the price of a state and an action ----------------------------------------------------------------


def test_prices_are_the_papers_occupancy_rewards_with_the_sign_turned():
    d = torch.tensor([-3.0, -0.2, 0.0, 0.4, 2.5], dtype=torch.float64)  # log mu_pi - log mu_ref
    of_kl, of_tv, of_chi = (
        OccupancyReward(divergence, root=False)(-d)[0]
        for divergence in (fdiv.ReverseKL(), fdiv.TV(), fdiv.Neyman())
    )
    close(of_kl, d)
    close(of_tv, d.sign() / 2)
    close(of_chi, 2 * d.expm1())


def test_the_root_divides_by_the_trimmed_mean_of_the_excess_ratio():
    d = 1.5 * torch.randn(700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    price, metrics = OccupancyReward()(-d)
    trimmed = stats.trim_mean(d.expm1().numpy(), 0.01)
    close(price, d.expm1() / math.sqrt(trimmed))
    close(metrics["chi_square"], torch.tensor(trimmed, dtype=torch.float64))
    assert metrics["rooted"] == 1 and metrics["linearised"] == 0
    plain, metrics = OccupancyReward(trim=0.0)(-d)
    close(plain, d.expm1() / d.expm1().mean().sqrt())


def test_where_the_estimate_is_not_positive_the_price_is_plain():
    d = torch.tensor([[-2.0, -0.5], [-0.1, 0.05]], dtype=torch.float64)
    price, metrics = OccupancyReward()(-d)
    close(price, d.expm1())
    assert metrics["rooted"] == 0 and metrics["chi_square"] < 0
    assert not OccupancyReward()(torch.zeros(5))[0].any()


def test_prices_beyond_the_cap_go_on_linearly_and_are_counted():
    method = OccupancyReward(root=False, cap=2.0)
    d = torch.tensor([0.0, 2.0, 3.0, 1e4, -1e4], dtype=torch.float64)
    price, metrics = method(-d)
    top = 2 * math.exp(2.0)
    expected = [0, top - 2, top - 2 + top, top - 2 + top * (1e4 - 2)]
    close(price[:4], torch.tensor(expected, dtype=torch.float64))
    assert price[4] < -2.01 and price.isfinite().all()  # its slope at the lower end, 2 e^-2 a unit
    close(metrics["linearised"], torch.tensor(0.6))


@each_divergence
@pytest.mark.parametrize("end", [-2.0, 2.0])
def test_value_and_price_leave_the_cap_along_their_tangents(divergence, end):
    at = torch.tensor([end], dtype=torch.float64)
    for which, function in enumerate((divergence.psi, divergence.f)):
        slope = torch.func.grad(lambda x, function=function: function(x).sum())(at)
        inside, beyond = (
            priced(divergence, end * x, 2.0)[which] for x in torch.tensor([[1.0], [1.5]]).double()
        )
        close(inside, function(at))
        close(beyond - inside, slope * end / 2)


# -- the gradient over whole answers -------------------------------------------------------------------


@each_divergence
def test_the_expected_gradient_is_that_of_the_divergence_of_answers(divergence):
    table, log_q = policy()
    expected = gradient(0.7 * answers(divergence, log_q), table)
    close(expected_gradient(OccupancyPO(divergence, beta=0.7, root=False, **FAR)), expected)


@each_divergence
def test_the_expected_gradient_under_the_root_is_that_of_the_root(divergence):
    table, log_q = policy()
    expected = gradient(0.7 * answers(divergence, log_q).sqrt(), table)
    close(expected_gradient(OccupancyPO(divergence, beta=0.7, **FAR)), expected)


def test_the_root_of_chi_square_weighs_an_answer_by_its_ratio_over_the_root():
    table, log_q = policy()
    ratio = (log_q - LOG_P).sum(-1).exp().detach()
    chance = log_q.sum(-1).exp()
    chi_square = (chance.detach() * ratio).sum() - 1
    weighed = (chance * ratio).sum() / chi_square.sqrt()  # constants are irrelevant
    close(expected_gradient(OccupancyPO(beta=1.0, **FAR)), gradient(weighed, table))


def test_the_value_differentiated_at_frozen_samples_mixes_two_divergences():
    """What e^l + e^-l - 2 in a loss follows, and that it is not what OccupancyPO follows."""
    table, log_q = policy()
    log_ratio = (log_q - LOG_P).sum(-1)
    chance = log_q.sum(-1).exp().detach()
    in_loss = gradient((chance * (log_ratio.exp() + (-log_ratio).exp() - 2)).sum(), table)
    half = gradient(answers(fdiv.Neyman(), log_q) / 2, table)
    forward = gradient(answers(fdiv.KL(), log_q), table)
    close(in_loss, half + forward)
    own = expected_gradient(OccupancyPO(beta=0.5, root=False, **FAR))
    close(own, half)
    assert (in_loss - own).norm() > 0.1 * own.norm()


def test_for_reverse_kl_it_is_the_penalty_of_rlhf_which_is_a_sum_over_tokens():
    table, log_q = policy()
    by_tokens = gradient(answers(fdiv.ReverseKL(), log_q), table)
    close(expected_gradient(OccupancyPO(fdiv.ReverseKL(), beta=1.0, root=False, **FAR)), by_tokens)
    leaf = log_q.detach().requires_grad_()
    out = GRPO(fdiv.ReverseKL(), MonteCarlo(), beta=1.0)(
        log_policy=leaf,
        log_behaviour=leaf.detach(),
        rewards=torch.zeros(1, 27),
        mask=ALL,
        count=1,
        log_p=LOG_P,
        log_q=leaf,
    )
    (each,) = torch.autograd.grad(out.loss, leaf)
    chance = leaf.detach().sum(-1).exp()
    close(gradient((chance.unsqueeze(-1) * each * log_q).sum(), table), by_tokens)


@each_divergence
def test_without_the_root_it_is_grpo_with_the_divergence_of_answers_in_the_reward(divergence):
    _, log_q = policy()
    leaf = log_q.detach().requires_grad_()
    advantage = torch.linspace(-1, 1, 27, dtype=torch.float64)
    behaviour = leaf.detach() + 0.3 * torch.sin(torch.arange(81.0)).reshape(27, 3)
    given = {"log_policy": leaf, "log_behaviour": behaviour, "advantage": advantage, "mask": UNTIL_STOP}
    own = OccupancyPO(divergence, beta=0.3, root=False, **FAR)(**given, log_p=LOG_P)
    grpo = GRPO(divergence, MonteCarlo(), beta=0.3, place="reward", level="sequence")
    other = grpo(**given, log_p=LOG_P, log_q=leaf)
    close(gradient(own.loss, leaf), gradient(other.loss, leaf))
    close(own.metrics["divergence"], other.metrics["divergence"])


def test_without_a_weight_it_is_the_clipped_policy_gradient():
    _, log_q = policy()
    advantage = torch.linspace(-1, 1, 27, dtype=torch.float64)
    behaviour = log_q.detach() + 0.3 * torch.sin(torch.arange(81.0)).reshape(27, 3)
    given = {"log_policy": log_q, "log_behaviour": behaviour, "advantage": advantage, "mask": UNTIL_STOP}
    loss = OccupancyPO(beta=0.0)(**given, log_p=LOG_P).loss
    assert loss == GRPO(beta=0.0)(**given).loss


def test_the_survey_is_unbiased_for_answers_that_an_older_policy_drew():
    _, log_q = policy()
    older = of_tokens(along_trajectories(prefix_table(seed=5)))
    rows = OccupancyPO(**FAR).survey(log_q, older, log_p=LOG_P, mask=ALL)
    close((older.sum(-1).exp() * rows.sum(-1)).sum(), answers(fdiv.Neyman(), log_q.detach()))
    assert not rows.requires_grad


@pytest.mark.parametrize("root", [True, False])
def test_micro_batches_of_answers_of_any_length_add_up_to_the_global_batch(root):
    _, log_q = policy()
    log_q = log_q.detach().requires_grad_()
    method = OccupancyPO(beta=0.3, root=root, **FAR)
    mask = UNTIL_STOP.clone()
    mask[4] = False  # an empty answer
    advantage = torch.linspace(-1, 1, 27, dtype=torch.float64)
    count = mask.sum()
    whole = called(method, log_q, mask, advantage=advantage)
    value = method.survey(log_q, log_q.detach(), log_p=LOG_P, mask=mask).sum() / count
    more = {"batch_value": value, "sequences": 27} if root else {}
    parts = [
        called(
            method, log_q[rows], mask[rows], advantage=advantage[rows], log_p=LOG_P[rows], count=count, **more
        )
        for rows in (slice(0, 5), slice(5, 6), slice(6, 27))
    ]
    loss = torch.stack([part.loss for part in parts]).sum()
    close(loss, whole.loss, 1e-12)
    close(gradient(loss, log_q), gradient(whole.loss, log_q))
    direct = torch.where(mask, LOG_P - log_q, 0.0).sum(-1)
    close(whole.metrics["divergence"], fdiv.Neyman().f(direct.detach()).mean())


# -- the ends ------------------------------------------------------------------------------------------


def test_at_the_reference_itself_nothing_pulls_although_the_root_is_infinitely_steep():
    leaf = LOG_P.clone().requires_grad_()
    out = called(OccupancyPO(beta=1.0), leaf)
    assert not gradient(out.loss, leaf).any()
    assert out.metrics["rooted"] == 0 and out.metrics["divergence"] == 0


def test_below_the_floor_the_root_is_a_line_of_the_divergence():
    log_q = LOG_P.clone()
    log_q[:, 0] += 1e-4
    leaf = log_q.requires_grad_()
    rooted, plain = (
        gradient(called(OccupancyPO(beta=b, root=root, floor=0.04), leaf).loss, leaf)
        for b, root in ((1.0, True), (1 / (2 * 0.2), False))
    )
    close(rooted, plain)


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("divergence", [fdiv.Neyman(), fdiv.Pearson(), fdiv.KL(), fdiv.TV()], ids=repr)
def test_log_ratios_of_ten_thousand_stay_finite_and_are_counted(divergence, gap, root):
    leaf = LOG_P.clone().float().requires_grad_()
    log_p = LOG_P.float().clone()
    log_p[:9, 1] += gap
    advantage = torch.ones(27)
    out = called(OccupancyPO(divergence, root=root), leaf, log_p=log_p, advantage=advantage)
    assert out.loss.isfinite() and gradient(out.loss, leaf).isfinite().all()
    close(out.metrics["linearised"], torch.tensor(9 / 27))


def test_an_answer_that_the_reference_cannot_write_is_an_error():
    log_p = LOG_P.clone()
    log_p[3, 1] = -math.inf
    _, log_q = policy()
    with pytest.raises(ValueError, match="no finite log-ratio"):
        called(OccupancyPO(), log_q, log_p=log_p)
    mask = ALL.clone()
    mask[3, 1] = False
    assert called(OccupancyPO(), log_q, mask, log_p=log_p).loss.isfinite()


@pytest.mark.parametrize("rubbish", [-math.inf, math.inf, math.nan])
def test_masked_tokens_neither_count_nor_harm(rubbish):
    _, log_q = policy()
    leaf = log_q.detach().requires_grad_()
    clean = called(OccupancyPO(beta=1.0), leaf, UNTIL_STOP)
    spoilt = called(
        OccupancyPO(beta=1.0),
        torch.where(UNTIL_STOP, leaf, rubbish),
        UNTIL_STOP,
        log_p=torch.where(UNTIL_STOP, LOG_P, rubbish),
    )
    close(gradient(spoilt.loss, leaf), gradient(clean.loss, leaf), 1e-14)


@pytest.mark.parametrize("root", [True, False])
def test_answers_without_a_token_are_no_text_to_learn_from(root):
    leaf = LOG_P.clone().requires_grad_()
    out = called(OccupancyPO(root=root), leaf, torch.zeros_like(ALL))
    assert out.loss == 0 and not gradient(out.loss, leaf).any()
    assert all(value.isfinite() for value in out.metrics.values())


def test_neither_reference_nor_behaviour_receive_a_gradient():
    leaf, others = LOG_P.clone().requires_grad_(), [(LOG_P - 0.1).requires_grad_() for _ in range(2)]
    called(OccupancyPO(), leaf, log_p=others[0], log_behaviour=others[1]).loss.backward()
    assert leaf.grad.any() and all(other.grad is None for other in others)


# -- refusals and the contract -------------------------------------------------------------------------


@each_other_object
def test_only_functions_of_the_ratio_are_priced(other):
    for method in (OccupancyPO, OccupancyReward):
        with pytest.raises(TypeError, match="takes an f-divergence"):
            method(other)


def test_wrong_settings_are_refused():
    with pytest.raises(TypeError, match="write root=False"):
        OccupancyReward(fdiv.ReverseKL())
    with pytest.raises(ValueError, match="trim is the fraction"):
        OccupancyReward(trim=0.5)
    for method in (OccupancyPO, OccupancyReward):
        with pytest.raises(ValueError, match="cap is a log-ratio"):
            method(cap=0.0)
    for settings, message in (
        ({"beta": -1.0}, "beta must be >= 0"),
        ({"clip": 1.0}, "clip is between"),
        ({"floor": 0.0}, "floor is a value"),
    ):
        with pytest.raises(ValueError, match=message):
            OccupancyPO(**settings)


def test_the_object_is_its_recipe_and_reads_no_more_than_it_uses():
    method = OccupancyPO(fdiv.ReverseKL(), beta=0.3, root=False)
    assert isinstance(method, Method)
    assert repr(method).startswith("OccupancyPO(divergence=ReverseKL(), beta=0.3, root=False")
    assert OccupancyPO().reads == ("advantage", "log_p", "sequences", "batch_value")
    assert method.reads == ("advantage", "log_p")
