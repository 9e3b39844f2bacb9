"""DistiLLM: GKD's loss under a skewed KL, on text from the adaptive sampler."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import (
    GKD,
    KL,
    AdaptiveReplay,
    Exact,
    FusedLinear,
    Mix,
    MonteCarlo,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from fdiv.methods._method import Method
from fdiv.methods.distill.distillm import DistiLLM
from fdiv.sample._sampler import Steered

ROWS, VOCAB = 6, 7
MASK = torch.tensor([True, False, True, True, False, True])
P, Q = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.6, 0.3, 0.1], [0.2, 0.3, 0.5]))


def models():
    """log_p, and the student's logits, [rows, vocab]."""
    return random_rows(ROWS, VOCAB, 0), random_rows(ROWS, VOCAB, 1).requires_grad_()


@each_divergence
def test_the_loss_is_that_of_gkd(divergence):
    log_p, logits = models()
    tensors = {"log_p": log_p, "log_q": logits.log_softmax(-1), "mask": MASK}
    loss, expected = DistiLLM(divergence)(**tensors).loss, GKD(divergence)(**tensors).loss
    assert loss == expected
    assert torch.equal(gradient(loss, logits), gradient(expected, logits))


@pytest.mark.parametrize(
    ("divergence", "value"), [(SkewKL(0.1), 0.397168809), (SkewReverseKL(0.1), 0.430558954)], ids=repr
)
def test_the_worked_example(divergence, value):
    close(DistiLLM(divergence)(log_p=P, log_q=Q).loss, torch.tensor(value, dtype=torch.float64), 1e-8)


def closed_gradient(logits, slope):
    """Of a mean over rows of losses whose derivative in q is `slope`, in the logits."""
    q = logits.softmax(-1)
    return (q * (slope - (q * slope).sum(-1, keepdim=True)) / len(q)).detach().flatten()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.9])
def test_the_gradient_is_the_closed_one(alpha):
    log_p, logits = models()
    p, q, log_q = log_p.exp(), logits.softmax(-1), logits.log_softmax(-1)
    mixture = alpha * p + (1 - alpha) * q
    skl = DistiLLM(SkewKL(alpha))(log_p=log_p, log_q=log_q).loss
    close(gradient(skl, logits), closed_gradient(logits, -(1 - alpha) * p / mixture), 1e-12)
    mixture = (1 - alpha) * p + alpha * q
    srkl = DistiLLM(SkewReverseKL(alpha))(log_p=log_p, log_q=log_q).loss
    slope = (q / mixture).log() - alpha * q / mixture
    close(gradient(srkl, logits), closed_gradient(logits, slope), 1e-12)


@pytest.mark.parametrize("divergence", [SkewKL(0.1), SkewReverseKL(0.1)], ids=repr)
def test_disjoint_models_reach_the_bound_with_a_finite_gradient(divergence):
    log_p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).log().requires_grad_()
    loss = DistiLLM(divergence)(log_p=log_p, log_q=log_q).loss
    close(loss, torch.tensor(-math.log(0.1), dtype=torch.float64), 1e-12)
    assert gradient(loss, log_q).isfinite().all()
    log_p, logits = models()
    assert DistiLLM(divergence)(log_p=log_p, log_q=(50 * logits).log_softmax(-1)).loss < -math.log(0.1)


@pytest.mark.parametrize(("skewed", "limit"), [(SkewKL, KL()), (SkewReverseKL, ReverseKL())], ids=repr)
def test_as_the_skew_vanishes_it_is_a_plain_kl(skewed, limit):
    log_p, logits = models()
    tensors = {"log_p": log_p, "log_q": logits.log_softmax(-1)}
    loss, expected = DistiLLM(skewed(1e-9))(**tensors).loss, GKD(limit)(**tensors).loss
    close(loss, expected, 1e-6)
    close(gradient(loss, logits), gradient(expected, logits), 1e-6)


def test_the_loss_does_not_depend_on_the_split_into_micro_batches():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    whole = DistiLLM()(log_p=log_p, log_q=log_q, mask=MASK).loss
    parts = [
        DistiLLM()(log_p=log_p[rows], log_q=log_q[rows], mask=MASK[rows], count=MASK.sum()).loss
        for rows in (slice(0, 2), slice(2, 6))
    ]
    close(sum(parts), whole, 1e-13)
    close(gradient(sum(parts), logits), gradient(whole, logits), 1e-12)


def test_no_token_at_all_has_loss_zero_and_a_graph():
    log_p, logits = models()
    for rows, mask in ((slice(0, 0), None), (slice(None), torch.zeros(ROWS, dtype=torch.bool))):
        loss = DistiLLM()(log_p=log_p[rows], log_q=logits[rows].log_softmax(-1), mask=mask).loss
        assert loss == 0 and not gradient(loss, logits).any()


@pytest.mark.parametrize("divergence", [SkewKL(0.1), SkewReverseKL(0.1)], ids=repr)
def test_heads_and_logits_train_the_same_objective(divergence):
    shapes = {"p_hidden": (ROWS, 4), "p_weight": (VOCAB, 4), "q_hidden": (ROWS, 3), "q_weight": (VOCAB, 3)}
    heads = {name: random_rows(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    student = [heads["q_hidden"].requires_grad_(), heads["q_weight"].requires_grad_()]
    p, q = ((heads[f"{who}_hidden"] @ heads[f"{who}_weight"].T).log_softmax(-1) for who in "pq")
    fused = DistiLLM(divergence, FusedLinear(chunk=2))(**heads).loss
    plain = DistiLLM(divergence)(log_p=p, log_q=q).loss
    close(fused, plain)
    close(gradient(fused, *student), gradient(plain, *student))


def test_what_it_cannot_train_is_refused_when_it_is_built():
    with pytest.raises(TypeError, match=r"write Exact\(\)"):
        DistiLLM(estimator=MonteCarlo())
    with pytest.raises(TypeError, match=r"write KL\(\)"):
        DistiLLM("SkewKL")
    for sampler in (AdaptiveReplay, "adaptive", None):
        with pytest.raises(TypeError, match=r"write AdaptiveReplay\(\)"):
            DistiLLM(sampler=sampler)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = DistiLLM(SkewReverseKL(0.1), sampler=AdaptiveReplay(start=0.2))
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.distillm"]) == method
    assert isinstance(method, Method) and isinstance(method.sampler, Steered)
    assert DistiLLM() == DistiLLM(SkewKL(0.1), Exact(), AdaptiveReplay())
    assert DistiLLM(sampler=Mix(1.0)).sampler.writer(0.9, 0.0, {}) == "student"
    assert DistiLLM((1 / 0.81) * SkewKL(0.1)).divergence.curvature_at_one == pytest.approx(1)
