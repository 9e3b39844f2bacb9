"""OPSD: GKD with a teacher that has read the solution, at the rows where there was one."""

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, JS, KL, Decoding, Exact, FusedLinear, Mix, MonteCarlo, TopK
from fdiv.methods._method import Method
from fdiv.methods.distill.opsd import OPSD
from fdiv.methods.distill.sdpo import SDPO

ROWS, VOCAB = 6, 7
SHOWN = torch.tensor([True, False, True, True, False, True])


def models():
    """log_p, and the student's logits, [rows, vocab]."""
    return random_rows(ROWS, VOCAB), random_rows(ROWS, VOCAB, seed=1).requires_grad_()


@each_divergence
def test_it_is_gkd_on_the_rows_that_were_shown(divergence):
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    out = OPSD(divergence)(log_p=log_p, log_q=log_q, shown=SHOWN)
    expected = GKD(divergence)(log_p=log_p[SHOWN], log_q=log_q[SHOWN]).loss
    close(out.loss / out.metrics["shown"], expected)
    close(gradient(out.loss / out.metrics["shown"], logits), gradient(expected, logits))


def test_on_fresh_text_sdpo_is_the_same_loss():
    log_p, logits = models()
    given = {"log_p": log_p, "log_q": logits.log_softmax(-1), "shown": SHOWN}
    fresh = {"log_q_label": given["log_q"][:, 0], "log_behaviour": given["log_q"][:, 0].detach()}
    close(OPSD()(**given).loss, SDPO(estimator=Exact())(**given, **fresh).loss)


def test_the_defaults_are_those_of_the_authors_code():
    method = OPSD()
    assert (method.divergence, method.estimator) == (JS(0.5), Exact())
    assert (method.temperature, method.ema, method.context) == (1.1, 0.0, "privileged")
    assert method.sampler == Mix(1.0, Decoding(temperature=1.1, top_k=20, top_p=0.95))
    assert method.reads == ("shown",)


def test_the_loss_is_the_formula():
    """beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q, worked out for three symbols."""
    p, q = (torch.tensor([row], dtype=torch.float64) for row in ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5)))
    shown = torch.ones(1, dtype=torch.bool)
    for beta, expected in ((0.5, 0.125100606), (0.1, 0.044420725), (0.9, 0.050029545)):
        loss = OPSD(JS(beta))(log_p=p.log(), log_q=q.log(), shown=shown).loss
        torch.testing.assert_close(loss.item(), expected, rtol=0, atol=5e-10)


@pytest.mark.parametrize("rubbish", [torch.inf, -torch.inf, torch.nan])
def test_rows_that_were_not_shown_do_no_harm(rubbish):
    log_p, logits = models()
    leaf = logits.detach().log_softmax(-1)
    log_p[~SHOWN], leaf[~SHOWN] = rubbish, rubbish
    leaf.requires_grad_()
    out = OPSD(estimator=TopK(3))(log_p=log_p, log_q=leaf, shown=SHOWN)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert out.loss.isfinite() and grad.isfinite().all()
    assert not grad[~SHOWN].any() and grad[SHOWN].any(-1).all()


def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches():
    log_p, logits = models()
    given = {"log_p": log_p, "log_q": logits.log_softmax(-1), "shown": SHOWN}
    whole = OPSD()(**given)
    split = (slice(0, 2), slice(2, 6))
    parts = [OPSD()(**{name: t[rows] for name, t in given.items()}, count=ROWS) for rows in split]
    close(sum(part.loss for part in parts), whole.loss, 1e-13)
    close(gradient(sum(part.loss for part in parts), logits), gradient(whole.loss, logits), 1e-12)
    close((2 * parts[0].metrics["shown"] + 4 * parts[1].metrics["shown"]) / 6, whole.metrics["shown"])


@pytest.mark.parametrize("rows", [0, 3])
def test_with_nothing_shown_the_loss_is_zero_and_has_a_graph(rows):
    log_q = torch.zeros(rows, VOCAB, requires_grad=True)
    shown = torch.zeros(rows, dtype=torch.bool)
    out = OPSD()(log_p=torch.zeros(rows, VOCAB), log_q=log_q, shown=shown)
    assert out.loss == 0 and out.metrics["shown"] == 0
    assert not gradient(out.loss, log_q).any()


def test_heads_train_the_same_objective():
    hidden, weight = random_rows(ROWS, 3, seed=3).requires_grad_(), random_rows(VOCAB, 3, seed=4)
    log_p, log_q = (hidden.detach() @ (2 * weight).T).log_softmax(-1), (hidden @ weight.T).log_softmax(-1)
    heads = {"p_hidden": hidden.detach(), "p_weight": 2 * weight, "q_hidden": hidden, "q_weight": weight}
    fused = OPSD(estimator=FusedLinear(chunk=2))(**heads, shown=SHOWN).loss
    plain = OPSD()(log_p=log_p, log_q=log_q, shown=SHOWN).loss
    close(fused, plain)
    close(gradient(fused, hidden), gradient(plain, hidden), 1e-9)


def test_wrong_settings_are_refused():
    with pytest.raises(TypeError, match="only a sampled token"):
        OPSD(estimator=MonteCarlo())
    with pytest.raises(TypeError, match="f-divergence"):
        OPSD(fdiv.Renyi(2.0), TopK(3))
    with pytest.raises(ValueError, match="temperature"):
        OPSD(temperature=0.0)
    with pytest.raises(ValueError, match="ema is a rate"):
        OPSD(ema=-0.1)
    log_p, logits = models()
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        OPSD()(log_p=log_p, log_q=logits, shown=SHOWN.long())


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = OPSD(KL(), TopK(20), temperature=1.0, ema=0.01)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.opsd"]) == method
    assert isinstance(method, Method)
