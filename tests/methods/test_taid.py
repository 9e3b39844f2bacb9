"""TAID: the teacher between student and teacher, and the schedule that moves it."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import GKD, KL, FusedLinear, Mix, MonteCarlo, Offline, TopK
from fdiv.methods._method import Adaptive, Method
from fdiv.methods.distill.taid import TAID, interpolated

ROWS, VOCAB = 6, 7
MASK = torch.tensor([True, False, True, True, False, True])
P, Q = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.6, 0.3, 0.1], [0.2, 0.3, 0.5]))


def models(seed=0):
    """log_p, and the student's logits, [rows, vocab]."""
    return random_rows(ROWS, VOCAB, seed), random_rows(ROWS, VOCAB, seed + 1).requires_grad_()


def at(t):
    return {"state": TAID().initial_state() | {"t": t}, "progress": 0.0}


# -- the loss ------------------------------------------------------------------------------------------------


def test_halfway_the_teacher_is_the_normalised_geometric_mean():
    expected = torch.tensor([[0.398165, 0.344821, 0.257014]], dtype=torch.float64)
    close(interpolated(P, Q, 0.5).exp(), expected, 2e-6)
    mean = (P.exp() * Q.exp()).sqrt()
    close(interpolated(P, Q, 0.5).exp(), mean / mean.sum(), 1e-14)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.4, 1.0])
def test_the_teacher_is_the_softmax_of_the_interpolated_logits(t):
    """Unnormalised logits of both, as the paper writes it."""
    teacher, student = 3 + 2 * random_rows(ROWS, VOCAB, 0), random_rows(ROWS, VOCAB, 1) - 5
    between = interpolated(teacher.log_softmax(-1), student.log_softmax(-1), t)
    close(between.exp(), ((1 - t) * student + t * teacher).softmax(-1), 1e-13)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.4, 1.0])
def test_the_gradient_is_the_student_less_the_teacher_between(t):
    log_p, logits = models()
    loss = TAID()(log_p=log_p, log_q=logits.log_softmax(-1), **at(t)).loss
    between = ((1 - t) * logits + t * log_p).softmax(-1)
    close(gradient(loss, logits), ((logits.softmax(-1) - between) / ROWS).detach().flatten(), 1e-12)


@each_divergence
def test_at_the_end_it_is_gkd(divergence):
    log_p, logits = models()
    tensors = {"log_p": log_p, "log_q": logits.log_softmax(-1), "mask": MASK}
    loss, expected = TAID(divergence)(**tensors, **at(1.0)).loss, GKD(divergence)(**tensors).loss
    assert loss == expected
    assert torch.equal(gradient(loss, logits), gradient(expected, logits))


@each_divergence
def test_in_between_it_is_gkd_from_a_fixed_teacher(divergence):
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    loss = TAID(divergence)(log_p=log_p, log_q=log_q, **at(0.4)).loss
    fixed = (0.4 * log_p + 0.6 * log_q.detach()).log_softmax(-1)
    expected = GKD(divergence)(log_p=fixed, log_q=log_q).loss
    close(loss, expected, 1e-13)
    close(gradient(loss, logits), gradient(expected, logits), 1e-12)


@pytest.mark.parametrize("t", [0.2, 0.4, 0.9])
def test_near_the_teacher_the_gradient_is_t_times_that_of_kl(t):
    log_p, _ = models()
    logits = (log_p + 1e-5 * random_rows(ROWS, VOCAB, 5)).requires_grad_()
    tensors = {"log_p": log_p, "log_q": logits.log_softmax(-1)}
    loss, plain = TAID()(**tensors, **at(t)).loss, GKD(KL())(**tensors).loss
    close(gradient(loss, logits), t * gradient(plain, logits), 1e-4)


def test_the_objective_is_kl_and_the_entropy_of_the_teacher_between():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    out = TAID()(log_p=log_p, log_q=log_q, **at(0.4))
    between = interpolated(log_p, log_q, 0.4)
    entropy = -(between.exp() * between).sum(-1).mean()
    close(out.metrics["objective"], (out.loss + entropy).detach(), 1e-13)
    assert not out.metrics["objective"].requires_grad
    close(out.metrics["t"], torch.tensor(0.4, dtype=torch.float64), 1e-14)
    other = TAID(fdiv.JS(0.5))(log_p=log_p, log_q=log_q, **at(0.4))
    assert other.metrics["objective"] == out.metrics["objective"]


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_tokens_that_both_models_exclude_cost_nothing(t):
    log_p, logits = models()
    plain = TAID()(log_p=log_p, log_q=logits.log_softmax(-1), **at(t))
    none = torch.full((ROWS, 2), -torch.inf, dtype=torch.float64)
    wider = torch.cat([logits, none], -1).log_softmax(-1)
    out = TAID()(log_p=torch.cat([log_p, none], -1), log_q=wider, **at(t))
    close(out.loss, plain.loss, 1e-13)
    close(out.metrics["objective"], plain.metrics["objective"], 1e-13)
    close(gradient(out.loss, logits), gradient(plain.loss, logits), 1e-12)


@pytest.mark.parametrize("rubbish", [torch.inf, torch.nan])
def test_masked_rows_do_no_harm(rubbish):
    log_p, logits = models()
    log_q = logits.log_softmax(-1).detach()
    kept = TAID()(log_p=log_p[MASK], log_q=log_q[MASK], **at(0.4))
    log_p[~MASK], log_q[~MASK] = rubbish, rubbish
    out = TAID()(log_p=log_p, log_q=log_q.requires_grad_(), mask=MASK, **at(0.4))
    close(out.loss.detach(), kept.loss, 1e-14)
    close(out.metrics["objective"], kept.metrics["objective"], 1e-14)
    assert gradient(out.loss, log_q).isfinite().all()


def test_loss_and_metrics_do_not_depend_on_the_split_into_micro_batches():
    log_p, logits = models()
    log_q = logits.log_softmax(-1)
    whole = TAID()(log_p=log_p, log_q=log_q, mask=MASK, **at(0.4))
    parts = [
        TAID()(log_p=log_p[r], log_q=log_q[r], mask=MASK[r], count=MASK.sum(), **at(0.4))
        for r in (slice(0, 2), slice(2, 6))
    ]
    loss = sum(part.loss for part in parts)
    close(loss, whole.loss, 1e-13)
    close(gradient(loss, logits), gradient(whole.loss, logits), 1e-12)
    for name in ("objective", "t"):  # one token of four, and three
        close(parts[0].metrics[name] / 4 + 3 * parts[1].metrics[name] / 4, whole.metrics[name], 1e-13)


def test_no_token_at_all_has_loss_zero_and_a_graph():
    log_p, logits = models()
    for rows, mask in ((slice(0, 0), None), (slice(None), torch.zeros(ROWS, dtype=torch.bool))):
        loss = TAID()(log_p=log_p[rows], log_q=logits[rows].log_softmax(-1), mask=mask, **at(0.4)).loss
        assert loss == 0 and not gradient(loss, logits).any()


# -- the schedule --------------------------------------------------------------------------------------------


def run(method, objectives, progress=lambda step: 0.0):
    """t at each step, and after the last."""
    state, seen = method.initial_state(), []
    for step, objective in enumerate(objectives):
        seen.append(state["t"])
        state = method.advance(state, {"objective": objective}, progress(step))
    return [*seen, state["t"]]


def test_t_follows_the_smoothed_fall_of_the_objective():
    """Falls .5 and 0: sigmoid(.5) and sigmoid(0) at momentum 0, sigmoid(.25) and sigmoid(.125) at .5."""
    eager = run(TAID(rate=1.0, momentum=0.0), [2.0, 1.0, 1.0])
    assert eager == pytest.approx([0.4, 0.4, 0.7734755987, 0.8867377994], abs=1e-10)
    smooth = run(TAID(rate=1.0, momentum=0.5), [2.0, 1.0, 1.0])
    assert smooth == pytest.approx([0.4, 0.4, 0.7373059005, 0.8768514685], abs=1e-10)


def test_a_rising_objective_slows_t_and_never_turns_it_back():
    falling, rising = (run(TAID(rate=0.1, momentum=0.0), values) for values in ([4, 2, 1], [1, 2, 4]))
    assert rising[1] < rising[2] < rising[3]
    assert rising[-1] < falling[-1]


def test_without_any_progress_t_still_moves_by_half_the_rate():
    start, first, second, third = run(TAID(), [1.0, 1.0, 1.0])
    assert start == first == 0.4
    assert second == pytest.approx(0.4 + 5e-4 / 2 * 0.6, abs=1e-15)
    assert third == pytest.approx(second + 5e-4 / 2 * (1 - second), abs=1e-15)


def test_t_is_never_behind_the_line_nor_beyond_the_end():
    values = run(TAID(rate=0.0), [1.0] * 5, progress=lambda step: step / 5)
    assert values == pytest.approx([0.4, 0.4, 0.52, 0.64, 0.76, 0.88], abs=1e-14)
    values = run(TAID(end=0.7, rate=1.0), [2.0, 1.0, 0.5, 0.2])
    assert values == pytest.approx([0.4, 0.4, 0.7, 0.7, 0.7], abs=1e-14)


def test_if_it_is_not_adaptive_t_is_the_line():
    log_p, logits = models()
    method = TAID(start=0.2, end=0.8, adaptive=False)
    for progress in (0.0, 0.25, 0.5, 0.999):
        state = method.advance(method.initial_state(), {"objective": 1.0}, progress)
        out = method(log_p=log_p, log_q=logits.log_softmax(-1), state=state, progress=progress)
        close(out.metrics["t"], torch.tensor(0.2 + 0.6 * progress, dtype=torch.float64), 1e-14)


def test_a_collapse_of_the_objective_does_not_overflow():
    state = TAID().initial_state() | {"objective": 1e-12}
    assert TAID().advance(state, {"objective": 1e3}, 0.0)["t"] == pytest.approx(0.4)
    with pytest.raises(FloatingPointError, match="the student excludes"):
        TAID().advance(state, {"objective": math.inf}, 0.0)


def test_numbers_of_others_in_the_state_are_left_alone():
    state = TAID().initial_state() | {"share": 0.3}
    assert TAID().advance(state, {"objective": 1.0, "entropy": 2.0}, 0.0)["share"] == 0.3


# -- the object ----------------------------------------------------------------------------------------------


def test_what_it_cannot_train_is_refused_when_it_is_built():
    for estimator in (FusedLinear(), MonteCarlo()):
        with pytest.raises(TypeError, match=r"write Exact\(\), TopK\(k\)"):
            TAID(estimator=estimator)
    with pytest.raises(TypeError, match=r"write KL\(\)"):
        TAID("KL")
    with pytest.raises(TypeError, match=r"write Offline\(\)"):
        TAID(sampler=Offline)
    for start, end in ((-0.1, 1.0), (0.5, 0.4), (0.4, 1.1), (0.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
            TAID(start=start, end=end)
    for rate, momentum in ((-0.1, 0.9), (1.1, 0.9), (0.1, 1.0), (0.1, -0.1)):
        with pytest.raises(ValueError, match="rate is in"):
            TAID(rate=rate, momentum=momentum)


def test_the_object_is_its_recipe_and_keeps_the_contracts():
    method = TAID(fdiv.JS(0.5), TopK(3), Mix(0.5), start=0.2)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.taid"]) == method
    assert isinstance(method, Method) and isinstance(method, Adaptive)
    assert method.reads == ("state", "progress") and TAID().sampler == Offline()
    assert all(isinstance(value, float) for value in method.initial_state().values())
