"""ABKD: the mean of an alpha-beta divergence, with the paper's alpha on the teacher."""

import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv import GKD, AlphaBeta, Exact, FusedLinear, Offline, TopK
from fdiv.methods._method import Method
from fdiv.methods.distill.abkd import ABKD

P = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
Q = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("alpha", "beta", "value"),
    [
        (0.2, 0.7, 0.619750576), (0.5, 0.5, 0.519932163), (1, 1, 0.16),
        (0, 0.7, 0.823331252), (0.6, -0.6, 1.723356130), (0, 0, 1.898619677),
    ],
)  # fmt: skip
def test_it_takes_the_published_special_cases_and_their_limits(alpha, beta, value):
    """At the last three, code that divides by alpha or beta once instead of twice is off by that factor."""
    loss = ABKD(AlphaBeta(alpha, beta))(log_p=P.log(), log_q=Q.log()).loss
    assert loss.item() == pytest.approx(value, abs=1e-9)


def test_the_default_is_the_papers_for_language_models():
    assert ABKD().divergence == AlphaBeta(0.2, 0.7) and ABKD().sampler == Offline()
    assert ABKD()(log_p=P.log(), log_q=Q.log()).loss.item() == pytest.approx(0.619750576, abs=1e-9)


@pytest.mark.parametrize(
    ("exponents", "divergence"),
    [((1, 0), fdiv.KL()), ((0, 1), fdiv.ReverseKL()), ((0.3, 0.7), fdiv.Alpha(0.3))],
)
def test_it_reduces_to_gkd_where_the_exponents_sum_to_one(exponents, divergence):
    log_p, logits = random_rows(5, 7), random_rows(5, 7, 1).requires_grad_()
    loss = ABKD(AlphaBeta(*exponents))(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    expected = GKD(divergence)(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    close(loss, expected)
    close(gradient(loss, logits), gradient(expected, logits))


def test_alpha_is_the_exponent_of_the_teacher_in_the_gradient():
    """dL/dq_v = -(1/alpha) q_v^(beta - 1) (p_v^alpha - q_v^alpha), and dq/dlogits is that of a softmax."""
    alpha, beta = 0.2, 0.7
    log_p, logits = random_rows(5, 7), random_rows(5, 7, 1).requires_grad_()
    loss = ABKD(AlphaBeta(alpha, beta))(log_p=log_p, log_q=logits.log_softmax(-1), count=1).loss
    p, q = log_p.exp(), logits.softmax(-1).detach()
    slope = -(q ** (beta - 1)) * (p**alpha - q**alpha) / alpha
    close(gradient(loss, logits), (q * (slope - (q * slope).sum(-1, keepdim=True))).flatten())


def test_a_student_that_is_nearly_certain_has_a_finite_gradient():
    """q^(beta - 1) overflows there; q^beta, which the gradient is made of, does not."""
    logits = torch.tensor([[0.0, -200.0, -1e4]], requires_grad=True)
    loss = ABKD()(log_p=P.float().log(), log_q=logits.log_softmax(-1)).loss
    assert loss.isfinite() and gradient(loss, logits).isfinite().all()


def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph():
    log_p, logits = random_rows(6, 7), random_rows(6, 7, 1).requires_grad_()
    whole = ABKD()(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    parts = [
        ABKD()(log_p=log_p[part], log_q=logits[part].log_softmax(-1), count=6).loss
        for part in (slice(0, 1), slice(1, 6), slice(6, 6))
    ]
    close(sum(parts), whole, 1e-13)
    close(gradient(sum(parts), logits), gradient(whole, logits), 1e-12)
    assert parts[2] == 0 and not gradient(parts[2], logits).any()


def test_what_cannot_be_estimated_is_refused_when_it_is_built():
    for sampler in ("data", Offline):
        with pytest.raises(TypeError, match=r"write Offline\(\)"):
            ABKD(sampler=sampler)
    with pytest.raises(TypeError, match="FusedLinear"):
        ABKD(estimator=FusedLinear())
    with pytest.raises(TypeError, match="f-divergence"):
        ABKD(estimator=TopK(3))
    ABKD(fdiv.KL(), TopK(3))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = ABKD(AlphaBeta(0.1, 0.8), Exact())
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.abkd"]) == method
    assert hash(method) == hash(ABKD(AlphaBeta(0.1, 0.8))) and isinstance(method, Method)
