"""AMiD: the alpha-mixture in closed form, and the known methods at its ends."""

import math

import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv import GKD, KL, AdaptiveReplay, AlphaBeta, Exact, FusedLinear, Offline, ReverseKL, TopK
from fdiv.methods._method import Method
from fdiv.methods.distill.amid import AMiD, assistant

INF = math.inf
P = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
Q = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
ALPHAS = (-30.0, -3.0, -1.0, 0.0, 0.5, 1.0, 1.5, 3.0, 5.0, 30.0)


def by_formula(log_p, log_q, alpha, weight):
    h = (1 - alpha) / 2
    p, q = log_p.exp(), log_q.exp()
    r = (weight * p**h + (1 - weight) * q**h) ** (1 / h) if h else p**weight * q ** (1 - weight)
    return r / r.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("alpha", "r", "value"),
    [
        (0, (0.399146, 0.320853, 0.280001), 0.121439),
        (1, (0.398165, 0.344821, 0.257014), 0.109869),
        (3, (0.391304, 0.391304, 0.217391), 0.099103),
    ],
)
def test_the_assistant_takes_the_reference_values(alpha, r, value):
    log_r = assistant(P.log(), Q.log(), alpha, 0.5)
    assert log_r.exp().squeeze().tolist() == pytest.approx(r, abs=1e-6)
    loss = AMiD(alpha=alpha, weight=0.5)(log_p=P.log(), log_q=Q.log()).loss
    assert loss.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_the_assistant_is_its_formula_for_every_alpha(alpha, weight):
    """Beyond 1 too, where the authors' code takes the geometric mean."""
    log_p, log_q = random_rows(4, 6), random_rows(4, 6, 1)
    close(assistant(log_p, log_q, alpha, weight).exp(), by_formula(log_p, log_q, alpha, weight))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_assistants_gradient_is_that_of_its_value(alpha):
    log_p, log_q = (random_rows(2, 4, seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: assistant(a, b, alpha, 0.3), (log_p, log_q))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 3.0])
def test_before_normalising_the_students_share_is_the_gradient_of_log_r(alpha):
    h = (1 - alpha) / 2
    log_p, log_q = random_rows(3, 5), random_rows(3, 5, 1).requires_grad_()
    p, q = log_p.exp() ** h, log_q.detach().exp() ** h
    share = 0.7 * q / (0.3 * p + 0.7 * q)
    log_r = assistant(log_p, log_q, alpha, 0.3)
    up = random_rows(3, 5, 2)
    up = up - (up.sum(-1, keepdim=True)) * log_r.detach().exp()  # what a softmax lets through, alone
    close(gradient((up * log_r).sum(), log_q), (up * share).flatten())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("step", [1e-3, -1e-3, 1e-6, -1e-6, 1e-12])
def test_close_to_alpha_one_no_digit_is_lost(step, dtype):
    """The power 2/(1 - alpha) is 2e6 and more there. The geometric mean is within step/8 var(log p/q)."""
    log_p, log_q = random_rows(4, 50).to(dtype), random_rows(4, 50, 1).to(dtype).requires_grad_()
    near, at = assistant(log_p, log_q, 1 + step, 0.4), assistant(log_p, log_q, 1.0, 0.4)
    exact = by_formula(log_p.double(), log_q.detach().double(), 1.0, 0.4).log()
    room = abs(step) * (log_p - log_q).square().max().item()
    assert (near - exact).abs().max() < room + 300 * torch.finfo(dtype).eps
    weights = random_rows(4, 50, 2).to(dtype)
    slopes = [gradient((weights * log_r).sum(), log_q) for log_r in (near, at)]
    assert (slopes[0] - slopes[1]).abs().max() < 10 * room + 1e3 * torch.finfo(dtype).eps


def test_small_alpha_spans_the_union_of_supports_and_large_alpha_the_intersection():
    log_p = torch.tensor([0.5, 0.5, 0.0, 0.0]).log()
    log_q = torch.tensor([0.0, 0.5, 0.5, 0.0]).log().requires_grad_()
    for alpha in (-1.0, 0.0, 0.99):
        log_r = assistant(log_p, log_q, alpha, 0.5)
        assert (log_r > -INF).tolist() == [True, True, True, False]
        assert gradient(log_r[:3].sum(), log_q)[1:3].isfinite().all()
    for alpha in (1.0, 1.01, 3.0):
        log_r = assistant(log_p, log_q, alpha, 0.5)
        close(log_r.exp(), torch.tensor([0.0, 1.0, 0.0, 0.0]))
        assert gradient(log_r[1], log_q).isfinite().all()
        inside = AMiD(ReverseKL(), alpha=alpha)(log_p=log_p[None], log_q=log_q[None]).loss
        close(inside, torch.tensor(2.0).log())
        assert gradient(inside, log_q).isfinite().all()


@pytest.mark.parametrize("weight", [0.1, 0.6])
def test_at_alpha_minus_one_it_is_the_skewed_kl_of_distillm(weight):
    log_p, logits = random_rows(5, 7), random_rows(5, 7, 1).requires_grad_()
    log_q = logits.log_softmax(-1)
    pairs = [
        (AMiD(alpha=-1, weight=weight), fdiv.SkewKL(weight)),
        (AMiD(alpha=-1, weight=weight, pair="q, r"), fdiv.SkewReverseKL(1 - weight)),
    ]
    for method, skewed in pairs:
        loss, expected = (m(log_p=log_p, log_q=log_q).loss for m in (method, GKD(skewed)))
        close(loss, expected)
        close(gradient(loss, logits), gradient(expected, logits))


def test_the_reverse_divergence_turns_the_pair_round():
    log_p, log_q = random_rows(5, 7), random_rows(5, 7, 1)
    log_r = assistant(log_p, log_q, 0.0, 0.3)
    for pair, first in (("p, r", log_p), ("q, r", log_q)):
        turned = AMiD(ReverseKL(), weight=0.3, pair=pair)(log_p=log_p, log_q=log_q).loss
        close(turned, KL()(log_r, first).mean())
        turned = AMiD(AlphaBeta(0.7, 0.2), weight=0.3, pair=pair)(log_p=log_p, log_q=log_q).loss
        close(turned, AlphaBeta(0.2, 0.7)(log_r, first).mean())


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_near_the_teacher_all_alphas_are_alike(alpha, weight):
    """KL(p, r) is (1 - weight)^2 chi^2 / 2, KL(q, r) weight^2 chi^2 / 2."""
    log_p = random_rows(3, 6)
    log_q = (log_p + 1e-4 * random_rows(3, 6, 1)).log_softmax(-1)
    chi = KL()(log_p, log_q).mean()
    for pair, factor in (("p, r", (1 - weight) ** 2), ("q, r", weight**2)):
        loss = AMiD(alpha=alpha, weight=weight, pair=pair)(log_p=log_p, log_q=log_q).loss
        assert (loss / chi).item() == pytest.approx(factor, rel=2e-3)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("pair", ["p, r", "q, r"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(alpha, pair):
    log_p = random_rows(3, 6)
    logits = log_p.clone().requires_grad_()
    loss = AMiD(alpha=alpha, pair=pair)(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    assert loss.abs() < 1e-14 and gradient(loss, logits).abs().max() < 1e-14


def test_float32_rows_of_a_large_vocabulary_keep_their_digits():
    log_p, log_q = (random_rows(4, 5000, seed, scale=6.0) for seed in (0, 1))
    for alpha in (-1.0, 0.0, 0.9999, 1.0, 3.0):
        loss, exact = (
            AMiD(alpha=alpha)(log_p=a, log_q=b).loss
            for a, b in ((log_p.float(), log_q.float()), (log_p, log_q))
        )
        assert loss.item() == pytest.approx(exact.item(), rel=1e-4)


def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph():
    log_p, logits = random_rows(6, 7), random_rows(6, 7, 1).requires_grad_()
    whole = AMiD()(log_p=log_p, log_q=logits.log_softmax(-1)).loss
    parts = [
        AMiD()(log_p=log_p[part], log_q=logits[part].log_softmax(-1), count=6).loss
        for part in (slice(0, 1), slice(1, 6), slice(6, 6))
    ]
    close(sum(parts), whole, 1e-13)
    close(gradient(sum(parts), logits), gradient(whole, logits), 1e-12)
    assert parts[2] == 0 and not gradient(parts[2], logits).any()


def test_wrong_settings_are_refused_with_what_to_write_instead():
    for sampler in ("data", Offline):
        with pytest.raises(TypeError, match=r"write Offline\(\)"):
            AMiD(sampler=sampler)
    for weight in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="write GKD"):
            AMiD(weight=weight)
    with pytest.raises(ValueError, match="write the reverse divergence"):
        AMiD(pair="r, p")
    with pytest.raises(ValueError, match="finite"):
        AMiD(alpha=INF)
    with pytest.raises(TypeError, match=r"write Exact\(\)"):
        AMiD(estimator=FusedLinear())
    with pytest.raises(TypeError, match=r"write KL\(\)"):
        AMiD("KL")


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = AMiD(AlphaBeta(0.2, 0.7), Exact(), alpha=3.0, pair="q, r")
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.amid"]) == method
    assert isinstance(method, Method) and method.sampler == AdaptiveReplay()
    log_p, log_q = random_rows(5, 7), random_rows(5, 7, 1)
    assert 0 < AMiD(estimator=TopK(2))(log_p=log_p, log_q=log_q).loss < AMiD()(log_p=log_p, log_q=log_q).loss
