"""GKD: the mean over valid tokens of the global batch, whatever is masked, split or fused."""

import pytest
import torch
from tests.worlds import close, each_divergence, each_smooth_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, Exact, FusedLinear, MonteCarlo, SampledLogits, TopK, Variational
from fdiv.estimate._estimator import Estimator
from fdiv.methods._method import Method

ROWS, VOCAB = 6, 7
MASK = torch.tensor([True, False, True, True, False, True])


def models(seed=0):
    """log_p, and the student's logits, [rows, vocab]."""
    return random_rows(ROWS, VOCAB, seed), random_rows(ROWS, VOCAB, seed + 1).requires_grad_()


@each_divergence
def test_the_loss_is_the_mean_of_the_divergence_over_valid_tokens(divergence):
    log_p, logits = models()
    out = GKD(divergence)(log_p=log_p, log_q=logits.log_softmax(-1), mask=MASK)
    expected = divergence(log_p[MASK], logits[MASK].log_softmax(-1)).mean()
    close(out.loss, expected)
    close(gradient(out.loss, logits), gradient(expected, logits))


@pytest.mark.parametrize("rubbish", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("estimator", [Exact(), TopK(3), TopK(3, "union"), SampledLogits(4)], ids=repr)
def test_masked_rows_do_no_harm_whatever_they_hold(estimator, rubbish):
    log_p, logits = models()
    log_q = logits.log_softmax(-1).detach()
    log_p[~MASK], log_q[~MASK] = rubbish, rubbish
    log_q.requires_grad_()
    method = GKD(fdiv.KL(), estimator)
    torch.manual_seed(0)
    out = method(log_p=log_p, log_q=log_q, mask=MASK)
    torch.manual_seed(0)
    alone = method(log_p=log_p[MASK], log_q=log_q[MASK])
    assert out.loss.isfinite()
    assert out.loss == alone.loss
    grad = torch.autograd.grad(out.loss, log_q)[0]
    assert grad.isfinite().all() and not grad[~MASK].any() and grad[MASK].any()


@pytest.mark.parametrize("rubbish", [torch.inf, torch.nan])
def test_masked_rows_of_hidden_states_do_no_harm(rubbish):
    hidden, p_weight = random_rows(ROWS, 3), random_rows(VOCAB, 3)
    q_hidden, q_weight = hidden.clone(), random_rows(VOCAB, 3, seed=4).requires_grad_()
    hidden[~MASK], q_hidden[~MASK] = rubbish, rubbish
    q_hidden.requires_grad_()
    heads = {"p_hidden": hidden, "p_weight": p_weight, "q_hidden": q_hidden, "q_weight": q_weight}
    out = GKD(fdiv.KL(), FusedLinear(chunk=2))(mask=MASK, **heads)
    grads = torch.autograd.grad(out.loss, (q_hidden, q_weight))
    assert out.loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert not grads[0][~MASK].any() and grads[1].any()


def test_a_mask_of_a_batch_of_sequences_selects_the_same_tokens():
    log_p, logits = models()
    flat = GKD()(log_p=log_p, log_q=logits.log_softmax(-1), mask=MASK).loss
    boxed = [t.reshape(2, 3, VOCAB) for t in (log_p, logits.log_softmax(-1))]
    close(GKD()(log_p=boxed[0], log_q=boxed[1], mask=MASK.reshape(2, 3)).loss, flat, 1e-14)


@each_divergence
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(divergence):
    """The first micro-batch has one valid token, the second three: a mean of means would differ."""
    log_p, logits = models()
    method, count = GKD(divergence), MASK.sum()
    whole = method(log_p=log_p, log_q=logits.log_softmax(-1), mask=MASK).loss
    parts = [
        method(log_p=log_p[rows], log_q=logits[rows].log_softmax(-1), mask=MASK[rows], count=count).loss
        for rows in (slice(0, 2), slice(2, 6))
    ]
    close(sum(parts), whole, 1e-13)
    close(gradient(sum(parts), logits), gradient(whole, logits), 1e-12)


def test_a_repeated_batch_has_the_same_mean():
    log_p, logits = models()
    once = GKD()(log_p=log_p, log_q=logits.log_softmax(-1), mask=MASK).loss
    log_q = logits.log_softmax(-1).repeat(4, 1)
    close(GKD()(log_p=log_p.repeat(4, 1), log_q=log_q, mask=MASK.repeat(4)).loss, once, 1e-14)


def test_padding_changes_nothing():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    plain = GKD()(log_p=log_p, log_q=log_q).loss
    longer = [torch.cat([t, random_rows(5, VOCAB, seed=9)]) for t in (log_p, log_q)]
    mask = torch.arange(ROWS + 5) < ROWS
    close(GKD()(log_p=longer[0], log_q=longer[1], mask=mask).loss, plain, 1e-14)


@pytest.mark.parametrize("estimator", [Exact(), TopK(3), SampledLogits(4), FusedLinear()], ids=repr)
def test_a_batch_with_every_token_masked_has_loss_zero_and_a_graph(estimator):
    mask = torch.zeros(ROWS, dtype=torch.bool)
    if estimator.sees == "heads":
        names, shapes = estimator.evidence, [(ROWS, 3), (VOCAB, 3)] * 2
    else:
        names, shapes = estimator.evidence, [(ROWS, VOCAB)] * 2
    tensors = {n: random_rows(*s).requires_grad_() for n, s in zip(names, shapes, strict=True)}
    out = GKD(estimator=estimator)(mask=mask, **tensors)
    assert out.loss == 0
    assert not gradient(out.loss, *tensors.values()).any()


@each_divergence
def test_heads_and_logits_train_the_same_objective(divergence):
    generator = torch.Generator().manual_seed(0)
    shapes = {"p_hidden": (ROWS, 4), "p_weight": (VOCAB, 4), "q_hidden": (ROWS, 3), "q_weight": (VOCAB, 3)}
    heads = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    student = [heads["q_hidden"].requires_grad_(), heads["q_weight"].requires_grad_()]
    fused = GKD(divergence, FusedLinear(chunk=2))(mask=MASK, **heads).loss
    plain = GKD(divergence)(
        mask=MASK,
        log_p=(heads["p_hidden"] @ heads["p_weight"].T).log_softmax(-1),
        log_q=(heads["q_hidden"] @ heads["q_weight"].T).log_softmax(-1),
    ).loss
    close(fused, plain)
    close(gradient(fused, *student), gradient(plain, *student))


@each_smooth_divergence
def test_one_step_down_the_loss_lowers_the_divergence(divergence):
    log_p, logits = models()
    before = GKD(divergence)(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    before.backward()
    with torch.no_grad():
        moved = (logits - 1e-3 * logits.grad / logits.grad.norm()).log_softmax(-1)
    assert GKD(divergence)(log_p=log_p, log_q=moved).loss < before


@each_divergence
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(divergence):
    log_p, _ = models()
    logits = log_p.clone().requires_grad_()
    out = GKD(divergence)(log_p=log_p.log_softmax(-1), log_q=logits.log_softmax(-1))
    assert out.loss.abs() < 1e-14
    assert gradient(out.loss, logits).abs().max() < 1e-14


@pytest.mark.parametrize("estimator", [MonteCarlo(), Variational()], ids=repr)
def test_estimators_that_do_not_see_the_vocabulary_are_refused_when_it_is_built(estimator):
    with pytest.raises(TypeError, match=r"write Exact\(\), FusedLinear\(\), TopK\(k\) or SampledLogits\(n\)"):
        GKD(estimator=estimator)


def test_a_divergence_that_the_estimator_cannot_serve_is_refused_when_it_is_built():
    with pytest.raises(TypeError, match="FusedLinear"):
        GKD(fdiv.Renyi(0.5), FusedLinear())
    with pytest.raises(TypeError, match=r"write KL\(\)"):
        GKD("KL")
    GKD(fdiv.Renyi(0.5))


def test_nothing_given_is_ignored_and_nothing_missing_is_guessed():
    log_p, logits = models()
    with pytest.raises(TypeError, match="reads log_p, log_q; got log_p, log_q, maks"):
        GKD()(log_p=log_p, log_q=logits.log_softmax(-1), maks=MASK)
    with pytest.raises(TypeError, match="got log_p"):
        GKD()(log_p=log_p)
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        GKD()(log_p=log_p, log_q=logits.log_softmax(-1), mask=MASK.long())
    with pytest.raises(ValueError, match="differ in shape"):
        GKD()(log_p=log_p, log_q=logits.log_softmax(-1), mask=MASK[:3])


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="fraction"):
        GKD(lmbda=1.5)
    with pytest.raises(ValueError, match="temperature"):
        GKD(temperature=0.0)


def test_the_object_is_its_recipe_and_keeps_the_contracts():
    method = GKD(fdiv.JS(0.1), TopK(3, "union"), lmbda=0.5)
    assert fdiv.parse(repr(method)) == method
    assert hash(method) == hash(GKD(fdiv.JS(0.1), TopK(3, "union"), lmbda=0.5))
    assert isinstance(method, Method) and isinstance(method.estimator, Estimator)
