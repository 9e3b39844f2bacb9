"""BD-KD: which of the two divergences is weighted up, and nothing else."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, KL, Exact, FusedLinear, Jeffreys, Offline, ReverseKL, TopK
from fdiv.methods._method import Method
from fdiv.methods.distill.bdkd import BDKD, surplus_certainty

FLAT = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
SHARP = torch.tensor([[0.05, 0.05, 0.1, 0.8]], dtype=torch.float64).log()


@pytest.mark.parametrize("weight", [1.0, 2.0, 3.0])
def test_a_student_that_is_too_sure_is_spread_and_one_that_is_not_is_sharpened(weight):
    spread = BDKD(weight=weight)(log_p=FLAT, log_q=SHARP)
    close(spread.loss, (weight * KL()(FLAT, SHARP) + ReverseKL()(FLAT, SHARP)).squeeze())
    sharpen = BDKD(weight=weight)(log_p=SHARP, log_q=FLAT)
    close(sharpen.loss, (KL()(SHARP, FLAT) + weight * ReverseKL()(SHARP, FLAT)).squeeze())
    assert spread.metrics["student_surer"] == 1 and sharpen.metrics["student_surer"] == 0


def test_the_weights_change_places_when_the_models_do():
    log_p, log_q = random_rows(6, 7), random_rows(6, 7, 1)
    close(BDKD()(log_p=log_p, log_q=log_q).loss, BDKD()(log_p=log_q, log_q=log_p).loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_entropies_leave_the_plain_sum_even_where_rounding_differs(dtype):
    """A shuffled row has the entropy of the row itself, but summed in another order."""
    log_p = random_rows(200, 500).to(dtype)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    log_q = log_p[:, order]
    summed = [torch.special.entr(t.exp()).sum(-1) for t in (log_p, log_q)]
    assert (summed[0] != summed[1]).any()
    loss = BDKD()(log_p=log_p, log_q=log_q).loss
    close(loss, GKD(Jeffreys())(log_p=log_p, log_q=log_q).loss, 1e-5 if dtype == torch.float32 else 1e-12)


def test_the_surplus_is_the_difference_of_entropies():
    log_p, log_q = random_rows(6, 7), random_rows(6, 7, 1)
    entropy = [-(t.exp() * t).sum(-1) for t in (log_p, log_q)]
    close(surplus_certainty(log_p, log_q), entropy[0] - entropy[1])
    uniform, sure = torch.zeros(1, 4).log_softmax(-1), torch.tensor([[1.0, 0.0, 0.0, 0.0]]).log()
    close(surplus_certainty(uniform, sure), torch.tensor([math.log(4)]), 1e-6)


@each_divergence
def test_the_weights_carry_no_gradient_and_any_f_divergence_may_be_balanced(divergence):
    log_p, logits = random_rows(6, 7), random_rows(6, 7, 1).requires_grad_()
    log_q = logits.log_softmax(-1)
    surer = surplus_certainty(log_p, log_q) > 0
    assert surer.any() and not surer.all()
    covering, sharpening = torch.where(surer, 3.0, 1.0), torch.where(surer, 1.0, 3.0)
    expected = (covering * divergence(log_p, log_q) + sharpening * divergence(log_q, log_p)).mean()
    loss = BDKD(divergence)(log_p=log_p, log_q=log_q).loss
    close(loss, expected)
    close(gradient(loss, logits), gradient(expected, logits))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    log_p = random_rows(5, 7)
    logits = log_p.clone().requires_grad_()
    loss = BDKD()(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    assert loss.abs() < 1e-14 and gradient(loss, logits).abs().max() < 1e-14


def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph():
    log_p, logits = random_rows(6, 7), random_rows(6, 7, 1).requires_grad_()
    whole = BDKD()(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    parts = [
        BDKD()(log_p=log_p[part], log_q=logits[part].log_softmax(-1), count=6).loss
        for part in (slice(0, 1), slice(1, 6), slice(6, 6))
    ]
    close(sum(parts), whole, 1e-13)
    close(gradient(sum(parts), logits), gradient(whole, logits), 1e-12)
    assert parts[2] == 0 and not gradient(parts[2], logits).any()


def test_wrong_settings_are_refused_with_what_to_write_instead():
    for sampler in ("data", Offline):
        with pytest.raises(TypeError, match=r"write Offline\(\)"):
            BDKD(sampler=sampler)
    for weight in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="factor >= 1"):
            BDKD(weight=weight)
    with pytest.raises(TypeError, match=r"write Exact\(\)"):
        BDKD(estimator=FusedLinear())
    with pytest.raises(TypeError, match="f-divergence"):
        BDKD(fdiv.AlphaBeta(0.2, 0.7))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = BDKD(fdiv.Alpha(0.3), TopK(3), weight=2.0)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.bdkd"]) == method
    assert isinstance(method, Method) and BDKD().estimator == Exact()
