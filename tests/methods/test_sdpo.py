"""SDPO: the authors' loss written out in float64, and what its fields make of it."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, JS, KL, Exact, FusedLinear, Mix, MonteCarlo, ReverseKL, SampledLogits, TopK
from fdiv.methods._method import Method
from fdiv.methods.distill.sdpo import SDPO

ROWS, VOCAB = 8, 9
SHOWN = torch.tensor([True, True, True, False, False, True, True, False])
LABELS = torch.tensor([3, 0, 8, 1, 1, 4, 7, 2])
ALL = torch.ones(ROWS, dtype=torch.bool)


def given(shown=SHOWN, stale=0.4):
    """The method's arguments, and the student's logits."""
    logits = random_rows(ROWS, VOCAB, seed=1).requires_grad_()
    log_q = logits.log_softmax(-1)
    label = log_q.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    other = label.detach() - stale * torch.linspace(
        -3, 3, ROWS, dtype=torch.float64
    )  # ratios e^-1.2 .. e^1.2
    evidence = {"log_p": random_rows(ROWS, VOCAB), "log_q": log_q}
    return evidence | {"shown": shown, "log_q_label": label, "log_behaviour": other}, logits


def cells(log_p, log_q, k):
    """The student's k likeliest symbols and one of the rest, of both models, as probabilities."""
    index = log_q.topk(k).indices
    parts = []
    for log in (log_p, log_q):
        top = log.gather(-1, index).exp()
        parts.append(torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1))
    return parts


def authors(arguments, alpha, k, clip=2.0):
    """Their loss: alpha 0 is KL(p, q), 1 KL(q, p), else a mixture; the mean is over shown tokens."""
    p, q = cells(arguments["log_p"], arguments["log_q"], k)
    if alpha in (0, 1):
        a, b = (p, q) if alpha == 0 else (q, p)
        rows = (a * (a / b).log()).sum(-1)
    else:
        m = (1 - alpha) * q + alpha * p
        rows = (1 - alpha) * (q * (q / m).log()).sum(-1) + alpha * (p * (p / m).log()).sum(-1)
    ratio = (arguments["log_q_label"] - arguments["log_behaviour"]).exp().clamp(max=clip).detach()
    return (ratio * rows)[arguments["shown"]].mean()


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize(
    ("alpha", "divergence"),
    [(0, KL()), (0.1, JS(0.1)), (0.5, JS(0.5)), (0.8, JS(0.8)), (1, ReverseKL())],
    ids=repr,
)
def test_the_loss_is_the_authors_for_every_alpha(alpha, divergence, k):
    arguments, logits = given()
    out = SDPO(divergence, TopK(k, "student"))(**arguments)
    expected = authors(arguments, alpha, k)
    close(out.loss / out.metrics["shown"], expected)
    close(gradient(out.loss / out.metrics["shown"], logits), gradient(expected, logits), 1e-9)
    close(out.metrics["shown"], SHOWN.double().mean())


def test_the_defaults_are_those_of_the_authors_code():
    method = SDPO()
    assert (method.divergence, method.estimator) == (JS(0.5), TopK(100, "student"))
    assert (method.clip, method.ema, method.sampler) == (2.0, 0.05, Mix(1.0))
    assert method.context == "privileged"
    assert method.reads == ("shown", "log_q_label", "log_behaviour")


@each_divergence
def test_on_policy_with_everything_shown_it_is_gkd(divergence):
    arguments, logits = given(shown=ALL, stale=0.0)
    out = SDPO(divergence, Exact())(**arguments)
    expected = GKD(divergence)(log_p=arguments["log_p"], log_q=arguments["log_q"])
    close(out.loss, expected.loss)
    close(gradient(out.loss, logits), gradient(expected.loss, logits))
    assert out.metrics == {"shown": 1, "ratio": 1}


def test_tokens_are_weighted_by_the_clipped_ratio_which_is_not_differentiated():
    arguments, logits = given(shown=ALL)
    weight = (arguments["log_q_label"] - arguments["log_behaviour"]).detach().exp().clamp(max=1.5)
    assert (weight == 1.5).any() and (weight < 1).any()
    out = SDPO(KL(), Exact(), clip=1.5)(**arguments)
    expected = (weight * KL()(arguments["log_p"], arguments["log_q"])).mean()
    close(out.loss, expected)
    close(gradient(out.loss, logits), gradient(expected, logits))
    close(out.metrics["ratio"], weight.mean())


def test_a_ratio_too_large_for_the_dtype_is_clipped_too():
    arguments, logits = given(shown=ALL)
    arguments["log_behaviour"] = arguments["log_behaviour"] - 2000
    out = SDPO(KL(), Exact())(**arguments)
    close(out.loss, 2 * KL()(arguments["log_p"], arguments["log_q"]).mean())
    assert gradient(out.loss, logits).isfinite().all()


@pytest.mark.parametrize("rubbish", [torch.inf, -torch.inf, torch.nan])
def test_rows_that_were_not_shown_count_as_zeros_and_do_no_harm(rubbish):
    arguments, _ = given()
    leaf = arguments["log_q"].detach()
    arguments["log_p"][~SHOWN], leaf[~SHOWN] = rubbish, rubbish
    arguments["log_q"] = leaf.requires_grad_()
    method = SDPO(estimator=TopK(4, "student"))
    out = method(**arguments)
    alone = {name: tensor[SHOWN] for name, tensor in arguments.items()}
    close(out.loss, method(**alone, count=ROWS).loss)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert grad.isfinite().all() and not grad[~SHOWN].any() and grad[SHOWN].any(-1).all()


def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches():
    """Three shown rows of four, then two of four, and none of the middle."""
    arguments, logits = given()
    method = SDPO(estimator=TopK(4, "student"))
    whole = method(**arguments)
    parts = [
        method(**{name: tensor[rows] for name, tensor in arguments.items()}, count=ROWS)
        for rows in (slice(0, 3), slice(3, 5), slice(5, 8))
    ]
    close(sum(part.loss for part in parts), whole.loss, 1e-13)
    close(gradient(sum(part.loss for part in parts), logits), gradient(whole.loss, logits), 1e-12)
    for name, number in whole.metrics.items():  # the trainer's means, by tokens
        close(
            sum(n * part.metrics[name] for n, part in zip((3, 2, 3), parts, strict=True)) / 8, number, 1e-13
        )


@pytest.mark.parametrize(
    "estimator", [Exact(), TopK(4, "student"), FusedLinear(), SampledLogits(3)], ids=repr
)
@pytest.mark.parametrize("rows", [0, 3])
def test_with_nothing_shown_the_loss_is_zero_and_has_a_graph(estimator, rows):
    shapes = [(rows, 3), (VOCAB, 3)] * 2 if estimator.sees == "heads" else [(rows, VOCAB)] * 2
    tensors = {
        name: torch.zeros(shape).requires_grad_()
        for name, shape in zip(estimator.evidence, shapes, strict=True)
    }
    out = SDPO(estimator=estimator)(
        shown=torch.zeros(rows, dtype=torch.bool),
        log_q_label=torch.zeros(rows),
        log_behaviour=torch.zeros(rows),
        **tensors,
    )
    assert out.loss == 0 and out.metrics["shown"] == 0
    assert not gradient(out.loss, *tensors.values()).any()


@pytest.mark.parametrize("of", [Exact(), TopK(4, "student")], ids=repr)
def test_heads_train_the_same_objective(of):
    heads = {
        "p_hidden": random_rows(ROWS, 4),
        "p_weight": random_rows(VOCAB, 4, seed=3),
        "q_hidden": random_rows(ROWS, 3, seed=4).requires_grad_(),
        "q_weight": random_rows(VOCAB, 3, seed=5).requires_grad_(),
    }
    log_p, log_q = ((heads[f"{m}_hidden"] @ heads[f"{m}_weight"].T).log_softmax(-1) for m in "pq")
    label = {"log_q_label": log_q[:, 0], "log_behaviour": log_q[:, 1].detach(), "shown": SHOWN}
    student = [heads["q_hidden"], heads["q_weight"]]
    fused = SDPO(estimator=FusedLinear(chunk=2, of=of))(**heads, **label).loss
    plain = SDPO(estimator=of)(log_p=log_p, log_q=log_q, **label).loss
    close(fused, plain)
    close(gradient(fused, *student), gradient(plain, *student), 1e-9)


@pytest.mark.parametrize("divergence", [KL(), JS(0.5), ReverseKL()], ids=repr)
def test_a_teacher_outside_the_students_top_k_is_not_invisible(divergence):
    """Renormalised over the k symbols, both models agree here and the loss is 0 with gradient 0."""
    logits = torch.tensor([[6.0, 6.0, -3.0, -3.0]], dtype=torch.float64).requires_grad_()
    log_p = torch.tensor([[-3.0, -3.0, 6.0, 6.0]], dtype=torch.float64).log_softmax(-1)
    log_q, one = logits.log_softmax(-1), torch.ones(1, dtype=torch.bool)
    label = log_q[:, 0]
    out = SDPO(divergence, TopK(2, "student"))(
        log_p=log_p, log_q=log_q, shown=one, log_q_label=label, log_behaviour=label.detach()
    )
    # Both pairs of symbols are alike, so that two cells tell all.
    exact = divergence(log_p, log_q).squeeze()
    close(out.loss, exact)
    close(gradient(out.loss, logits), gradient(exact, logits), 1e-9)
    assert out.loss > 0.6 and gradient(out.loss, logits).any()


def test_what_it_cannot_train_is_refused():
    with pytest.raises(TypeError, match="only a sampled token"):
        SDPO(estimator=MonteCarlo())
    with pytest.raises(TypeError, match="TopK"):
        SDPO(fdiv.Renyi(2.0))
    for clip in (0.5, math.nan):
        with pytest.raises(ValueError, match="clip is a ratio >= 1"):
            SDPO(clip=clip)
    with pytest.raises(ValueError, match="ema is a rate"):
        SDPO(ema=1.5)


def test_nothing_given_is_ignored_and_nothing_missing_is_guessed():
    arguments, _ = given()
    with pytest.raises(TypeError, match="reads log_p, log_q; got log_p, log_q, mask"):
        SDPO()(**arguments, mask=SHOWN)
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        SDPO()(**arguments | {"shown": SHOWN.long()})
    with pytest.raises(ValueError, match="differ in shape"):
        SDPO()(**arguments | {"shown": SHOWN[:2]})


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = SDPO(KL(), TopK(20, "student"), clip=3.0, ema=0.0)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.sdpo"]) == method
    assert isinstance(method, Method)
