"""GRPO: the penalty's gradient summed over all 27 trajectories, and the policy gradient in closed form."""

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
from fdiv import GRPO, Exact, FusedLinear, MonteCarlo, TopK, Variational
from fdiv.methods._method import Method
from fdiv.methods.rl.grpo import group_advantage

FULL_P = along_trajectories(prefix_table(seed=1))  # the reference, [27, 3, 3]
LOG_P = of_tokens(FULL_P)
ALL = torch.ones(27, 3, dtype=torch.bool)
UNTIL_STOP = torch.cat([torch.ones(27, 1), (TRAJECTORIES[:, :2] != 2).cumprod(1)], dim=1).bool()
each_estimator = pytest.mark.parametrize(
    "estimator", [MonteCarlo(), MonteCarlo(gradient="importance"), Exact()], ids=repr
)


def policy():
    """(table, conditionals [27, 3, 3]) of the policy."""
    table = prefix_table(seed=2).requires_grad_()
    return table, along_trajectories(table)


def total_divergence(divergence, conditionals, mask=ALL):
    """E_pi[sum_i D(reference, pi)(.|s_i)], every trajectory weighted by its chance."""
    chance = of_tokens(conditionals).sum(-1).exp()
    return chance @ torch.where(mask, divergence(FULL_P, conditionals), 0.0).sum(-1)


def expected_gradient(method, mask=ALL, spoil=lambda tensor: tensor):
    """The method's gradient in the policy's table on one trajectory, averaged over all, with reward 0."""
    table, conditionals = policy()
    leaf = conditionals.detach().requires_grad_()
    tokens = of_tokens(leaf)
    if method.estimator.sees == "logits":
        evidence = {"log_p": spoil(FULL_P), "log_q": spoil(leaf)}
    else:
        evidence = {"log_p": spoil(LOG_P), "log_q": spoil(tokens)}
    out = method(
        log_policy=spoil(tokens),
        log_behaviour=spoil(tokens.detach()),
        rewards=torch.zeros(1, 27),
        mask=mask,
        count=1,  # a sum: each row of the gradient is then one trajectory's own
        **evidence,
    )
    (each,) = torch.autograd.grad(out.loss, leaf)
    chance = tokens.sum(-1).exp().detach()
    return gradient((chance[:, None, None] * each * conditionals).sum(), table)


def missing(expected, actual):
    """The relative error."""
    return ((actual - expected).norm() / expected.norm()).item()


# -- the penalty ---------------------------------------------------------------------------------------


@each_estimator
@each_divergence
def test_the_penaltys_expected_gradient_is_exact(divergence, estimator):
    table, conditionals = policy()
    expected = gradient(0.7 * total_divergence(divergence, conditionals), table)
    close(expected_gradient(GRPO(divergence, estimator, beta=0.7)), expected)


@each_estimator
@pytest.mark.parametrize("divergence", [fdiv.ReverseKL(), fdiv.JS(0.1)], ids=repr)
def test_tokens_after_the_stop_neither_count_nor_harm(divergence, estimator):
    table, conditionals = policy()
    expected = gradient(total_divergence(divergence, conditionals, UNTIL_STOP), table)
    method = GRPO(divergence, estimator, beta=1.0)
    close(expected_gradient(method, UNTIL_STOP), expected)
    for rubbish in (-torch.inf, torch.inf, torch.nan):

        def spoil(tensor, rubbish=rubbish):
            mask = UNTIL_STOP if tensor.ndim == 2 else UNTIL_STOP.unsqueeze(-1)
            return torch.where(mask, tensor, rubbish)

        close(expected_gradient(method, UNTIL_STOP, spoil), expected)


def test_a_divergence_that_is_not_zero_on_blanked_tokens_is_masked_too():
    table, conditionals = policy()
    expected = gradient(total_divergence(fdiv.Renyi(0.5), conditionals, UNTIL_STOP), table)
    close(expected_gradient(GRPO(fdiv.Renyi(0.5), Exact(), beta=1.0), UNTIL_STOP), expected)


@pytest.mark.parametrize(
    ("divergence", "estimator", "error"),
    [
        (fdiv.ReverseKL(), MonteCarlo(), 0.194),
        (fdiv.ReverseKL(), Exact(), 0.194),
        (fdiv.KL(), MonteCarlo(), 0.132),
        (fdiv.KL(), Exact(), 0.132),
    ],
    ids=repr,
)
def test_without_the_future_the_gradient_misses_a_known_part(divergence, estimator, error):
    table, conditionals = policy()
    expected = gradient(total_divergence(divergence, conditionals), table)
    partial = expected_gradient(GRPO(divergence, estimator, beta=1.0, future=False))
    # What is left is the gradient with the distribution of prefixes held fixed.
    chance = of_tokens(conditionals).sum(-1).exp().detach()
    close(partial, gradient(chance @ divergence(FULL_P, conditionals).sum(-1), table))
    assert missing(expected, partial) == pytest.approx(error, abs=0.001)


def test_the_value_as_a_loss_is_the_papers_penalty_and_follows_forward_kl_at_every_token():
    """The k3 estimate that the paper differentiates: neither reverse KL's gradient, nor close to it."""
    table, conditionals = policy()
    log_q = of_tokens(conditionals)
    chance = log_q.sum(-1).exp().detach()
    papers = gradient(chance @ MonteCarlo()(fdiv.ReverseKL(), LOG_P, log_q).sum(-1), table)
    close(papers, gradient(chance @ fdiv.KL()(FULL_P, conditionals).sum(-1), table))
    assert missing(gradient(total_divergence(fdiv.ReverseKL(), conditionals), table), papers) > 0.3


def test_only_for_reverse_kl_is_the_sum_over_tokens_the_divergence_of_whole_responses():
    _, conditionals = policy()
    whole_p, whole_q = LOG_P.sum(-1), of_tokens(conditionals).sum(-1)
    close(total_divergence(fdiv.ReverseKL(), conditionals), fdiv.ReverseKL()(whole_p, whole_q))
    neyman = total_divergence(fdiv.Neyman(), conditionals), fdiv.Neyman()(whole_p, whole_q)
    assert neyman[1] > 1.1 * neyman[0]


@each_estimator
@each_divergence
def test_one_step_down_the_penalty_lowers_the_divergence(divergence, estimator):
    table, conditionals = policy()
    step = expected_gradient(GRPO(divergence, estimator, beta=1.0)).reshape(table.shape)
    moved = along_trajectories(table.detach() - 1e-3 * step / step.norm())
    assert total_divergence(divergence, moved) < total_divergence(divergence, conditionals)


def test_the_logged_divergence_is_the_mean_over_valid_tokens():
    _, conditionals = policy()
    log_q = of_tokens(conditionals)
    out = GRPO()(
        log_policy=log_q,
        log_behaviour=log_q,
        rewards=torch.zeros(1, 27),
        mask=UNTIL_STOP,
        log_p=LOG_P,
        log_q=log_q,
    )
    values = fdiv.ReverseKL().f(LOG_P - log_q)
    close(out.metrics["divergence"], values[UNTIL_STOP].mean())
    assert not any(value.requires_grad for value in out.metrics.values())


# -- the policy gradient -------------------------------------------------------------------------------


def tokens_and_rewards(rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_policy = -torch.rand(rows, 3, generator=generator, dtype=torch.float64) - 0.1
    rewards = torch.rand(rows // 2, 2, generator=generator, dtype=torch.float64)
    return log_policy.requires_grad_(), rewards, torch.ones(rows, 3, dtype=torch.bool)


def test_the_advantage_is_normalised_within_its_group():
    rewards = torch.tensor([[1.0, 0, 0, 1], [3.0, 5, 7, 9]], dtype=torch.float64)
    advantage = group_advantage(rewards)
    for row, out in zip(rewards, advantage, strict=True):
        std = (row - row.mean()).square().sum().div(3).sqrt()  # ddof = 1
        close(out, (row - row.mean()) / (std + 1e-4), 1e-14)
    assert group_advantage(torch.tensor([[True, False]])).dtype == torch.float32
    with pytest.raises(ValueError, match="samples >= 2"):
        group_advantage(torch.ones(4, 1))


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.3, 1e6 + 0.7])
def test_a_group_of_equal_rewards_has_no_advantage_and_no_policy_gradient(reward):
    for samples in (2, 3, 7):
        assert not group_advantage(torch.full((1, samples), reward)).any()
    log_policy, rewards, mask = tokens_and_rewards()
    rewards[0] = reward
    loss = GRPO(beta=0.0)(log_policy=log_policy, log_behaviour=log_policy, rewards=rewards, mask=mask).loss
    grad = torch.autograd.grad(loss, log_policy)[0]
    assert not grad[:2].any() and grad[2:].all()


def test_on_policy_with_beta_zero_it_is_the_plain_policy_gradient():
    log_policy, rewards, mask = tokens_and_rewards()
    mask[1, 2] = False
    out = GRPO(beta=0.0)(log_policy=log_policy, log_behaviour=log_policy, rewards=rewards, mask=mask)
    advantage = group_advantage(rewards).reshape(-1, 1)
    plain = -(torch.where(mask, advantage * log_policy, 0.0)).sum() / 11
    close(gradient(out.loss, log_policy), gradient(plain, log_policy), 1e-14)
    assert "divergence" not in out.metrics
    close(out.metrics["ratio"], torch.tensor(1.0, dtype=torch.float64))
    close(out.metrics["reward"], rewards.float().mean())


def test_off_policy_the_ratio_is_clipped_where_it_would_gain_more():
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    ratios = torch.tensor([[0.5, 0.9, 1.1, 1.5]] * 2, dtype=torch.float64)
    log_policy = torch.full((2, 4), -1.0, dtype=torch.float64, requires_grad=True)
    out = GRPO(beta=0.0, clip=0.2)(
        log_policy=log_policy,
        log_behaviour=(log_policy - ratios.log()).requires_grad_(),
        rewards=rewards,
        mask=torch.ones(2, 4, dtype=torch.bool),
    )
    a = group_advantage(rewards)[0, 0]
    gains = torch.tensor([[0.5, 0.9, 1.1, 1.2], [-0.8, -0.9, -1.1, -1.5]], dtype=torch.float64) * a
    close(out.loss, -gains.mean(), 1e-12)
    free = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.float64)  # 0 where the clip holds
    sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    close(torch.autograd.grad(out.loss, log_policy)[0], -a * sign * ratios * free / 8, 1e-12)


def test_neither_behaviour_nor_reference_nor_rewards_receive_a_gradient():
    log_policy, rewards, mask = tokens_and_rewards()
    others = [torch.full_like(log_policy, -1.0).requires_grad_() for _ in range(2)]
    GRPO()(
        log_policy=log_policy,
        log_behaviour=others[0],
        rewards=rewards,
        mask=mask,
        log_p=others[1],
        log_q=log_policy,
    ).loss.backward()
    assert log_policy.grad.any()
    assert all(t.grad is None for t in others)


@pytest.mark.parametrize("estimator", [MonteCarlo(), MonteCarlo("behaviour")], ids=repr)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(estimator):
    log_policy, rewards, mask = tokens_and_rewards()
    mask[0, 1:] = False
    log_p, behaviour = torch.full_like(log_policy, -1.0), log_policy.detach() - 0.1
    method = GRPO(estimator=estimator, beta=0.5)

    def loss(rows, groups):
        part = log_policy[rows]
        return method(
            log_policy=part,
            log_behaviour=behaviour[rows],
            rewards=rewards[groups],
            mask=mask[rows],
            count=mask.sum(),
            log_p=log_p[rows],
            log_q=part,
        ).loss

    whole = loss(slice(0, 4), slice(0, 2))
    parts = loss(slice(0, 2), slice(0, 1)) + loss(slice(2, 4), slice(1, 2))
    close(parts, whole, 1e-13)
    close(gradient(parts, log_policy), gradient(whole, log_policy), 1e-12)


def test_the_behaviour_estimator_is_given_the_sampling_log_probabilities():
    log_policy, rewards, mask = tokens_and_rewards()
    log_p, behaviour = torch.full_like(log_policy, -1.0), log_policy.detach() - 0.1
    out = GRPO(fdiv.KL(), MonteCarlo("behaviour"))(
        log_policy=log_policy,
        log_behaviour=behaviour,
        rewards=rewards,
        mask=mask,
        log_p=log_p,
        log_q=log_policy,
    )
    expected = MonteCarlo("behaviour")(fdiv.KL(), log_p, log_policy, behaviour).mean()
    close(out.metrics["divergence"], expected.detach())


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [FusedLinear(), Variational()], ids=repr)
def test_estimators_that_do_not_see_sampled_prefixes_are_refused_when_it_is_built(estimator):
    with pytest.raises(TypeError, match=r"write MonteCarlo\(\) or Exact\(\)"):
        GRPO(estimator=estimator)


def test_an_estimator_for_samples_of_the_reference_is_refused():
    with pytest.raises(TypeError, match="not samples of the reference"):
        GRPO(estimator=MonteCarlo("p"))


def test_a_divergence_that_the_estimator_cannot_serve_is_refused_when_it_is_built():
    with pytest.raises(TypeError, match="function of the ratio"):
        GRPO(fdiv.Renyi(0.5))
    GRPO(fdiv.Renyi(0.5), Exact())


def test_wrong_settings_and_evidence_are_refused():
    for settings, message in (({"beta": -0.1}, "maximises"), ({"clip": 0.0}, "between 0 and 1")):
        with pytest.raises(ValueError, match=message):
            GRPO(**settings)
    log_policy, rewards, mask = tokens_and_rewards()
    given = {"log_policy": log_policy, "log_behaviour": log_policy, "rewards": rewards, "mask": mask}
    with pytest.raises(TypeError, match="reads log_p, log_q; got nothing"):
        GRPO()(**given)
    with pytest.raises(TypeError, match="got log_reference"):
        GRPO(beta=0.0)(**given, log_reference=log_policy)
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        GRPO(beta=0.0)(**given | {"mask": mask.long()})
    with pytest.raises(ValueError, match="2 rewards for 4 sequences"):
        GRPO(beta=0.0)(**given | {"rewards": rewards[:1]})


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = GRPO(fdiv.JS(0.1), TopK(8), beta=0.1, future=False)
    assert fdiv.parse(repr(method)) == method
    assert isinstance(method, Method)
