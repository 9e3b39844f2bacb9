"""PACED: weights by enumeration of all numbers of passes, and two stages."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, JS, KL, Exact, FusedLinear, MonteCarlo, ReverseKL, TopK
from fdiv.methods._method import Method
from fdiv.methods.distill.paced import PACED

ROWS, VOCAB = 7, 6
PASSES = torch.tensor([0, 0, 3, 3, 3, 8, 4], dtype=torch.float64)
TRIES = torch.full((ROWS,), 8, dtype=torch.float64)


def models():
    """log_p, and the student's logits, [rows, vocab]."""
    return random_rows(ROWS, VOCAB), random_rows(ROWS, VOCAB, seed=1).requires_grad_()


def given(progress=0.0):
    log_p, logits = models()
    evidence = {"log_p": log_p, "log_q": logits.log_softmax(-1)}
    return evidence | {"passes": PASSES, "tries": TRIES, "progress": progress}, logits


def expected_weight(method, tries, rate):
    """The mean of the weight over all numbers of passes of `tries` independent answers."""
    passes = torch.arange(tries + 1, dtype=torch.float64)
    chance = torch.tensor(
        [math.comb(tries, k) * rate**k * (1 - rate) ** (tries - k) for k in range(tries + 1)],
        dtype=torch.float64,
    )
    return (chance @ method.weight(passes, torch.full_like(passes, tries))).item()


# -- weights -----------------------------------------------------------------------------------------------


def test_the_worked_weights_of_eight_tries():
    passes = torch.arange(9)
    weight = PACED(scale=1.0).weight(passes, torch.full_like(passes, 8))
    half = [0, 0.109375, 0.1875, 0.234375, 0.25]
    assert weight.tolist() == half + half[-2::-1]


def test_by_default_the_heaviest_prompt_weighs_one():
    passes = torch.arange(101, dtype=torch.float64)
    for a, b in ((1, 1), (2, 1), (1, 3), (0.5, 1.5), (0, 2), (0, 0)):
        weight = PACED(a=a, b=b).weight(passes, torch.full_like(passes, 100))
        assert weight.max() == pytest.approx(1, abs=1e-12 if (a, b) != (2, 1) else 1e-3)
        if a + b:
            assert weight.argmax() == pytest.approx(100 * a / (a + b), abs=0.5)


@pytest.mark.parametrize("tries", [2, 3, 8])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.8])
def test_the_plug_in_weight_is_low_by_one_part_in_tries(rate, tries):
    """For a = b = 1 that is a factor, the same for all prompts: the curriculum is not distorted."""
    expected = (1 - 1 / tries) * rate * (1 - rate)
    assert expected_weight(PACED(scale=1.0), tries, rate) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("tries", [4, 5, 9])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 1), (1, 2), (2, 2), (0, 2), (3, 0), (0, 0)])
def test_the_unbiased_weight_is_right_on_average(a, b, rate, tries):
    method = PACED(a=a, b=b, rate="unbiased", scale=1.0)
    assert expected_weight(method, tries, rate) == pytest.approx(rate**a * (1 - rate) ** b, abs=1e-13)


@pytest.mark.parametrize(("rate", "factor"), [(0.1, 2.25), (0.9, 7 / 12)])
def test_the_plug_in_weight_is_distorted_for_other_exponents(rate, factor):
    """k^2 (K - k) = k (k - 1) (K - k) + k (K - k), whose means are known: (K - 1) (K - 2 + 1 / r) / K^2."""
    assert factor == pytest.approx(3 * (2 + 1 / rate) / 16)
    mean = expected_weight(PACED(a=2, b=1, scale=1.0), 4, rate)
    assert mean == pytest.approx(factor * rate**2 * (1 - rate), abs=1e-13)


def test_the_unbiased_weight_of_one_and_one_is_the_share_of_unequal_pairs():
    passes = torch.arange(9, dtype=torch.float64)
    weight = PACED(rate="unbiased", scale=1.0).weight(passes, torch.full_like(passes, 8))
    close(weight, passes * (8 - passes) / 56)


def test_smoothing_gives_up_no_prompt():
    passes = torch.tensor([0.0, 4.0, 8.0], dtype=torch.float64)
    weight = PACED(rate="smoothed", scale=1.0).weight(passes, torch.full_like(passes, 8))
    close(weight, torch.tensor([0.5 * 8.5, 4.5**2, 8.5 * 0.5], dtype=torch.float64) / 81)
    assert (weight > 0).all()


# -- the loss ------------------------------------------------------------------------------------------------


@each_divergence
def test_the_loss_is_the_weighted_mean_of_the_first_divergence_then_of_the_second(divergence):
    for progress, active in ((0.0, divergence), (0.49, divergence), (0.5, JS(0.2)), (0.99, JS(0.2))):
        arguments, logits = given(progress)
        out = PACED(divergence, second=JS(0.2), scale=1.0)(**arguments)
        weight = PASSES / 8 * (1 - PASSES / 8)
        expected = (weight * active(arguments["log_p"], arguments["log_q"])).mean()
        close(out.loss, expected)
        close(gradient(out.loss, logits), gradient(expected, logits))
        close(out.metrics["weight"], weight.mean())


def test_the_stages_meet_where_switch_says():
    arguments, _ = given(0.3)
    first, second = (PACED(switch=s)(**arguments).loss for s in (1.0, 0.0))
    assert PACED(switch=0.4)(**arguments).loss == first
    assert PACED(switch=0.3)(**arguments).loss == second
    close(second, PACED(ReverseKL(), switch=1.0)(**arguments).loss)


def test_without_exponents_it_is_gkd():
    arguments, logits = given()
    out = PACED(a=0, b=0)(**arguments)
    expected = GKD(KL())(log_p=arguments["log_p"], log_q=arguments["log_q"]).loss
    close(out.loss, expected)
    close(gradient(out.loss, logits), gradient(expected, logits))


@pytest.mark.parametrize("rubbish", [torch.inf, -torch.inf, torch.nan])
def test_prompts_of_weight_zero_count_as_zeros_and_do_no_harm(rubbish):
    arguments, _ = given()
    idle = (PASSES == 0) | (PASSES == 8)
    leaf = arguments["log_q"].detach()
    before = PACED()(**arguments).loss
    arguments["log_p"][idle], leaf[idle] = rubbish, rubbish
    arguments["log_q"] = leaf.requires_grad_()
    out = PACED()(**arguments)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    close(out.loss, before, 1e-13)
    assert grad.isfinite().all() and not grad[idle].any() and grad[~idle].any(-1).all()


@pytest.mark.parametrize("rate", ["plug-in", "unbiased", "smoothed"])
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(rate):
    """Two rows, of weight 0 unless smoothed, and five."""
    arguments, logits = given()
    method = PACED(rate=rate)
    whole, parts = method(**arguments), []
    for rows in (slice(0, 2), slice(2, 7)):
        some = {n: t[rows] if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        parts.append(method(**some, count=ROWS))
    close(sum(part.loss for part in parts), whole.loss, 1e-13)
    close(gradient(sum(part.loss for part in parts), logits), gradient(whole.loss, logits), 1e-12)
    close((2 * parts[0].metrics["weight"] + 5 * parts[1].metrics["weight"]) / 7, whole.metrics["weight"])


@pytest.mark.parametrize("rows", [0, 3])
def test_with_nothing_to_learn_from_the_loss_is_zero_and_has_a_graph(rows):
    """No row, or three of a prompt that was never solved."""
    log_q = torch.zeros(rows, VOCAB, requires_grad=True)
    numbers = {"passes": torch.zeros(rows), "tries": torch.full((rows,), 8.0), "progress": 0.0}
    out = PACED()(log_p=torch.zeros(rows, VOCAB), log_q=log_q, **numbers)
    assert out.loss == 0 and out.metrics["weight"] == 0
    assert not gradient(out.loss, log_q).any()


@pytest.mark.parametrize("of", [Exact(), TopK(3)], ids=repr)
@pytest.mark.parametrize("progress", [0.0, 0.7])
def test_heads_train_the_same_objective(of, progress):
    hidden, weight = random_rows(ROWS, 3, seed=3).requires_grad_(), random_rows(VOCAB, 3, seed=4)
    weight.requires_grad_()
    log_p = (hidden.detach() @ (2 * weight.detach()).T).log_softmax(-1)
    heads = {"p_hidden": hidden.detach(), "p_weight": 2 * weight.detach()}
    numbers = {"passes": PASSES, "tries": TRIES, "progress": progress}
    fused = PACED(estimator=FusedLinear(chunk=2, of=of))(**heads, q_hidden=hidden, q_weight=weight, **numbers)
    plain = PACED(estimator=of)(log_p=log_p, log_q=(hidden @ weight.T).log_softmax(-1), **numbers)
    close(fused.loss, plain.loss)
    close(gradient(fused.loss, hidden, weight), gradient(plain.loss, hidden, weight), 1e-9)


# -- what is refused -----------------------------------------------------------------------------------------


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="exponents >= 0"):
        PACED(a=-1.0)
    with pytest.raises(ValueError, match="rate is one of plug-in, unbiased, smoothed"):
        PACED(rate="plugin")
    with pytest.raises(ValueError, match="write integers or rate='smoothed'"):
        PACED(a=0.5, rate="unbiased")
    with pytest.raises(ValueError, match="switch is a fraction"):
        PACED(switch=1.5)
    with pytest.raises(ValueError, match="scale is > 0"):
        PACED(scale=0.0)
    with pytest.raises(TypeError, match="only a sampled token"):
        PACED(estimator=MonteCarlo())


def test_either_divergence_has_to_fit_the_estimator():
    for names in ({"divergence": fdiv.Renyi(2.0)}, {"second": fdiv.Renyi(2.0)}):
        with pytest.raises(TypeError, match="f-divergence"):
            PACED(estimator=TopK(3), **names)


def test_impossible_counts_are_refused():
    method, two = PACED(a=2, b=1, rate="unbiased"), torch.tensor([2.0])
    with pytest.raises(ValueError, match="needs tries >= 3"):
        method.weight(torch.tensor([1.0]), two)
    for passes in (-1.0, 3.0):
        with pytest.raises(ValueError, match="0 <= passes <= tries"):
            PACED().weight(torch.tensor([passes]), two)
    with pytest.raises(ValueError, match="needs tries >= 1"):
        PACED().weight(torch.tensor([0.0]), torch.tensor([0.0]))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = PACED(JS(0.1), TopK(20), a=2, b=1, switch=0.7, rate="unbiased", scale=2.0)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.paced"]) == method
    assert isinstance(method, Method)
    assert method.reads == ("passes", "tries", "progress")
