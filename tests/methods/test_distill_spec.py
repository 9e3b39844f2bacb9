"""DistillSpec: what a draft model is trained for is counted exactly, and its bounds hold."""

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import (
    GKD,
    JS,
    KL,
    TV,
    Exact,
    FusedAtoms,
    FusedLinear,
    Mix,
    MonteCarlo,
    Offline,
    SampledLogits,
    TopK,
)
from fdiv.methods._method import Method
from fdiv.methods.decode.speculative import Speculative
from fdiv.methods.distill.distill_spec import DistillSpec

ROWS, VOCAB = 6, 7
MASK = torch.tensor([True, False, True, True, False, True])
P = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
Q = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()


def models(seed=0):
    """log_p, and the draft's logits, [rows, vocab]."""
    return random_rows(ROWS, VOCAB, seed), random_rows(ROWS, VOCAB, seed + 1).requires_grad_()


def heads():
    generator = torch.Generator().manual_seed(0)
    shapes = {"p_hidden": (ROWS, 4), "p_weight": (VOCAB, 4), "q_hidden": (ROWS, 3), "q_weight": (VOCAB, 3)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


@each_divergence
def test_loss_and_gradient_are_those_of_gkd(divergence):
    log_p, logits = models()
    evidence = {"log_p": log_p, "log_q": logits.log_softmax(-1), "mask": MASK, "count": 11}
    one, other = DistillSpec(divergence)(**evidence).loss, GKD(divergence)(**evidence).loss
    close(one, other, 1e-14)
    close(gradient(one, logits), gradient(other, logits), 1e-14)


def test_by_default_the_loss_is_1_less_the_acceptance():
    log_p, logits = models()
    out = DistillSpec()(log_p=log_p, log_q=logits.log_softmax(-1), mask=MASK)
    close(out.loss, 1 - out.metrics["acceptance"], 1e-14)


@each_divergence
def test_the_acceptance_is_that_of_speculative_decoding_whatever_is_trained(divergence):
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    expected = Speculative().acceptance(log_p[MASK], log_q[MASK]).mean()
    out = DistillSpec(divergence)(log_p=log_p, log_q=log_q, mask=MASK)
    close(out.metrics["acceptance"], expected, 1e-14)
    assert not out.metrics["acceptance"].requires_grad


@pytest.mark.parametrize("estimator", [Exact(), TopK(2), SampledLogits(3)], ids=repr)
def test_the_acceptance_is_exact_where_the_loss_is_not(estimator):
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    out = DistillSpec(KL(), estimator)(log_p=log_p, log_q=log_q)
    close(out.metrics["acceptance"], torch.minimum(log_p.exp(), log_q.exp()).sum(-1).mean(), 1e-14)


@pytest.mark.parametrize("of", [Exact(), TopK(2)], ids=repr)
def test_heads_tell_the_same_as_logits(of):
    given = heads()
    student = [given["q_hidden"].requires_grad_(), given["q_weight"].requires_grad_()]
    fused = DistillSpec(KL(), FusedLinear(chunk=2, of=of), bounds=True)(mask=MASK, **given)
    log_p = (given["p_hidden"] @ given["p_weight"].T).log_softmax(-1)
    log_q = (given["q_hidden"] @ given["q_weight"].T).log_softmax(-1)
    plain = DistillSpec(KL(), of, bounds=True)(mask=MASK, log_p=log_p, log_q=log_q)
    close(fused.loss, plain.loss)
    close(gradient(fused.loss, *student), gradient(plain.loss, *student))
    assert fused.metrics.keys() == plain.metrics.keys()
    for name, value in plain.metrics.items():
        close(fused.metrics[name], value)


def test_the_worked_numbers():
    """KL .498223582, JS .125100606, TV .4 of p = (.6, .3, .1) and q = (.2, .3, .5)."""
    metrics = DistillSpec(bounds=True)(log_p=P, log_q=Q).metrics
    assert metrics["acceptance"].item() == pytest.approx(0.6, abs=1e-14)
    assert metrics["acceptance_by_kl"].item() == pytest.approx(1 - (0.498223582 / 2) ** 0.5, abs=1e-9)
    assert metrics["acceptance_by_js"].item() == pytest.approx(1 - (2 * 0.125100606) ** 0.5, abs=1e-9)


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 4.0])
def test_the_bounds_stay_below_the_acceptance(scale):
    log_p, log_q = random_rows(500, VOCAB, 0, scale), random_rows(500, VOCAB, 1, scale)
    for row in range(0, 500, 50):  # of means, so of rows too
        some = {"log_p": log_p[row : row + 1], "log_q": log_q[row : row + 1]}
        metrics = DistillSpec(bounds=True)(**some).metrics
        assert 0 <= metrics["acceptance_by_kl"] <= metrics["acceptance"] + 1e-12
        assert 0 <= metrics["acceptance_by_js"] <= metrics["acceptance"] + 1e-12


def test_a_target_that_the_draft_cannot_reach_promises_nothing():
    log_q = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    metrics = DistillSpec(bounds=True)(log_p=P, log_q=log_q).metrics
    assert metrics["acceptance"].item() == pytest.approx(0.8)
    assert metrics["acceptance_by_kl"] == 0
    assert 0 < metrics["acceptance_by_js"] <= 0.8


@pytest.mark.parametrize("rubbish", [torch.inf, torch.nan])
def test_masked_rows_do_no_harm(rubbish):
    log_p, logits = models()
    log_q = logits.log_softmax(-1).detach()
    alone = DistillSpec(bounds=True)(log_p=log_p[MASK], log_q=log_q[MASK])
    log_p[~MASK], log_q[~MASK] = rubbish, rubbish
    out = DistillSpec(bounds=True)(log_p=log_p, log_q=log_q, mask=MASK)
    close(out.loss, alone.loss, 1e-14)
    for name, value in alone.metrics.items():
        close(out.metrics[name], value, 1e-14)


@pytest.mark.parametrize("divergence", [TV(), KL(), JS(0.5)], ids=repr)
def test_a_step_down_each_of_the_papers_divergences_raises_the_acceptance(divergence):
    log_p, logits = models()
    before = DistillSpec(divergence)(log_p=log_p, log_q=logits.log_softmax(-1))
    before.loss.backward()
    moved = (logits - 1e-3 * logits.grad / logits.grad.norm()).log_softmax(-1).detach()
    after = DistillSpec(divergence)(log_p=log_p, log_q=moved)
    assert after.metrics["acceptance"] > before.metrics["acceptance"]


def test_what_cannot_tell_the_acceptance_is_refused():
    with pytest.raises(TypeError, match=r"write FusedLinear\(\), or GKD\(\)"):
        DistillSpec(KL(), FusedAtoms(TopK(3)))
    with pytest.raises(TypeError, match="sampled token"):
        DistillSpec(estimator=MonteCarlo())
    with pytest.raises(ValueError, match="temperature"):
        DistillSpec(temperature=0.0)
    log_p, _ = models()
    with pytest.raises(TypeError, match="reads log_p, log_q"):
        DistillSpec()(log_p=log_p)


def test_the_draft_writes_by_default_and_the_object_is_its_recipe():
    assert DistillSpec().sampler == Mix(1.0)
    method = DistillSpec(JS(0.1), FusedLinear(), Offline(), temperature=0.7, bounds=True)
    assert fdiv.parse(repr(method)) == method
    assert hash(method) == hash(fdiv.parse(repr(method)))
    assert isinstance(method, Method)
