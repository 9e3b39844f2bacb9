"""DisCO: its gradient against autograd of the objective as the paper writes it, and the limits of tau."""

import math
from itertools import product

import pytest
import torch
from tests.worlds import LOG_P, close, each_divergence, gradient, random_rows, six_symbols

import fdiv
from fdiv import KL
from fdiv.methods._method import Method
from fdiv.methods.rl.disco import DisCO

# Four questions: of both kinds, all right, all wrong, of both kinds and another size.
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3])
CORRECT = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0]).bool()


def batch(seed=0, apart=0.3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    log_policy = (-torch.rand(11, 4, generator=generator, dtype=dtype) - 0.1).requires_grad_()
    noise = apart * torch.randn(11, 4, generator=generator, dtype=dtype)
    mask = torch.ones(11, 4, dtype=torch.bool)
    mask[0, 2:] = mask[5, 1:] = mask[9, 3:] = False
    given = {"log_policy": log_policy, "log_behaviour": log_policy.detach() + noise, "mask": mask}
    return log_policy, given | {"correct": CORRECT, "group": GROUP}


def written_out(log_policy, log_behaviour, mask, correct, group, *, score, tau, beta, delta):
    """The paper's objective, with its sign turned: no surrogate anywhere."""
    rows = log_policy if score == "log-likelihood" else (log_policy - log_behaviour).exp()
    s = torch.stack([row[m].mean() for row, m in zip(rows, mask, strict=True)])
    total = 0.0
    for question in range(4):
        right, wrong = s[(group == question) & correct], s[(group == question) & ~correct]
        if len(right) and len(wrong):
            worst = wrong.mean() if tau is None else tau * (wrong / tau).exp().mean().log()
            total = total + right.mean() - worst
    log_t = (log_policy - log_behaviour)[mask]
    kl = (log_t.exp() - 1 - log_t).mean()
    return -total / 4 + beta / 2 * (kl - delta).clamp(min=0) ** 2


CASES = list(product(("log-likelihood", "ratio"), (None, 0.3, 10.0), (1e-4, 1e3), (0, 1)))


@pytest.mark.parametrize(("score", "tau", "delta", "seed"), CASES)
def test_value_and_gradient_are_those_of_the_objective(score, tau, delta, seed):
    log_policy, given = batch(seed)
    method = DisCO(score=score, tilt=None if tau is None else KL(), tau=tau, beta=7.0, delta=delta)
    out = method(**given)
    true = written_out(**given, score=score, tau=tau, beta=7.0, delta=delta)
    close(out.loss, true, 1e-12)
    close(gradient(out.loss, log_policy), gradient(true, log_policy), 1e-12)
    assert (out.metrics["penalty"] > 0) == (delta < 1)
    assert out.metrics["mixed"].item() == 0.5


def test_the_temperatures_of_the_authors_are_the_defaults():
    for score, tau in (("log-likelihood", 10.0), ("ratio", 1.0)):
        _, given = batch()
        close(DisCO(score=score)(**given).loss, DisCO(score=score, tau=tau)(**given).loss, 1e-15)


# -- the wrong answers ---------------------------------------------------------------------------------

SCORES = torch.tensor([-1.3, -0.2, -0.9, -2.5, -0.25], dtype=torch.float64)


def test_the_tilt_of_the_paper_is_a_log_mean_exp_whose_weights_are_a_softmax():
    scores = SCORES.clone().requires_grad_()
    value = DisCO(tau=0.7).hardest(scores)
    close(value, 0.7 * (SCORES / 0.7).exp().mean().log(), 1e-14)
    close(gradient(value, scores), (SCORES / 0.7).softmax(0), 1e-14)


@pytest.mark.parametrize("tilt", [KL(), fdiv.JS(0.5), fdiv.Pearson(), fdiv.SquaredHellinger()], ids=repr)
def test_tau_leads_from_the_largest_score_to_their_mean(tilt):
    alone = torch.full((5,), -math.inf, dtype=torch.float64)
    alone[1] = 0.0  # all weight on the largest
    price = tilt(alone, torch.full((5,), -math.log(5), dtype=torch.float64))
    below = SCORES.max() - DisCO(tilt=tilt, tau=1e-4).hardest(SCORES)
    assert 0 <= below <= 1e-4 * price * (1 + 1e-9)
    above = DisCO(tilt=tilt, tau=1e3).hardest(SCORES) - SCORES.mean()
    expected = SCORES.var(correction=0) / (2 * 1e3 * tilt.curvature_at_one)  # the next order
    assert above.item() == pytest.approx(expected.item(), rel=0.01)
    values = [DisCO(tilt=tilt, tau=tau).hardest(SCORES).item() for tau in (0.1, 0.3, 1.0, 3.0, 10.0)]
    assert values == sorted(values, reverse=True)
    close(DisCO(tilt=None).hardest(SCORES), SCORES.mean())


@pytest.mark.parametrize(
    "tilt", [KL(), fdiv.JS(0.5), fdiv.Pearson(), fdiv.Alpha(0.5), fdiv.ReverseKL(), 0.5 * fdiv.KL()], ids=repr
)
def test_with_any_tilt_no_other_weights_are_more_adverse(tilt):
    scores = SCORES.clone().requires_grad_()
    value = DisCO(tilt=tilt, tau=0.5).hardest(scores)
    uniform = torch.full((5,), -math.log(5), dtype=torch.float64)
    weights = torch.cat([random_rows(500, 5), random_rows(500, 5, seed=1, scale=0.1)])
    others = weights.exp() @ SCORES - 0.5 * tilt(weights, uniform.expand(1000, 5))
    assert (others <= value + 1e-12).all()
    best = gradient(value, scores)  # the weights themselves
    close(best @ SCORES - 0.5 * tilt(best.log(), uniform), value, 1e-12)
    step = 1e-5 * torch.tensor([1.0, -2.0, 0.5, 0.3, 1.0], dtype=torch.float64)
    moved = (DisCO(tilt=tilt, tau=0.5).hardest(SCORES + s) for s in (step, -step))
    difference = next(moved) - next(moved)
    close(difference / 2e-5, best @ step / 1e-5, 1e-7)


def test_one_wrong_answer_is_its_own_worst():
    for tilt in (KL(), fdiv.JS(0.5), None):
        close(DisCO(tilt=tilt).hardest(SCORES[:1]), SCORES[0])


# -- questions -----------------------------------------------------------------------------------------


def test_a_question_of_one_kind_counts_as_zero_and_stays_in_the_denominator():
    log_policy, given = batch()
    method = DisCO(beta=0.0)
    both = method(**given).loss
    mixed = (GROUP == 0) | (GROUP == 3)
    some = {name: tensor[mixed] for name, tensor in given.items()}
    close(both, method(**some).loss / 2, 1e-14)
    close(both, method(**some, groups=4).loss, 1e-14)
    grad = torch.autograd.grad(both, log_policy)[0]
    assert not grad[~mixed].any() and grad[mixed][given["mask"][mixed]].all()


@pytest.mark.parametrize(("first", "second"), [(0, 3), (1, 2)], ids=["right", "wrong"])
def test_an_answer_without_a_token_has_no_score(first, second):
    _, given = batch()
    given["mask"] = given["mask"].clone()
    given["mask"][first] = False
    kept = torch.arange(11) != first
    some = {name: tensor[kept] for name, tensor in given.items()}
    close(DisCO(beta=0.0)(**given).loss, DisCO(beta=0.0)(**some).loss, 1e-14)
    given["mask"][second] = False  # question 0 has none of this kind left
    assert DisCO()(**given).metrics["mixed"].item() == 0.25


def test_on_the_first_step_the_ratio_scores_every_answer_alike_and_the_constraint_rests():
    log_policy, given = batch(apart=0.0)
    out = DisCO(score="ratio", tilt=None)(**given)
    close(out.loss, torch.zeros((), dtype=torch.float64))
    assert out.metrics["divergence"] == 0 and out.metrics["penalty"] == 0
    likelihood = DisCO(tilt=None)(**given).loss
    close(gradient(out.loss, log_policy), gradient(likelihood, log_policy), 1e-14)


# -- the constraint ------------------------------------------------------------------------------------


@each_divergence
def test_the_surveyed_value_has_the_gradient_of_the_divergence_from_who_wrote(divergence):
    theta, log_q = six_symbols()
    value = LOG_P.exp() @ DisCO(divergence).survey(log_q, LOG_P)
    close(value, divergence(LOG_P, log_q))
    close(gradient(value, theta), gradient(divergence(LOG_P, log_q), theta))


def test_the_constraint_is_of_the_global_batch_and_its_parts_add_up():
    log_policy, given = batch()
    method = DisCO(fdiv.JS(0.3), beta=50.0, delta=1e-3)
    whole = method(**given)
    survey = method.survey(log_policy, given["log_behaviour"])[given["mask"]].mean().detach()
    close(whole.metrics["divergence"], survey)
    close(whole.metrics["penalty"], 25.0 * (survey - 1e-3) ** 2)
    of_all = {"count": given["mask"].sum(), "groups": 4, "batch_value": survey}
    parts = []
    for rows in (GROUP < 1, GROUP == 1, GROUP > 1):
        some = {name: tensor[rows] for name, tensor in given.items()}
        parts.append(method(**some | {"group": some["group"] - some["group"][0]}, **of_all).loss)
    close(sum(parts), whole.loss, 1e-12)
    close(gradient(sum(parts), log_policy), gradient(whole.loss, log_policy), 1e-12)


def test_inside_the_bound_there_is_no_pull_and_outside_it_grows():
    log_policy, given = batch()
    free = gradient(DisCO(beta=0.0)(**given).loss, log_policy)
    kl = DisCO()(**given).metrics["divergence"].item()
    close(gradient(DisCO(delta=1.01 * kl)(**given).loss, log_policy), free, 1e-14)
    pulls = [gradient(DisCO(beta=1.0, delta=d * kl)(**given).loss, log_policy) - free for d in (0.9, 0.8)]
    close(pulls[1], 2 * pulls[0], 1e-9)
    assert pulls[0].any()


# -- what may go wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", ["log-likelihood", "ratio"])
@pytest.mark.parametrize("divergence", [KL(), fdiv.JS(0.5)], ids=repr)
def test_enormous_ratios_give_finite_losses_and_gradients(divergence, score, dtype):
    log_policy, given = batch(dtype=dtype)
    far = torch.tensor([1e4, 0.0, 100.0, 30.0], dtype=dtype)
    signs = (1,) if dtype == torch.float32 else (1, -1)
    for sign in signs:  # who wrote the answers thought them far likelier, or less likely
        given["log_behaviour"] = log_policy.detach() + sign * far
        out = DisCO(divergence, score)(**given)
        assert out.loss.isfinite() and gradient(out.loss, log_policy).isfinite().all()
    given["log_behaviour"] = log_policy.detach() - far
    out = DisCO(divergence, score, beta=0.0)(**given)
    assert out.loss.isfinite() and gradient(out.loss, log_policy).isfinite().all()


@pytest.mark.parametrize("score", ["log-likelihood", "ratio"])
def test_half_precision_is_computed_in_float32(score):
    log_policy, given = batch(dtype=torch.bfloat16)
    out = DisCO(score=score)(**given)
    assert out.loss.dtype == torch.float32 and gradient(out.loss, log_policy).isfinite().all()


@pytest.mark.parametrize("divergence", [KL(), fdiv.JS(0.5)], ids=repr)
def test_a_constraint_whose_square_overflows_is_refused(divergence):
    log_policy, given = batch(dtype=torch.float32)
    given["log_behaviour"] = log_policy.detach() - 1e4
    with pytest.raises(ValueError, match="away from who wrote the answers"):
        DisCO(divergence)(**given)


def test_an_answer_that_the_policy_has_stopped_writing_has_a_ratio_and_no_log_likelihood():
    log_policy, given = batch()
    given["log_policy"] = torch.where(torch.arange(44).reshape(11, 4) == 5, -math.inf, log_policy)
    out = DisCO(score="ratio")(**given)
    assert out.loss.isfinite() and gradient(out.loss, log_policy).isfinite().all()
    with pytest.raises(ValueError, match="gives one of its tokens no mass"):
        DisCO()(**given)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_masked_tokens_are_not_looked_at(rubbish):
    log_policy, given = batch()
    clean = DisCO()(**given)
    for name in ("log_policy", "log_behaviour"):
        given[name] = torch.where(given["mask"], given[name], rubbish)
    out = DisCO()(**given)
    close(out.loss, clean.loss)
    close(gradient(out.loss, log_policy), gradient(clean.loss, log_policy))


@pytest.mark.parametrize("rows", [0, 11])
def test_without_any_token_the_loss_is_zero_and_keeps_its_graph(rows):
    log_policy, given = batch()
    given = {name: tensor[:rows] for name, tensor in given.items()}
    given["mask"] = torch.zeros_like(given["mask"])
    out = DisCO()(**given)
    assert out.loss == 0 and not gradient(out.loss, log_policy).any()


def test_only_the_policy_receives_a_gradient():
    _, given = batch()
    given["log_behaviour"] = given["log_behaviour"].clone().requires_grad_()
    loss = DisCO(score="ratio", beta=10.0)(**given).loss
    assert torch.autograd.grad(loss, given["log_behaviour"], allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"divergence": fdiv.Renyi(0.5)}, TypeError, "DisCO takes an f-divergence"),
        ({"tilt": "KL"}, TypeError, "DisCO's tilt takes an f-divergence"),
        ({"tilt": fdiv.TV()}, TypeError, "has to be smooth"),
        ({"tilt": None, "tau": 1.0}, ValueError, "weighs wrong answers alike"),
        ({"tau": 0.0}, ValueError, "tau is a number > 0"),
        ({"tau": math.inf}, ValueError, "the mean, is tilt=None"),
        ({"score": "likelihood"}, ValueError, "score is 'log-likelihood' or 'ratio'"),
        ({"beta": -1.0}, ValueError, "beta must be >= 0"),
        ({"delta": math.nan}, ValueError, "delta must be >= 0"),
    ],
    ids=repr,
)
def test_wrong_settings_are_refused(settings, error, reason):
    with pytest.raises(error, match=reason):
        DisCO(**settings)


def test_a_verdict_that_is_a_number_is_refused():
    _, given = batch()
    with pytest.raises(TypeError, match="write reward > 0"):
        DisCO()(**given | {"correct": CORRECT.double()})


def test_the_object_is_its_recipe_and_keeps_the_contract():
    for method in (
        DisCO(),
        DisCO(fdiv.JS(0.3), "ratio", None, delta=1e-3),
        DisCO(tilt=fdiv.JS(0.5), tau=2.0),
    ):
        assert fdiv.parse(repr(method), ["fdiv.methods.rl.disco"]) == method
        assert isinstance(method, Method)
    assert DisCO.unit == "group"
