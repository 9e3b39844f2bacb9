"""f-DPG: its expected gradient over all 27 answers against the gradient of the divergence itself."""

import math

import pytest
import torch
from tests.worlds import (
    DIVERGENCES,
    along_trajectories,
    close,
    each_divergence,
    each_other_object,
    gradient,
    of_tokens,
    prefix_table,
)
from torch.nn.functional import softplus

import fdiv
from fdiv import JS, KL, TV, Jeffreys, Neyman, Pearson, ReverseKL
from fdiv.methods._method import Adaptive, Method
from fdiv.methods.match.fdpg import FDPG
from fdiv.methods.match.partition import Partition, prompt_keys
from fdiv.methods.match.target import Target, Tilt

PLUGINS = ["fdiv.methods.match.target", "fdiv.methods.match.fdpg"]
BASE = of_tokens(along_trajectories(prefix_table(seed=1))).sum(-1)  # log a, [27]
OTHER = of_tokens(along_trajectories(prefix_table(seed=3)))  # who writes off-policy, [27, 3]
REWARD = torch.linspace(-1, 1, 27, dtype=torch.float64)[torch.arange(27) * 5 % 27]
TILTED = BASE + REWARD / 0.5 + 0.7  # log P; the last makes Z another than 1
SOME = torch.arange(27) % 3 > 0
RESTRICTED = torch.where(SOME, BASE, -math.inf)
ALL = torch.ones(27, 3, dtype=torch.bool)
FINITE = [d for d in DIVERGENCES if math.isfinite(d.f_at_zero)]
each_finite_divergence = pytest.mark.parametrize("divergence", FINITE, ids=repr)


def policy():
    """(table, log-probabilities of the tokens [27, 3]) of the policy."""
    table = prefix_table(seed=2).requires_grad_()
    return table, of_tokens(along_trajectories(table))


def exact(divergence, log_target):
    """The gradient of D(P / Z, policy) in the policy's table."""
    table, tokens = policy()
    return gradient(divergence(log_target.log_softmax(0), tokens.sum(-1)), table)


def given(log_target, tokens, behaviour=None, **more):
    """What the method is called with; log Z is exact."""
    return {
        "log_policy": tokens,
        "log_behaviour": tokens.detach() if behaviour is None else behaviour,
        "mask": torch.ones_like(tokens, dtype=torch.bool),
        "log_target": log_target,
        "log_partition": log_target.logsumexp(0).expand(len(tokens)),
    } | more


def expected(method, log_target, behaviour=None, baseline=0.0):
    """The method's gradient on one answer, averaged over all that the writer can write."""
    table, tokens = policy()
    leaf = tokens.detach().requires_grad_()
    state = method.initial_state() | {"baseline": baseline}
    out = method(**given(log_target, leaf, behaviour, state=state), sequences=1)
    (each,) = torch.autograd.grad(out.loss, leaf)
    chance = (tokens.detach() if behaviour is None else behaviour).sum(-1).exp()
    return gradient((chance[:, None] * each * tokens).sum(), table)


# -- the gradient --------------------------------------------------------------------------------------


@each_divergence
def test_the_expected_gradient_is_that_of_the_divergence(divergence):
    close(expected(FDPG(divergence), TILTED), exact(divergence, TILTED))


@each_divergence
def test_it_is_so_for_answers_of_another_writer(divergence):
    close(expected(FDPG(divergence), TILTED, OTHER), exact(divergence, TILTED))


@each_finite_divergence
@pytest.mark.parametrize("behaviour", [None, OTHER], ids=["on-policy", "off-policy"])
def test_it_is_so_where_the_target_has_no_mass_at_some_answers(divergence, behaviour):
    close(expected(FDPG(divergence), RESTRICTED, behaviour), exact(divergence, RESTRICTED))


@each_finite_divergence
def test_a_baseline_leaves_the_expected_gradient_as_it_is(divergence):
    for behaviour in (None, OTHER):
        with_one = expected(FDPG(divergence), RESTRICTED, behaviour, baseline=-1.7)
        close(with_one, exact(divergence, RESTRICTED))


@each_divergence
def test_at_the_target_the_gradient_is_zero(divergence):
    _, tokens = policy()
    leaf = tokens.detach().requires_grad_()
    out = FDPG(divergence)(**given(leaf.detach().sum(-1) + 3.0, leaf))
    assert gradient(out.loss, leaf).abs().max() < 1e-13


# Pseudo-rewards at l = log(policy / target), as the paper has them; ours differ by a constant.
L = torch.tensor([-6.0, -2.0, -0.3, 0.0, 0.4, 1.5, 5.0], dtype=torch.float64)
REWARDS = [
    (KL(), lambda x: (-x).exp(), 1.0, 0.0),
    (ReverseKL(), lambda x: -(x + 1), -1.0, None),
    (2 * JS(0.5), lambda x: softplus(-x) - math.log(2), 0.0, -math.log(2)),
    (TV(), lambda x: -torch.sign(x) / 2, 0.0, -0.5),
    (Pearson(), lambda x: (-2 * x).exp() - 1, 0.0, -1.0),
    (Neyman(), lambda x: -2 * x.expm1(), 0.0, None),
]


@pytest.mark.parametrize(
    ("divergence", "reward", "constant", "outside"), REWARDS, ids=[repr(row[0]) for row in REWARDS]
)
def test_the_pseudo_rewards_are_the_papers(divergence, reward, constant, outside):
    """Up to a constant; outside of the target's support (l = +inf) they are finite, or None."""
    for x, wanted in zip(L, reward(L), strict=True):
        log_q = torch.tensor([[-1.0 + x]], dtype=torch.float64)
        out = FDPG(divergence)(
            **given(torch.tensor([-1.0], dtype=torch.float64), log_q, log_partition=L[3:4])
        )
        close(out.metrics["pseudo_reward"] + constant, wanted, 1e-13)
    assert math.isfinite(divergence.f_at_zero) == (outside is not None)
    if outside is not None:
        out = FDPG(divergence)(**given(torch.tensor([-math.inf]), torch.tensor([[-1.0]]).double()))
        assert out.metrics["pseudo_reward"].item() + constant == pytest.approx(outside, abs=1e-13)
        assert out.metrics["rejected"] == 1


# -- special cases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_reverse_kl_to_a_tilted_base_is_rlhf_with_a_kl_penalty(beta):
    log_target = BASE + REWARD / beta
    table, tokens = policy()
    log_q = tokens.sum(-1)
    rlhf = log_q.exp() @ (REWARD - beta * (log_q - BASE))  # E_pi[r] - beta KL(pi, a)
    close(expected(FDPG(ReverseKL()), log_target), -gradient(rlhf, table) / beta)


def test_kl_is_distributional_policy_gradient():
    """Each answer weighs P / (Z q) in the gradient of its log-probability, less the constant 1."""
    _, tokens = policy()
    leaf = tokens.detach().requires_grad_()
    out = FDPG(KL())(**given(RESTRICTED, leaf, OTHER), sequences=1)
    weight = (RESTRICTED - RESTRICTED.logsumexp(0) - OTHER.sum(-1)).exp()
    ratio = (tokens - OTHER).sum(-1).exp().detach()
    (each,) = torch.autograd.grad(out.loss, leaf)
    close(each, -(weight - ratio)[:, None].expand(27, 3))


def test_kl_to_the_restricted_base_has_the_gradient_of_maximum_likelihood_on_accepted_answers():
    table, tokens = policy()
    likelihood = RESTRICTED.softmax(0) @ tokens.sum(-1)
    close(expected(FDPG(KL()), RESTRICTED), -gradient(likelihood, table))


# -- numbers -------------------------------------------------------------------------------------------


def test_the_metrics_are_expectations_at_the_policys_own_answers():
    """27 answers, of which each is drawn with probability 1/27."""
    log_q = torch.full((27, 3), -math.log(3), dtype=torch.float64)
    out = FDPG()(**given(RESTRICTED, log_q))
    log_p, even = RESTRICTED.log_softmax(0), log_q.sum(-1)
    close(out.metrics["divergence"], JS()(log_p, even))
    close(out.metrics["log_partition"], RESTRICTED.logsumexp(0))
    close(out.metrics["rejected"], 1 - SOME.double().mean())
    close(out.metrics["ess"], 1 / (27 * log_p.exp().square().sum()))
    close(out.metrics["ratio"], torch.ones((), dtype=torch.float64))
    close(out.metrics["baseline"], torch.zeros((), dtype=torch.float64))
    assert not any(number.requires_grad for number in out.metrics.values())


def test_loss_and_metrics_of_micro_batches_add_up():
    _, tokens = policy()
    mask = ALL.clone()
    mask[3:8, 1:] = False
    method, whole = FDPG(Pearson()), given(TILTED, tokens, OTHER, mask=mask)
    out, parts = method(**whole), []
    for rows in (slice(0, 6), slice(6, 7), slice(7, 27)):
        part = {name: tensor[rows] for name, tensor in whole.items()}
        parts.append((method(**part, sequences=27, count=mask.sum()), mask[rows].sum().double() / mask.sum()))
    close(sum(part.loss for part, _ in parts), out.loss)
    for name in ("pseudo_reward", "divergence", "rejected", "log_partition", "ratio"):
        close(sum(part.metrics[name] * share for part, share in parts), out.metrics[name])


def test_neither_writer_nor_target_receives_a_gradient_and_masked_tokens_do_not_count():
    _, tokens = policy()
    leaf, mask = tokens.detach().requires_grad_(), ALL.clone()
    mask[:, 2] = False
    others = [t.clone().requires_grad_() for t in (OTHER, TILTED)]
    out = FDPG()(**given(others[1], leaf, others[0], mask=mask))
    out.loss.backward(retain_graph=True)
    assert leaf.grad[:, :2].all() and not leaf.grad[:, 2].any()
    assert all(t.grad is None for t in others)
    for rubbish in (math.nan, -math.inf):
        spoilt = torch.where(mask, leaf, rubbish)
        again = FDPG()(**given(others[1], spoilt, torch.where(mask, OTHER, rubbish), mask=mask))
        close(gradient(again.loss, leaf), gradient(out.loss, leaf))


# -- off the beaten track ------------------------------------------------------------------------------


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_away_and_empty_answers_have_finite_gradients(divergence, dtype):
    log_q = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-1.0, -1.0], [-5.0, -1e4]], dtype=dtype)
    log_q.requires_grad_()
    mask = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    log_target = torch.tensor([1e4, -1e4, -1e4, 0.0], dtype=torch.float64)
    inputs = given(log_target, log_q, mask=mask, log_partition=torch.zeros(4))
    out = FDPG(divergence)(**inputs)
    grad = gradient(out.loss, log_q)
    assert out.loss.isfinite() and grad.isfinite().all()
    assert not grad.reshape(4, 2)[~mask].any()


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_the_effective_sample_size_does_not_depend_on_the_scale_of_the_target(far):
    _, tokens = policy()
    near, moved = (FDPG()(**given(TILTED + s, tokens, log_partition=torch.zeros(27))) for s in (0.0, far))
    close(moved.metrics["ess"], near.metrics["ess"], 1e-9)


def test_a_prompt_without_any_accepted_answer_still_pushes_its_answers_down():
    """p is 0 at each of them, whatever Z is."""
    log_q = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    none = torch.full((2,), -math.inf)
    out = FDPG(2 * JS())(**given(none, log_q, log_partition=none))
    close(out.loss, torch.tensor(math.log(2) * -3.0, dtype=torch.float64))
    close(gradient(out.loss, log_q), torch.full((6,), math.log(2) / 2, dtype=torch.float64))
    assert out.metrics["rejected"] == 1 and out.metrics["ess"] == 0 and out.metrics["log_partition"] == 0


@pytest.mark.parametrize("divergence", [ReverseKL(), Neyman(), Jeffreys(), fdiv.Alpha(-0.5)], ids=repr)
def test_a_divergence_that_forbids_an_answer_without_mass_is_refused_when_there_is_one(divergence):
    if math.isfinite(divergence.f_at_zero):
        divergence = divergence.reverse
    _, tokens = policy()
    with pytest.raises(ValueError, match=r"9 of 27 answers have no mass.*KL\(\), JS\(\).*Tilt\(beta\)"):
        FDPG(divergence)(**given(RESTRICTED, tokens))
    FDPG(divergence)(**given(TILTED, tokens))


def test_what_has_no_finite_estimate_is_refused():
    _, tokens = policy()
    for changes, message in (
        ({"log_behaviour": tokens.detach() - 4e4}, r"reach e\^1.2e\+05.*too old"),
        ({"log_behaviour": tokens.detach() - math.inf}, "no finite log-probability"),
        ({"log_policy": tokens - math.inf}, "no finite log-probability"),
        ({"log_partition": torch.full((27,), -math.inf)}, "Z is 0 beside"),
        ({"log_partition": torch.full((27,), math.nan)}, "nan or"),
        ({"log_target": TILTED + math.inf}, "nan or"),
    ):
        with pytest.raises((ValueError, FloatingPointError), match=message):
            FDPG()(**given(TILTED, tokens) | changes)


# -- what follows the training -------------------------------------------------------------------------


def test_the_baseline_is_the_mean_of_past_pseudo_rewards():
    method = FDPG(horizon=3)
    state, seen = method.initial_state(), []
    for reward in (4.0, -2.0, 1.0):
        state = method.advance(state, {"pseudo_reward": reward}, 0.0)
        seen.append(reward)
        assert state["baseline"] == pytest.approx(sum(seen) / len(seen))
    state = method.advance(state, {"pseudo_reward": 7.0}, 0.0)
    assert state["baseline"] == pytest.approx(1 + (7 - 1) / 3)
    without = FDPG(baseline=False)
    assert without.advance(without.initial_state(), {"pseudo_reward": 7.0}, 0.0)["baseline"] == 0


def test_the_first_step_has_no_baseline():
    _, tokens = policy()
    assert FDPG()(**given(TILTED, tokens)).metrics["baseline"] == 0
    assert set(FDPG().initial_state()) == {"baseline", "baseline_steps"}


def test_the_gain_of_a_lagged_proposal_is_how_much_nearer_the_policy_is_in_kl():
    _, tokens = policy()
    chance = OTHER.sum(-1).exp()
    leaf, method = tokens.detach(), FDPG(proposal="lagged")
    gains = torch.stack(
        [
            method(**{name: t[i : i + 1] for name, t in given(TILTED, leaf, OTHER).items()}).metrics["gain"]
            for i in range(27)
        ]
    )
    log_p = TILTED.log_softmax(0)
    close(chance @ gains, KL()(log_p, OTHER.sum(-1)) - KL()(log_p, leaf.sum(-1)))


def test_a_lagged_proposal_is_renewed_every_few_steps_if_the_policy_is_better():
    method = FDPG(proposal="lagged", every=2, baseline=False)
    state, adopted = method.initial_state(), []
    for gain in (0.3, -0.1, -0.3, 0.1, -0.2, 0.3):
        state = method.advance(state, {"pseudo_reward": 0.0, "gain": gain}, 0.0)
        adopted.append(state["adopt"])
    assert adopted == [0, 1, 0, 0, 0, 1]


# -- the partition -------------------------------------------------------------------------------------


def test_the_partition_is_unbiased_while_the_writer_changes():
    """All pairs of a policy's answer at one step and another writer's at the next, with their chances."""
    first = policy()[1].detach().sum(-1)
    second = OTHER.sum(-1)
    total = 0.0
    for i in range(27):
        for j in range(27):
            partition = Partition({})
            partition.update(torch.zeros(1).long(), RESTRICTED[i : i + 1], first[i : i + 1])
            log_z = partition.update(torch.zeros(1).long(), RESTRICTED[j : j + 1], second[j : j + 1])
            total += (first[i] + second[j] + log_z).exp().item()
    assert total == pytest.approx(RESTRICTED.exp().sum().item(), rel=1e-12)


def test_the_partition_of_each_prompt_is_the_mean_of_its_own_weights():
    memory = {}
    partition = Partition(memory)
    assert not memory and partition.of(torch.tensor([7])).isnan().all()
    keys = torch.tensor([7, -3, 7, 7])
    weights = torch.tensor([2.0, 5.0, 4.0, 0.0], dtype=torch.float64)
    drawn = torch.tensor([-1.0, -700.0, -2.0, -1e3], dtype=torch.float64)
    close(partition.update(keys, weights.log() + drawn, drawn).exp(), torch.tensor([2, 5, 2, 2]).double())
    again = partition.update(torch.tensor([-3, 11]), torch.tensor([0.0, -math.inf]), torch.zeros(2))
    close(again.exp(), torch.tensor([3.0, 0.0]).double())
    close(Partition(memory).of(torch.tensor([7, 11, -3])).exp(), torch.tensor([2.0, 0.0, 3.0]).double())
    assert Partition(memory).of(torch.tensor([12, -9])).isnan().all()
    assert sorted(memory) == ["partition_count", "partition_key", "partition_log_sum"]


def test_the_partition_does_not_overflow_and_refuses_what_cannot_be():
    partition, key = Partition({}), torch.zeros(2).long()
    logs = torch.tensor([5e4, 5e4 + math.log(3)], dtype=torch.float64)
    close(
        partition.update(key, logs, torch.zeros(2)),
        torch.full((2,), 5e4 + math.log(2), dtype=torch.float64),
        1e-15,
    )
    for target, drawn in (([0.0, 0.0], [-math.inf, 0.0]), ([math.nan, 0.0], [0.0, 0.0])):
        with pytest.raises(ValueError, match="infinite or nan"):
            partition.update(key, torch.tensor(target), torch.tensor(drawn))
    with pytest.raises(ValueError, match=r"\[B\] each"):
        partition.update(key, torch.zeros(3), torch.zeros(2))


def test_prompts_are_told_apart_by_their_tokens_without_padding():
    keys = prompt_keys(torch.tensor([[1, 2, -1], [1, 2, -1], [1, 2, 3], [2, 1, -1]]))
    assert keys[0] == keys[1] and len(keys.unique()) == 3
    assert prompt_keys(torch.tensor([[1, 2]])).item() == keys[0].item()


# -- training ------------------------------------------------------------------------------------------


def trained(method, log_target, steps=150, batch=64):
    """D(p, q) before and after training on sampled answers, with log Z estimated on the way."""
    generator = torch.Generator().manual_seed(0)
    table = prefix_table(seed=2).requires_grad_()
    proposal = table.detach().clone()
    optimizer = torch.optim.Adam([table], lr=0.07)
    state, partition, distances = method.initial_state(), Partition({}), []
    for _ in range(steps + 1):
        tokens = of_tokens(along_trajectories(table))
        distances.append(method.divergence(log_target.log_softmax(0), tokens.sum(-1)).item())
        lagged = method.proposal == "lagged"
        written = of_tokens(along_trajectories(proposal)) if lagged else tokens.detach()
        index = torch.multinomial(written.sum(-1).exp(), batch, replacement=True, generator=generator)
        log_z = partition.update(torch.zeros(batch).long(), log_target[index], written[index].sum(-1))
        inputs = given(log_target[index], tokens[index], written[index], log_partition=log_z, state=state)
        out = method(**inputs)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        state = method.advance(state, {name: number.item() for name, number in out.metrics.items()}, 0.0)
        if state.get("adopt"):
            proposal = table.detach().clone()
    return distances[0], sum(distances[-10:]) / 10


@pytest.mark.parametrize(
    ("method", "log_target"),
    [
        (FDPG(JS()), RESTRICTED),
        (FDPG(Pearson(), proposal="lagged"), RESTRICTED),
        (FDPG(ReverseKL()), TILTED),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_training_on_samples_approaches_the_target(method, log_target):
    before, after = trained(method, log_target)
    assert after < 0.05 * before


# -- the object ----------------------------------------------------------------------------------------


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"target": "Accept()"}, r"write Target\(\) \* Accept\(\)"),
        ({"proposal": "old"}, "'policy' or 'lagged'"),
        ({"every": 0}, "every is a number of steps"),
        ({"horizon": 0}, "horizon is a number of steps"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            FDPG(**settings)


@each_other_object
def test_another_object_than_an_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="FDPG takes an f-divergence"):
        FDPG(other)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = FDPG(2 * JS(0.5), Target() * Tilt(0.3, "package.module:reward"), proposal="lagged", every=4)
    assert fdiv.parse(repr(method), PLUGINS) == method
    text = "FDPG(KL(), Target() * Tilt(0.3, 'package.module:reward'))"
    assert fdiv.parse(text, PLUGINS) == FDPG(KL(), method.target)
    assert isinstance(method, Method) and isinstance(method, Adaptive)
