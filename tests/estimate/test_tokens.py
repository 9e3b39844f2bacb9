"""Divergences along sequences over all 27 trajectories of three tokens; and the wrong sums, measured."""

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
from fdiv import Exact, MonteCarlo
from fdiv.estimate.tokens import later, per_sequence, per_token, prefix_weight

FULL_P = along_trajectories(prefix_table(seed=1))  # [27, 3, 3]
LOG_P = of_tokens(FULL_P)
LOG_BEHAVIOUR = of_tokens(along_trajectories(prefix_table(seed=3)))
ALL = torch.ones(27, 3, dtype=torch.bool)
UNTIL_STOP = torch.cat([torch.ones(27, 1), (TRAJECTORIES[:, :2] != 2).cumprod(1)], dim=1).bool()

MODES = ("score", "importance", "potential", "straight-through")
ON_POLICY = [*(MonteCarlo("q", mode) for mode in MODES), Exact()]
OFF_POLICY = [*(MonteCarlo("behaviour", mode) for mode in MODES[:2]), Exact()]
each_estimator = pytest.mark.parametrize("estimator", ON_POLICY, ids=repr)
each_off_policy = pytest.mark.parametrize("estimator", OFF_POLICY, ids=repr)
each_monte_carlo = pytest.mark.parametrize("estimator", [*ON_POLICY[:-1], *OFF_POLICY[:-1]], ids=repr)


def policy():
    table = prefix_table(seed=2).requires_grad_()
    return table, along_trajectories(table)


def evidence(estimator, conditionals):
    if estimator.sees == "logits":
        return FULL_P, conditionals
    return (LOG_P, of_tokens(conditionals), LOG_BEHAVIOUR)[: len(estimator.evidence)]


def total(divergence, conditionals, mask=ALL):
    """E_q[sum_i D(p, q)(.|s_i)]."""
    chance = of_tokens(conditionals).sum(-1).exp()
    return chance @ torch.where(mask, divergence(FULL_P, conditionals), 0.0).sum(-1)


def on_average(rows, log_sampler, table):
    """The gradient of the rows' sum, averaged over who wrote the text."""
    return gradient(log_sampler.sum(-1).exp().detach() @ rows.sum(-1), table)


def along(estimator, divergence, mask=ALL, **options):
    """(table, conditionals, per_token's gradient on policy)"""
    table, conditionals = policy()
    log_q = of_tokens(conditionals)
    rows = per_token(estimator, divergence, evidence(estimator, conditionals), log_q, mask, **options)
    return table, conditionals, on_average(rows.surrogate, log_q, table)


def missing(right, wrong):
    return ((wrong - right).norm() / right.norm()).item()


# -- the sum over tokens -------------------------------------------------------------------------------


@each_estimator
@each_divergence
def test_own_score_and_later_values_are_the_exact_gradient(divergence, estimator):
    table, conditionals, actual = along(estimator, divergence)
    close(actual, gradient(total(divergence, conditionals), table))


@each_estimator
@each_divergence
def test_the_values_average_to_the_sum_over_tokens(divergence, estimator):
    _, conditionals = policy()
    log_q = of_tokens(conditionals)
    rows = per_token(estimator, divergence, evidence(estimator, conditionals), log_q, UNTIL_STOP)
    close(log_q.sum(-1).exp() @ rows.value.sum(-1), total(divergence, conditionals, UNTIL_STOP))
    assert not rows.value.requires_grad
    if getattr(estimator, "gradient", None) != "potential":
        assert torch.equal(rows.surrogate, rows.value)


@each_estimator
def test_tokens_after_the_stop_may_be_anything(estimator):
    divergence = fdiv.JS(0.1)
    table, conditionals = policy()
    expected = gradient(total(divergence, conditionals, UNTIL_STOP), table)
    for rubbish in (-math.inf, math.inf, math.nan):

        def spoilt(tensor, rubbish=rubbish):
            mask = UNTIL_STOP if tensor.ndim == 2 else UNTIL_STOP.unsqueeze(-1)
            return torch.where(mask, tensor, rubbish)

        log_q = of_tokens(conditionals)
        tensors = [spoilt(t) for t in evidence(estimator, conditionals)]
        rows = per_token(estimator, divergence, tensors, spoilt(log_q), UNTIL_STOP)
        close(on_average(rows.surrogate, log_q, table), expected)
        assert not rows.surrogate[~UNTIL_STOP].any()


@each_off_policy
@each_divergence
def test_written_by_another_policy_it_is_exact_with_the_weight_of_the_prefix(divergence, estimator):
    table, conditionals = policy()
    log_q = of_tokens(conditionals)
    weight = prefix_weight(log_q, LOG_BEHAVIOUR, UNTIL_STOP)
    tensors = evidence(estimator, conditionals)
    rows = per_token(estimator, divergence, tensors, log_q, UNTIL_STOP, weight=weight)
    truth = total(divergence, conditionals, UNTIL_STOP)
    close(LOG_BEHAVIOUR.sum(-1).exp() @ rows.value.sum(-1), truth)
    close(on_average(rows.surrogate, LOG_BEHAVIOUR, table), gradient(truth, table))
    plain = per_token(estimator, divergence, tensors, log_q, UNTIL_STOP)
    assert missing(gradient(truth, table), on_average(plain.surrogate, LOG_BEHAVIOUR, table)) > 0.1


# -- the wrong sums ------------------------------------------------------------------------------------

WITHOUT_FUTURE = (
    (fdiv.ReverseKL(), 0.1945),
    (fdiv.KL(), 0.1315),
    (fdiv.JS(0.5), 0.1666),
    (fdiv.Neyman(), 0.2494),
    (fdiv.Pearson(), 0.0979),
    (fdiv.TV(), 0.2566),
)


@each_estimator
@pytest.mark.parametrize(("divergence", "error"), WITHOUT_FUTURE, ids=repr)
def test_without_the_future_a_known_part_is_missing(divergence, error, estimator):
    table, conditionals, partial = along(estimator, divergence, future=False)
    chance = of_tokens(conditionals).sum(-1).exp().detach()  # the states held fixed
    close(partial, gradient(chance @ divergence(FULL_P, conditionals).sum(-1), table))
    assert missing(gradient(total(divergence, conditionals), table), partial) == pytest.approx(
        error, abs=1e-4
    )


VALUES_ALONE = (
    (fdiv.ReverseKL(), 1.5344),
    (fdiv.KL(), 1.7163),
    (fdiv.JS(0.5), 1.6718),
    (fdiv.Neyman(), 1.2315),
    (fdiv.Pearson(), 1.6234),
    (fdiv.TV(), 1.8326),
)


@pytest.mark.parametrize(("divergence", "error"), VALUES_ALONE, ids=repr)
def test_values_as_rewards_of_all_tokens_miss_what_moves_in_each_divergence(divergence, error):
    table, conditionals = policy()
    log_q = of_tokens(conditionals)
    value = MonteCarlo()(divergence, LOG_P, log_q)
    wrong = on_average((value + later(value)).detach() * log_q, log_q, table)
    right = gradient(total(divergence, conditionals), table)
    pathwise = on_average(value, log_q, table)  # k3 in the loss, for reverse KL
    close(wrong + pathwise, right)
    assert missing(right, wrong) == pytest.approx(error, abs=1e-4)


# -- whole sequences -----------------------------------------------------------------------------------


def whole(divergence, conditionals, mask=ALL):
    """D of the distributions of texts cut at the stop."""
    texts = torch.where(mask, TRAJECTORIES, -1).unique(dim=0, return_inverse=True)[1]
    log_p, log_q = (
        torch.zeros(texts.max() + 1, dtype=torch.float64).index_add(0, texts, t.sum(-1).exp()).log()
        for t in (LOG_P, of_tokens(conditionals))
    )
    return divergence(log_p, log_q)


@each_monte_carlo
@each_divergence
def test_the_ratio_of_whole_sequences_gives_their_divergence(divergence, estimator):
    table, conditionals = policy()
    rows = per_sequence(estimator, divergence, evidence(estimator, conditionals), UNTIL_STOP)
    log_sampler = LOG_BEHAVIOUR if estimator.samples == "behaviour" else of_tokens(conditionals)
    truth = whole(divergence, conditionals, UNTIL_STOP)
    close(log_sampler.sum(-1).exp() @ rows.value.sum(-1), truth)
    close(on_average(rows.surrogate, log_sampler, table), gradient(truth, table))
    assert not rows.surrogate[~UNTIL_STOP].any()


def test_only_for_reverse_kl_are_the_two_sums_the_same():
    table, conditionals = policy()
    log_q = of_tokens(conditionals)
    for divergence, same in ((fdiv.ReverseKL(), True), (fdiv.KL(), False), (fdiv.Neyman(), False)):
        sequence = per_sequence(MonteCarlo(), divergence, (LOG_P, log_q), ALL).surrogate
        *_, tokens = along(MonteCarlo(), divergence)
        error = missing(tokens, on_average(sequence, log_q, table))
        assert error < 1e-12 if same else error > 0.05


# -- edges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_divergence
def test_no_log_probability_makes_anything_overflow(divergence, dtype):
    edges = torch.tensor([-1.0, -1e4, -math.inf], dtype=dtype)
    log_p, log_q, log_b = (t.reshape(9, 3) for t in torch.meshgrid(edges, edges, edges, indexing="ij"))
    log_q = log_q.clone().requires_grad_()
    mask = torch.ones(9, 3, dtype=torch.bool)
    mask[4] = False  # an empty answer
    for estimator in (*ON_POLICY[:-1], *OFF_POLICY[:-1]):
        tensors = (log_p, log_q, log_b)[: len(estimator.evidence)]
        for rows in (
            per_token(estimator, divergence, tensors, log_q, mask),
            per_sequence(estimator, divergence, tensors, mask),
        ):
            assert rows.surrogate.isfinite().all() and rows.value.isfinite().all()
            assert torch.autograd.grad(rows.surrogate.sum(), log_q)[0].isfinite().all(), estimator
            assert not rows.surrogate[4].any()
    assert prefix_weight(log_q, log_b, mask).isfinite().all()


def test_an_infinite_divergence_at_a_later_token_moves_nothing():
    """A vocabulary of two, of which the reference forbids one at the second token."""
    log_p = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).log()
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    log_q = logits.log_softmax(-1)
    rows = per_token(Exact(), fdiv.ReverseKL(), (log_p, log_q), log_q[..., 0], torch.ones(1, 2).bool())
    assert rows.value[0].tolist() == [0.0, math.inf]
    assert not gradient(rows.surrogate.sum(), logits).any()


def test_wrong_evidence_and_masks_are_refused():
    with pytest.raises(TypeError, match=r"write MonteCarlo\(\)"):
        per_sequence(Exact(), fdiv.KL(), (FULL_P, FULL_P), ALL)
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        per_token(MonteCarlo(), fdiv.KL(), (LOG_P, LOG_P), LOG_P, ALL.long())
    with pytest.raises(ValueError, match="differ in shape"):
        per_token(MonteCarlo(), fdiv.KL(), (LOG_P, LOG_P), LOG_P, ALL[:, :2])
