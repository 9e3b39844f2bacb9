"""DIST: correlations of probabilities along both sides of the batch."""

import math

import numpy as np
import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.distill.dist import DIST, correlation

B, C = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1])
TINY = 1e-30


def scores(seed: int = 0) -> torch.Tensor:
    return random_rows(B, C, seed)


def terms(p, q, **settings):
    out = DIST(**({"eps": TINY} | settings))(logits=q, labels=LABELS[: len(q)], p_logits=p)
    return out.metrics["inter"], out.metrics["intra"]


def test_the_correlations_are_pearsons_of_rows_and_of_columns():
    p, q = (scores(seed).softmax(-1).numpy() for seed in (0, 1))
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)]
    inter, intra = terms(scores(), scores(1))
    close(inter, torch.tensor(1 - np.mean(rows)), 1e-12)
    close(intra, torch.tensor(1 - np.mean(columns)), 1e-12)


def test_a_worked_example():
    """Rows (.2, .3, .5) and (.6, .3, .1): centred (-.4, -.1, .5)/3 and (.8, -.1, -.7)/3."""
    x, y = torch.tensor([[[0.2, 0.3, 0.5]], [[0.6, 0.3, 0.1]]], dtype=torch.float64)
    expected = (-0.32 + 0.01 - 0.35) / math.sqrt(0.42 * 1.14)
    close(correlation(x, y, 1, TINY), torch.tensor([expected], dtype=torch.float64))


def test_the_loss_is_cross_entropy_and_the_weighted_terms():
    logits = scores(1).requires_grad_()
    out = DIST(beta=0.7, gamma=3.0, cross_entropy=0.5)(logits=logits, labels=LABELS, p_logits=scores())
    labelled = torch.nn.functional.cross_entropy(logits, LABELS)
    close(out.loss, 0.5 * labelled + 0.7 * out.metrics["inter"] + 3 * out.metrics["intra"])
    close(out.metrics["cross_entropy"], labelled.detach())


def test_stretching_and_shifting_probabilities_costs_nothing_if_it_is_not_upside_down():
    """Along rows; along columns the stretch must be that of the whole class."""
    p, q = scores().softmax(-1), scores(1).softmax(-1)
    stretch, shift = torch.rand(B, 1).double() + 0.1, torch.randn(B, 1).double()
    for dim, (a, b) in ((1, (stretch, shift)), (0, (stretch[:C].T, shift[:C].T))):
        close(correlation(p, a * q + b, dim, TINY), correlation(p, q, dim, TINY))
        close(correlation(p, -a * q + b, dim, TINY), -correlation(p, q, dim, TINY))


def test_a_smoothed_teacher_is_the_teacher_itself():
    """(1 - e) p + e / C is an affine map of each row: KL tells them apart, DIST does not."""
    p = scores().softmax(-1)
    smooth = (0.7 * p + 0.3 / C).log()
    given = {"logits": scores(1), "labels": LABELS}
    loss = [DIST(gamma=0.0, eps=TINY)(**given, p_logits=t).loss for t in (scores(), smooth)]
    close(loss[0], loss[1])


def test_the_teacher_itself_costs_nothing_and_has_no_slope():
    logits = scores().requires_grad_()
    method = DIST(cross_entropy=0.0, eps=TINY)
    loss = method(logits=logits, labels=LABELS, p_logits=scores() + 4.0).loss
    assert loss.abs() < 1e-14 and gradient(loss, logits).abs().max() < 1e-14


def test_the_gradient_is_what_finite_differences_say():
    p, q = scores(), scores(1).requires_grad_()
    method = DIST(temperature=1.7)
    assert torch.autograd.gradcheck(lambda x: method(logits=x, labels=LABELS, p_logits=p).loss, (q,))


def test_at_a_large_temperature_logits_are_correlated_and_no_square_of_it_is_needed():
    inter, _ = terms(scores(), scores(1), temperature=1e5)
    close(inter, 1 - correlation(scores(), scores(1), 1, TINY).mean(), 1e-4)
    logits = scores(1).requires_grad_()
    sizes = []
    for temperature in (1e3, 1e4):
        method = DIST(cross_entropy=0.0, temperature=temperature, eps=TINY)
        loss = method(logits=logits, labels=LABELS, p_logits=scores()).loss
        sizes.append(gradient(loss, logits).norm())
    close(sizes[0], sizes[1], 1e-2)


def test_what_does_not_vary_correlates_with_nothing():
    p, q = scores(), scores(1).requires_grad_()
    p[0] = 0.0  # a uniform teacher
    inter, _ = terms(p, q)
    close(inter * B, 1 + (1 - correlation(p[1:].softmax(-1), q[1:].softmax(-1), 1, TINY)).sum().detach())
    loss = DIST(cross_entropy=0.0)(logits=q, labels=LABELS, p_logits=p).loss
    assert gradient(loss, q).isfinite().all()


def test_one_example_has_nothing_to_say_of_a_class():
    q = scores(1)[:1].requires_grad_()
    out = DIST(beta=0.0, gamma=2.0, cross_entropy=0.0)(logits=q, labels=LABELS[:1], p_logits=scores()[:1])
    assert out.loss == 2 and not gradient(out.loss, q).any()


def test_the_constant_in_the_denominator_silences_classes_that_are_always_unlikely():
    """The last class gets 1e-6 or 2e-6: it correlates perfectly, at lengths whose product is 1e-12."""
    log_p = torch.tensor([[0.5, 0.5, 1e-6], [0.4, 0.6, 2e-6]]).double().log()
    with_eps, without = (correlation(log_p.exp(), log_p.exp(), 0, eps)[2] for eps in (1e-8, TINY))
    assert with_eps < 1e-3 and without > 0.999


def test_the_teacher_gets_no_gradient_and_an_empty_batch_has_a_graph():
    logits, p_logits = scores(1).requires_grad_(), scores().requires_grad_()
    DIST()(logits=logits, labels=LABELS, p_logits=p_logits).loss.backward()
    assert p_logits.grad is None
    empty = DIST(beta=0.0)(logits=logits[:0], labels=LABELS[:0], p_logits=p_logits[:0]).loss
    assert empty.isfinite() and not gradient(empty, logits).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_and_excluded_classes_stay_finite(dtype):
    p = torch.tensor([[1e4, 0.0, -1e4], [-math.inf, 1.0, 0.0], [0.0, -1e4, 1e4]], dtype=dtype)
    q = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 1.0, 0.0], [1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = DIST()(logits=q, labels=torch.tensor([0, 1, 2]), p_logits=p).loss
    assert loss.isfinite() and gradient(loss, q).isfinite().all()


def test_wrong_settings_are_refused_with_what_to_write_instead():
    for setting in ({"beta": -1.0}, {"gamma": math.inf}, {"cross_entropy": math.nan}):
        with pytest.raises(ValueError, match="weight >= 0"):
            DIST(**setting)
    with pytest.raises(ValueError, match=r"write SFT\(\)"):
        DIST(beta=0.0, gamma=0.0)
    with pytest.raises(ValueError, match="temperature divides"):
        DIST(temperature=-1.0)
    with pytest.raises(ValueError, match="0/0"):
        DIST(eps=0.0)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = DIST(beta=1.0, temperature=4.0)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.dist"]) == method
    assert isinstance(method, Method) and method.unit == "batch" and method.consumes == "examples"
