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
from fdiv.methods.rl._groups import advantage_within, group_advantage, group_mean

FULL_P = along_trajectories(prefix_table(seed=1))  # the reference, [27, 3, 3]
LOG_P = of_tokens(FULL_P)
ALL = torch.ones(27, 3, dtype=torch.bool)
UNTIL_STOP = torch.cat([torch.ones(27, 1), (TRAJECTORIES[:, :2] != 2).cumprod(1)], dim=1).bool()
each_estimator = pytest.mark.parametrize(
    "estimator",
    [
        MonteCarlo(),
        MonteCarlo(gradient="importance"),
        MonteCarlo(gradient="potential"),
        MonteCarlo(gradient="straight-through"),
        Exact(),
    ],
    ids=repr,
)


def policy():
    """(table, conditionals [27, 3, 3]) of the policy."""
    table = prefix_table(seed=2).requires_grad_()
    return table, along_trajectories(table)


def total_divergence(divergence, conditionals, mask=ALL):
    """E_pi[sum_i D(reference, pi)(.|s_i)], every trajectory weighted by its chance."""
    chance = of_tokens(conditionals).sum(-1).exp()
    return chance @ torch.where(mask, divergence(FULL_P, conditionals), 0.0).sum(-1)


def expected_gradient(method, mask=ALL, spoil=lambda tensor: tensor, behaviour=None):
    """The method's gradient in the policy's table on one trajectory, averaged over all, with reward 0.

    behaviour: log-probabilities of the tokens under who wrote the trajectories, if not the policy.
    """
    table, conditionals = policy()
    leaf = conditionals.detach().requires_grad_()
    tokens = of_tokens(leaf)
    behaviour = tokens.detach() if behaviour is None else behaviour
    if method.estimator.sees == "logits":
        evidence = {"log_p": spoil(FULL_P), "log_q": spoil(leaf)}
    else:
        evidence = {"log_p": spoil(LOG_P), "log_q": spoil(tokens)}
    out = method(
        log_policy=spoil(tokens),
        log_behaviour=spoil(behaviour),
        rewards=torch.zeros(1, 27),
        mask=mask,
        count=1,  # a sum: each row of the gradient is then one trajectory's own
        **evidence,
    )
    (each,) = torch.autograd.grad(out.loss, leaf)
    chance = behaviour.sum(-1).exp()
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


# -- in the reward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [ALL, UNTIL_STOP], ids=["whole", "until the stop"])
@each_divergence
def test_in_the_reward_the_penaltys_expected_gradient_is_exact_too(divergence, mask):
    table, conditionals = policy()
    expected = gradient(0.7 * total_divergence(divergence, conditionals, mask), table)
    close(expected_gradient(GRPO(divergence, beta=0.7, place="reward"), mask), expected)


@pytest.mark.parametrize("future", [True, False])
@pytest.mark.parametrize("gradients", ["score", "importance", "potential"])
def test_on_policy_the_two_places_have_one_gradient_answer_by_answer(gradients, future):
    log_policy, rewards, mask = tokens_and_rewards()
    mask[0, 1:] = False
    log_p = torch.full_like(log_policy, -1.0)

    def grad(place, aggregate):
        estimator = MonteCarlo(gradient=gradients)
        method = GRPO(fdiv.JS(0.3), estimator, 0.5, future=future, place=place, aggregate=aggregate)
        given = {"log_policy": log_policy, "log_behaviour": log_policy, "log_p": log_p, "log_q": log_policy}
        return gradient(method(**given, rewards=rewards, mask=mask).loss, log_policy)

    for aggregate in ("tokens", "sequences", 5):
        close(grad("reward", aggregate), grad("loss", aggregate), 1e-13)


@each_divergence
def test_the_value_in_the_reward_would_be_wrong_by_a_known_part(divergence):
    """-f(u) for -psi at a token itself: f = psi + u f', and the second of them is a gradient of its own."""
    table, conditionals = policy()
    log_q = of_tokens(conditionals)
    value = divergence.f(LOG_P - log_q).detach()
    credit = value.flip(1).cumsum(1).flip(1)  # own and later values, none of them psi
    chance = log_q.sum(-1).exp().detach()
    wrong = gradient(chance @ (credit * log_q).sum(-1), table)
    expected = gradient(total_divergence(divergence, conditionals), table)
    phi = divergence.phi(FULL_P - conditionals).detach()
    excess = gradient(chance @ (FULL_P.exp() * phi * conditionals).sum((-2, -1)), table)
    close(wrong, expected + excess)
    assert missing(expected, wrong) > 0.5


def test_in_the_reward_the_clip_acts_on_the_penalty_as_on_the_advantage():
    ratios = torch.tensor([[0.5, 0.9, 1.1, 1.5]] * 2, dtype=torch.float64)
    log_policy = torch.full((2, 4), -1.0, dtype=torch.float64, requires_grad=True)
    log_p = log_policy.detach() - torch.tensor([[0.3], [-0.3]], dtype=torch.float64)
    out = GRPO(beta=0.5, place="reward", future=False)(
        log_policy=log_policy,
        log_behaviour=log_policy - ratios.log(),
        rewards=torch.ones(1, 2),  # no advantage but the penalty's
        mask=torch.ones(2, 4, dtype=torch.bool),
        log_p=log_p,
        log_q=log_policy,
    )
    reward = -0.5 * torch.tensor([[0.3], [-0.3]], dtype=torch.float64)  # psi of ReverseKL() is log q/p
    close(out.loss, -torch.minimum(ratios * reward, ratios.clamp(0.8, 1.2) * reward).mean(), 1e-12)
    assert out.metrics["clipped"].item() == 0.25


# -- of whole answers ----------------------------------------------------------------------------------


def divergence_of_answers(divergence, conditionals, mask):
    """D of the answers, which end where the mask does: trajectories that differ later are one answer."""
    log_q = of_tokens(conditionals)
    log_ratio = torch.where(mask, LOG_P - log_q, 0.0).sum(-1)
    return log_q.sum(-1).exp() @ divergence.f(log_ratio)


@pytest.mark.parametrize("place", ["loss", "reward"])
@pytest.mark.parametrize("mask", [ALL, UNTIL_STOP], ids=["whole", "until the stop"])
@each_divergence
def test_the_gradient_of_the_divergence_of_whole_answers_is_exact(divergence, mask, place):
    table, conditionals = policy()
    value = divergence_of_answers(divergence, conditionals, mask)
    if mask is ALL:
        close(value, divergence(LOG_P.sum(-1), of_tokens(conditionals).sum(-1)), 1e-9)
    method = GRPO(divergence, beta=0.7, place=place, level="sequence")
    close(expected_gradient(method, mask), gradient(0.7 * value, table))


@pytest.mark.parametrize("gradients", ["score", "importance"])
@pytest.mark.parametrize("divergence", [fdiv.ReverseKL(), fdiv.KL(), fdiv.JS(0.3)], ids=repr)
def test_of_whole_answers_it_is_exact_off_policy_as_well(divergence, gradients):
    table, conditionals = policy()
    behaviour = of_tokens(along_trajectories(prefix_table(seed=7)))
    method = GRPO(divergence, MonteCarlo("behaviour", gradients), beta=1.0, level="sequence")
    expected = gradient(divergence_of_answers(divergence, conditionals, UNTIL_STOP), table)
    close(expected_gradient(method, UNTIL_STOP, behaviour=behaviour), expected)


def test_of_whole_answers_reverse_kl_has_the_gradient_of_its_sum_over_tokens_and_no_other_has():
    for divergence, same in ((fdiv.ReverseKL(), True), (fdiv.KL(), False), (fdiv.Neyman(), False)):
        tokens, answers = (
            expected_gradient(GRPO(divergence, beta=1.0, level=level)) for level in ("token", "sequence")
        )
        assert (missing(tokens, answers) < 1e-12) == same


def test_the_logged_divergence_of_whole_answers_is_their_mean():
    log_q = of_tokens(policy()[1])
    empty = UNTIL_STOP.clone()
    empty[3] = False  # an answer without a token is no answer
    given = {"log_policy": log_q, "log_behaviour": log_q, "rewards": torch.zeros(1, 27)}
    out = GRPO(fdiv.KL(), level="sequence")(**given, mask=empty, log_p=LOG_P, log_q=log_q)
    log_ratio = torch.where(empty, LOG_P - log_q, 0.0).sum(-1)[empty.any(-1)]
    close(out.metrics["divergence"], fdiv.KL().f(log_ratio).mean())


# -- what is logged ------------------------------------------------------------------------------------


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


def test_with_the_mean_alone_the_advantage_is_not_divided():
    rewards = torch.tensor([[1.0, 0, 0, 1], [3.0, 5, 7, 9]], dtype=torch.float64)
    close(group_advantage(rewards, "mean"), rewards - rewards.mean(1, keepdim=True), 1e-14)
    close(GRPO(advantage="mean").advantages(rewards), group_advantage(rewards, "mean"))
    close(GRPO().advantages(rewards), group_advantage(rewards))
    assert not group_advantage(torch.full((1, 3), 1e6 + 0.7), "mean").any()


def test_groups_may_differ_in_size():
    rewards = torch.tensor([1.0, 0.0, 0.0, 5.0, 6.0, 0.7, 0.7, 0.7, 3.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    each = [group_advantage(rewards[group == i].unsqueeze(0)).squeeze(0) for i in range(3)]
    close(advantage_within(rewards, group), torch.cat([*each, torch.zeros(1).double()]), 1e-13)
    assert not advantage_within(rewards, group)[5:].any()  # alone, or all equal
    assert advantage_within(rewards[:0], group[:0]).shape == (0,)
    close(group_mean(rewards, group)[[0, 3]], torch.tensor([1 / 3, 5.5]).double(), 1e-7)


def test_on_policy_dr_grpo_divides_by_one_length_and_grpos_paper_by_each_answers():
    log_policy, rewards, mask = tokens_and_rewards()
    mask[1, 1:] = mask[2] = False
    given = {"log_policy": log_policy, "log_behaviour": log_policy, "rewards": rewards, "mask": mask}
    terms = torch.where(mask, group_advantage(rewards).reshape(-1, 1) * log_policy, 0.0).sum(1)
    per_answer = -(terms / torch.tensor([3, 1, 1, 3])).sum() / 4  # the third has no token and counts
    out = GRPO(beta=0.0, aggregate="sequences")(**given)
    close(gradient(out.loss, log_policy), gradient(per_answer, log_policy), 1e-13)
    centred = torch.where(mask, (rewards - rewards.mean(1, True)).reshape(-1, 1) * log_policy, 0.0)
    out = GRPO(beta=0.0, aggregate=7, advantage="mean")(**given)
    close(gradient(out.loss, log_policy), gradient(-centred.sum() / (4 * 7), log_policy), 1e-13)
    assert GRPO(aggregate=7).reads == ("advantage", "sequences") and GRPO().reads == ("advantage",)


def test_gspo_clips_whole_answers():
    log_policy, rewards, mask = tokens_and_rewards()
    behaviour = log_policy.detach() - torch.tensor([[0.3, 0.1, 0.2], [0.5, 0.5, 0.5]] * 2).double()
    method = GRPO(beta=0.0, clip=(0.1, 0.3), ratio="sequence", aggregate="sequences")
    loss = method(log_policy=log_policy, log_behaviour=behaviour, rewards=rewards, mask=mask).loss
    s = (log_policy - behaviour).mean(1).exp()
    a = group_advantage(rewards).flatten()
    expected = -torch.minimum(s * a, s.clamp(0.9, 1.3) * a).mean()
    close(loss, expected, 1e-13)
    close(gradient(loss, log_policy), gradient(expected, log_policy), 1e-13)


def test_without_a_clip_off_policy_gains_are_weighted_and_no_more():
    log_policy, rewards, mask = tokens_and_rewards()
    behaviour = log_policy.detach() - 2.0
    loss = GRPO(beta=0.0, clip=None)(
        log_policy=log_policy, log_behaviour=behaviour, rewards=rewards, mask=mask
    ).loss
    a = group_advantage(rewards).reshape(-1, 1)
    close(gradient(loss, log_policy), (-(torch.e**2) * a / 12).expand(4, 3).flatten(), 1e-13)


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


@pytest.mark.parametrize(
    "method",
    [
        GRPO(beta=0.5),
        GRPO(estimator=MonteCarlo("behaviour"), beta=0.5),
        GRPO(beta=0.5, place="reward"),
        GRPO(beta=0.5, level="sequence", aggregate="sequences"),
        GRPO(beta=0.5, place="reward", level="sequence", ratio="sequence", aggregate=9, advantage="mean"),
    ],
    ids=repr,
)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(method):
    log_policy, rewards, mask = tokens_and_rewards()
    mask[0, 1:] = False
    log_p, behaviour = torch.full_like(log_policy, -1.0), log_policy.detach() - 0.1

    def loss(rows, groups):
        part = log_policy[rows]
        return method(
            log_policy=part,
            log_behaviour=behaviour[rows],
            rewards=rewards[groups],
            mask=mask[rows],
            count=mask.sum(),
            sequences=4,
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


# -- what may go wrong ---------------------------------------------------------------------------------


def far_batch(dtype, log_p=None):
    """Four answers of three tokens whose log-ratios to the reference and to who wrote them are enormous."""
    log_policy = torch.full((4, 3), -1.0, dtype=dtype).requires_grad_()
    far = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 1e4, 1e4], [-1e4] * 3, [-100.0, 100.0, 50.0]], dtype=dtype)
    return {
        "log_policy": log_policy,
        "log_behaviour": log_policy.detach() + far.flip(0),
        "rewards": torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype),
        "mask": torch.ones(4, 3, dtype=torch.bool),
        "log_p": log_policy.detach() + far if log_p is None else log_p,
        "log_q": log_policy,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", [fdiv.ReverseKL(), fdiv.KL(), fdiv.JS(0.5), fdiv.Neyman()], ids=repr)
@pytest.mark.parametrize(
    "options",
    [{}, {"place": "reward"}, {"level": "sequence"}, {"level": "sequence", "place": "reward", "clip": None}],
    ids=repr,
)
def test_enormous_ratios_give_finite_losses_and_gradients(divergence, options, dtype):
    given = far_batch(dtype)
    out = GRPO(divergence, **options)(**given)
    assert out.loss.isfinite() and gradient(out.loss, given["log_policy"]).isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("divergence", [fdiv.ReverseKL(), fdiv.KL(), fdiv.JS(0.5), fdiv.Neyman()], ids=repr)
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_sampled_token_that_the_reference_excludes_has_a_finite_price(divergence, place):
    given = far_batch(torch.float64, log_p=torch.full((4, 3), -torch.inf, dtype=torch.float64))
    given["log_behaviour"] = given["log_policy"].detach()
    out = GRPO(divergence, place=place)(**given)
    assert out.loss.isfinite() and gradient(out.loss, given["log_policy"]).isfinite().all()


def test_a_vocabulary_that_the_reference_excludes_is_refused_where_the_divergence_is_infinite():
    _, conditionals = policy()
    log_q = of_tokens(conditionals)
    given = {"log_policy": log_q, "log_behaviour": log_q, "rewards": torch.zeros(1, 27), "mask": ALL}
    log_p = FULL_P.masked_fill(torch.tensor([True, False, False]), -torch.inf)
    with pytest.raises(ValueError, match=r"infinite at 81 sampled prefixes.*JS\(0.5\)"):
        GRPO(fdiv.ReverseKL(), Exact())(**given, log_p=log_p, log_q=conditionals)
    assert GRPO(fdiv.JS(0.5), Exact())(**given, log_p=log_p, log_q=conditionals).loss.isfinite()


@pytest.mark.parametrize(
    "options", [{}, {"place": "reward"}, {"level": "sequence", "aggregate": "sequences"}]
)
@pytest.mark.parametrize("rows", [0, 4])
def test_without_any_token_the_loss_is_zero_and_keeps_its_graph(rows, options):
    given = {name: tensor[:rows] for name, tensor in far_batch(torch.float64).items() if name != "rewards"}
    given["mask"] = torch.zeros_like(given["mask"])
    out = GRPO(**options)(**given, advantage=torch.ones(rows))
    assert out.loss == 0 and not gradient(out.loss, given["log_policy"]).any()
    assert all(value.isfinite() for value in out.metrics.values())


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
    for settings, message in (
        ({"beta": -0.1}, "maximises"),
        ({"beta": float("nan")}, "maximises"),
        ({"clip": 0.0}, "between 0 and 1"),
        ({"aggregate": "batch"}, "aggregate is 'tokens'"),
        ({"place": "value"}, "place is 'loss' or 'reward'"),
        ({"level": "vocabulary"}, "level is 'token' or 'sequence'"),
        ({"ratio": "batch"}, "ratio is 'token' or 'sequence'"),
        ({"advantage": "max"}, "advantage is 'std' or 'mean'"),
    ):
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


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"beta": 0.0, "place": "reward"}, ValueError, "no penalty to put into the reward"),
        ({"beta": 0.0, "level": "sequence"}, ValueError, "beta=0 turns off"),
        ({"estimator": Exact(), "place": "reward"}, TypeError, "one number a token"),
        ({"estimator": Exact(), "level": "sequence"}, TypeError, "a sum over all answers"),
        ({"estimator": TopK(2), "level": "sequence"}, TypeError, "a sum over all answers"),
        ({"estimator": MonteCarlo("behaviour"), "place": "reward"}, TypeError, "would do so again"),
        ({"level": "sequence", "future": False}, ValueError, "no later tokens"),
        ({"ratio": "sequence", "place": "reward"}, ValueError, "differs from token to token"),
    ],
    ids=repr,
)
def test_combinations_that_are_known_to_be_wrong_are_refused_with_the_reason(settings, error, reason):
    with pytest.raises(error, match=reason):
        GRPO(**settings)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    for method in (
        GRPO(fdiv.JS(0.1), TopK(8), beta=0.1, future=False),
        GRPO(clip=(0.2, 0.28), place="reward", level="sequence", ratio="sequence", aggregate=512),
        GRPO(clip=None, advantage="mean"),
    ):
        assert fdiv.parse(repr(method)) == method
        assert isinstance(method, Method)
