"""Gradient ascent: what it climbs, and what holds it back."""

import math

import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.unlearn.gradient_ascent import GradientAscent

FORGET = torch.tensor([-3.0, -12.5, -0.2, -40.0], dtype=torch.float64)
LENGTH = torch.tensor([2.0, 5.0, 1.0, 8.0], dtype=torch.float64)
KEPT, TEXT = torch.tensor([-1.0, -3.0, -0.5], dtype=torch.float64), torch.tensor([0, 0, 1])


def test_it_is_the_mean_log_probability_of_the_answers():
    log_q = FORGET.clone().requires_grad_()
    out = GradientAscent()(log_q_rejected=log_q)
    close(out.loss, FORGET.mean())
    close(gradient(out.loss, log_q), torch.full((4,), 0.25, dtype=torch.float64))
    close(out.metrics["log_q_forget"], FORGET.mean())


def test_per_token_it_is_the_negative_of_the_mean_cross_entropy():
    log_q = FORGET.clone().requires_grad_()
    out = GradientAscent(per_token=True)(log_q_rejected=log_q, length_rejected=LENGTH)
    close(out.loss, (FORGET / LENGTH).mean())
    close(gradient(out.loss, log_q), 1 / LENGTH / 4)


def test_a_step_of_descent_lowers_the_answer_and_raises_the_retained():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()

    def told(logits):
        rows = logits.log_softmax(-1)[:, 0]
        return rows[:2].sum(), rows[2:]

    forget, kept = told(logits)
    out = GradientAscent(retain=1.0)(
        log_q_rejected=forget[None], log_q_retain_label=kept, retain_sequence=torch.tensor([0, 0, 1])
    )
    (step,) = torch.autograd.grad(out.loss, logits)
    after = told(logits - 1e-3 * step)
    assert after[0] < forget and (after[1] > kept).all()


def test_retained_text_counts_a_mean_over_its_tokens_and_then_over_texts():
    retained = {"log_q_retain_label": KEPT, "retain_sequence": TEXT}
    out = GradientAscent(retain=0.5)(log_q_rejected=FORGET, **retained)
    close(out.loss, FORGET.mean() + 0.5 * (2.0 + 0.5) / 2)
    close(out.metrics["retain_nll"], torch.tensor(1.25, dtype=torch.float64))


def test_of_the_references_own_text_the_retain_term_has_the_gradient_of_its_kl():
    """The cross-entropy of q on draws of p is KL(p, q) but for p's entropy; here all six symbols, weighed."""
    log_p, logits = random_rows(1, 6)[0], random_rows(1, 6, seed=1)[0].requires_grad_()
    often = (log_p.exp() * 1000).round().long()
    drawn = torch.repeat_interleave(torch.arange(6), often)
    out = GradientAscent(retain=1.0)(
        log_q_rejected=torch.zeros(1, dtype=torch.float64),
        log_q_retain_label=logits.log_softmax(-1)[drawn],
        retain_sequence=torch.arange(len(drawn)),
    )
    exact = fdiv.KL()((often.double() / often.sum()).log(), logits.log_softmax(-1))
    close(gradient(out.loss, logits), gradient(exact, logits), 1e-9)


def test_it_reads_no_more_than_it_uses():
    assert GradientAscent().reads == ("log_q_rejected",)
    assert GradientAscent(per_token=True).reads == ("log_q_rejected", "length_rejected")
    retaining = ("log_q_rejected", "log_q_retain_label", "retain_sequence")
    assert GradientAscent(retain=1.0).reads == retaining


def test_empty_answers_and_texts_are_finite():
    out = GradientAscent(per_token=True, retain=1.0)(
        log_q_rejected=torch.zeros(2, requires_grad=True),
        length_rejected=torch.zeros(2),
        log_q_retain_label=torch.zeros(0),
        retain_sequence=torch.zeros(0, dtype=torch.long),
    )
    assert out.loss == 0


def test_log_probabilities_far_below_are_finite():
    log_q = torch.tensor([-1e4, 0.0, -1e-6], requires_grad=True)
    kept = torch.tensor([-1e4, 0.0], requires_grad=True)
    out = GradientAscent(retain=2.0)(
        log_q_rejected=log_q, log_q_retain_label=kept, retain_sequence=torch.tensor([0, 1])
    )
    assert out.loss.isfinite() and gradient(out.loss, log_q, kept).isfinite().all()


@pytest.mark.parametrize("retain", [-1.0, math.inf, math.nan])
def test_wrong_weights_are_refused(retain):
    with pytest.raises(ValueError, match="retain is a finite weight >= 0"):
        GradientAscent(retain=retain)


def test_a_retain_term_without_text_is_refused():
    with pytest.raises(TypeError, match="reads log_q_retain_label and retain_sequence"):
        GradientAscent(retain=1.0)(log_q_rejected=FORGET)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = GradientAscent(per_token=True, retain=0.3)
    assert fdiv.parse(repr(method), ["fdiv.methods.unlearn.gradient_ascent"]) == method
    assert isinstance(method, Method) and method.divergence == fdiv.KL()
