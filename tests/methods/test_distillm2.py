"""DistiLLM-2: each kind of answer under its own skewed KL, each answer with its own skew."""

import math

import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv import KL, Both, Offline, SkewKL, SkewReverseKL
from fdiv.methods._method import Adaptive, Method
from fdiv.methods.distill.distillm2 import DistiLLM2, RowwiseSkewKL

VOCAB = 7
SEQUENCE = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
BY_STUDENT = torch.tensor([False, True, False, True])[SEQUENCE]
LABELS = torch.tensor([2, 0, 6, 6, 1, 3, 3, 5])
P, Q = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.6, 0.3, 0.1], [0.2, 0.3, 0.5]))
PLAIN = DistiLLM2(curriculum="none", growth=0.0)
# As after the reference steps, in which the gap was .05 in the answers of either.
LATER = {"teacher_gap": 0.05, "student_gap": 0.05, "gap_steps": 100.0}


def models():
    """log_p, and the student's logits, [rows, vocab]."""
    return random_rows(8, VOCAB, 0), random_rows(8, VOCAB, 1).requires_grad_()


def evidence(log_p, logits, rows=slice(None), state=LATER, progress=0.0):
    log_q = logits.log_softmax(-1)
    label = LABELS.unsqueeze(-1)
    return {
        "log_p": log_p[rows],
        "log_q": log_q[rows],
        "by_student": BY_STUDENT[rows],
        "sequence": SEQUENCE[rows],
        "log_p_label": log_p.gather(-1, label).squeeze(-1)[rows],
        "log_q_label": log_q.gather(-1, label).squeeze(-1)[rows],
        "state": state,
        "progress": progress,
    }


def one_answer(p, q, by_student, state=LATER):
    """An answer of one token, of probability p under the teacher and q under the student."""
    return {
        "log_p_label": torch.tensor([p], dtype=torch.float64).log(),
        "log_q_label": torch.tensor([q], dtype=torch.float64).log(),
        "log_p": P,
        "log_q": Q,
        "by_student": torch.tensor([by_student]),
        "sequence": torch.tensor([0]),
        "state": state,
        "progress": 0.0,
    }


# -- the loss ------------------------------------------------------------------------------------------------


def by_hand(log_p, logits, skews, weights=(1.0, 1.0)):
    """A loop over the four answers: the mean over tokens first, then over answers."""
    log_q, means = logits.log_softmax(-1), []
    for number, skew in enumerate(skews):
        rows = number == SEQUENCE
        divergence = SkewReverseKL(skew) if number % 2 else SkewKL(skew)
        means.append(weights[number % 2] * divergence(log_p[rows], log_q[rows]).mean())
    return torch.stack(means).mean()


def test_with_one_skew_it_is_the_mean_of_both_divergences_on_their_answers():
    log_p, logits = models()
    loss = PLAIN(**evidence(log_p, logits)).loss
    expected = by_hand(log_p, logits, [0.1] * 4)
    close(loss, expected, 1e-13)
    close(gradient(loss, logits), gradient(expected, logits), 1e-12)


def test_the_worked_example():
    both = {
        name: torch.cat([one_answer(0.6, 0.2, False)[name], one_answer(0.1, 0.5, True)[name]])
        for name in ("log_p", "log_q", "by_student", "log_p_label", "log_q_label")
    }
    loss = PLAIN(**both, sequence=torch.tensor([0, 1]), state=LATER, progress=0.0).loss
    close(loss, torch.tensor((0.397168809 + 0.430558954) / 2, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize(("progress", "b"), [(0.0, 1.0), (0.3, 1.3), (0.5, 1.5), (0.9, 1.5)])
def test_the_students_answers_weigh_more_until_half_of_training(progress, b):
    log_p, logits = models()
    loss = DistiLLM2(curriculum="none")(**evidence(log_p, logits, progress=progress)).loss
    close(loss, by_hand(log_p, logits, [0.1] * 4, weights=(2 - b, b)), 1e-13)


def test_a_weighted_divergence_weighs_the_loss():
    log_p, logits = models()
    loss = DistiLLM2(3.0 * SkewKL(0.1), curriculum="none", growth=0.0)(**evidence(log_p, logits)).loss
    close(loss, 3 * by_hand(log_p, logits, [0.1] * 4), 1e-13)


def closed_gradient(log_p, logits, detached):
    """q (c - sum q c) with c the slope of each row, over the length of its answer and the four answers."""
    p, q = log_p.exp(), logits.softmax(-1)
    skl = -0.9 * p / (0.1 * p + 0.9 * q)
    mixture = 0.1 * q + 0.9 * p
    srkl = (q / mixture).log() - (0.0 if detached else 0.1) * q / mixture
    slope = torch.where(BY_STUDENT.unsqueeze(-1), srkl, skl)
    rows = q * (slope - (q * slope).sum(-1, keepdim=True))
    return (rows / (4 * SEQUENCE.bincount()[SEQUENCE]).unsqueeze(-1)).detach().flatten()


@pytest.mark.parametrize("detached", [False, True])
def test_the_gradient_is_the_closed_one_with_and_without_the_mixtures_part(detached):
    log_p, logits = models()
    method = DistiLLM2(curriculum="none", growth=0.0, detach_mixture=detached)
    loss = method(**evidence(log_p, logits)).loss
    close(loss.detach(), PLAIN(**evidence(log_p, logits)).loss.detach(), 1e-14)
    close(gradient(loss, logits), closed_gradient(log_p, logits, detached), 1e-12)


def test_a_skew_for_each_row_is_the_divergence_with_that_skew_row_by_row():
    log_p, logits = random_rows(8, VOCAB, 3), random_rows(8, VOCAB, 4).requires_grad_()
    log_p[2, :3], log_p[5] = -torch.inf, logits[5].detach().log_softmax(-1)  # empty cells; p = q
    log_p = log_p.log_softmax(-1)
    log_q = torch.cat([logits[:, :-1], torch.full((8, 1), -torch.inf)], -1).log_softmax(-1)
    skews = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.02], dtype=torch.float64)
    rowwise = RowwiseSkewKL(skews.unsqueeze(-1), detach=False)
    for one, arguments in ((SkewKL, (log_p, log_q)), (SkewReverseKL, (log_q, log_p))):
        value = rowwise(*arguments)
        expected = torch.stack([one(a)(log_p[i], log_q[i]) for i, a in enumerate(skews.tolist())])
        close(value, expected, 1e-13)
        close(gradient(value.sum(), logits), gradient(expected.sum(), logits), 1e-12)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    log_p, _ = models()
    logits = log_p.clone().requires_grad_()
    for detached in (False, True):
        tensors = evidence(log_p, logits) | {"log_p": logits.log_softmax(-1).detach()}
        loss = DistiLLM2(detach_mixture=detached)(**tensors).loss
        assert loss < 1e-28 and gradient(loss, logits).abs().max() < 1e-15


# -- the curriculum ------------------------------------------------------------------------------------------


def skew_of(method, gap, by_student):
    """The skew of an answer that its writer finds likelier by `gap`."""
    pair = (0.3, 0.3 + gap) if by_student else (0.3 + gap, 0.3)
    return method(**one_answer(*pair, by_student)).metrics["skew"].item()


@pytest.mark.parametrize("by_student", [False, True])
@pytest.mark.parametrize(
    ("gap", "skew"), [(0.2, 0.1), (0.05, 0.1), (0.01, 0.01), (-0.1, 0.1), (0.046, 1 - 0.045 / 0.04601)]
)
def test_the_codes_skew_only_falls(gap, skew, by_student):
    assert skew_of(DistiLLM2(), gap, by_student) == pytest.approx(skew, abs=1e-12)


@pytest.mark.parametrize("by_student", [False, True])
def test_the_papers_skew_keeps_one_minus_skew_times_the_gap(by_student):
    method = DistiLLM2(curriculum="paper")
    for gap in (0.046, 0.05, 0.1, 0.2, 0.6):
        assert (1 - skew_of(method, gap, by_student)) * gap == pytest.approx(0.9 * 0.05, abs=1e-12)
    assert skew_of(method, 0.03, by_student) == 0.01  # the formula is negative
    assert skew_of(method, -0.1, by_student) == 0.1  # no skew gives the product
    assert skew_of(method, 0.0, by_student) == 0.1


def test_the_likelihood_of_an_answer_is_the_geometric_mean_of_its_tokens():
    log_p, logits = models()
    tensors = evidence(log_p, logits)
    metrics = DistiLLM2()(**tensors).metrics
    p = [tensors["log_p_label"][number == SEQUENCE].mean().exp() for number in range(4)]
    q = [tensors["log_q_label"][number == SEQUENCE].mean().exp() for number in range(4)]
    close(metrics["teacher_gap"], (p[0] - q[0] + p[2] - q[2]).detach() / 2, 1e-13)
    close(metrics["student_gap"], (q[1] - p[1] + q[3] - p[3]).detach() / 2, 1e-13)


@pytest.mark.parametrize("curriculum", ["code", "paper"])
def test_every_answer_has_its_own_skew_and_no_gradient_through_it(curriculum):
    log_p, logits = models()
    tensors = evidence(log_p, logits)
    gaps = []
    for number in range(4):
        rows = number == SEQUENCE
        p, q = (tensors[f"log_{who}_label"][rows].mean().exp().item() for who in "pq")
        gaps.append(q - p if number % 2 else p - q)
    # Reference gaps at which the first answer of each kind is inside the range.
    state = {"teacher_gap": 1.05 * gaps[0], "student_gap": 1.05 * gaps[1], "gap_steps": 100.0}
    tensors["state"] = state
    skews = []
    for number, gap in enumerate(gaps):
        reference = state["student_gap" if number % 2 else "teacher_gap"]
        if curriculum == "code":
            skews.append(min(max(1 - 0.9 * reference / (gap + 1e-5), 0.01), 0.1))
        else:
            skews.append(min(max(1 - 0.9 * reference / gap, 0.01), 0.99) if gap * reference > 0 else 0.1)
    assert len(set(skews)) > 2
    loss = DistiLLM2(curriculum=curriculum, growth=0.0)(**tensors).loss
    expected = by_hand(log_p, logits, skews)
    close(loss, expected, 1e-13)
    close(gradient(loss, logits), gradient(expected, logits), 1e-12)


def test_the_reference_gaps_are_the_means_over_the_first_steps():
    method = DistiLLM2(reference_steps=3)
    state = method.initial_state()
    for step, gap in enumerate((0.1, 0.2, 0.6, 5.0, 7.0)):
        early = method(**one_answer(0.31, 0.3, False, state)).metrics["skew"].item()
        assert early == pytest.approx(0.1 if step < 3 else 0.01)
        state = method.advance(state, {"teacher_gap": gap, "student_gap": 2 * gap}, step / 5)
    assert state == pytest.approx({"teacher_gap": 0.3, "student_gap": 0.6, "gap_steps": 3.0})


# -- the batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curriculum", ["code", "paper", "none"])
def test_loss_and_metrics_do_not_depend_on_the_split_into_micro_batches(curriculum):
    log_p, logits = models()
    method = DistiLLM2(curriculum=curriculum)
    whole = method(**evidence(log_p, logits, progress=0.3))
    parts = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, 8)):
        tensors = evidence(log_p, logits, rows, progress=0.3)
        tensors["sequence"] = tensors["sequence"] - tensors["sequence"][0]
        parts.append(method(**tensors, sequences=4, count=8))
    loss = sum(part.loss for part in parts)
    close(loss, whole.loss, 1e-13)
    close(gradient(loss, logits), gradient(whole.loss, logits), 1e-12)
    for name, number in whole.metrics.items():
        mean = sum(tokens * part.metrics[name] for tokens, part in zip((5, 1, 2), parts, strict=True)) / 8
        close(mean, number, 1e-13)


def test_an_answer_without_tokens_leaves_the_others_as_they_are():
    log_p, logits = models()
    tensors = evidence(log_p, logits)
    expected = DistiLLM2()(**tensors)
    tensors["sequence"] = tensors["sequence"] + (SEQUENCE >= 2).long()  # number 2 has no rows
    out = DistiLLM2()(**tensors)
    assert out.loss == expected.loss and out.metrics == expected.metrics


def test_no_row_at_all_has_loss_zero_and_a_graph():
    log_p, logits = models()
    out = DistiLLM2()(**evidence(log_p, logits, slice(0, 0)))
    assert out.loss == 0 and not gradient(out.loss, logits).any()
    assert not any(DistiLLM2()(**evidence(log_p, logits, slice(0, 0)), sequences=4, count=8).metrics.values())


# -- the object ----------------------------------------------------------------------------------------------


def test_what_it_cannot_train_is_refused_when_it_is_built():
    for divergence in (KL(), SkewReverseKL(0.1), "SkewKL", SkewKL(0.1) + SkewKL(0.2)):
        with pytest.raises(TypeError, match=r"write SkewKL\(0\.1\)"):
            DistiLLM2(divergence)
    with pytest.raises(TypeError, match=r"write Both\(\)"):
        DistiLLM2(sampler=Offline())
    with pytest.raises(ValueError, match="'code', 'paper' or 'none'"):
        DistiLLM2(curriculum="codes")
    with pytest.raises(ValueError, match="keeps a skew in"):
        DistiLLM2(SkewKL(0.001))
    DistiLLM2(SkewKL(0.001), curriculum="none")
    with pytest.raises(ValueError, match="reference_steps"):
        DistiLLM2(reference_steps=0)
    for beta, growth in ((-0.1, 0.5), (1.0, 1.1), (1.0, -0.1), (2.1, 0.0), (math.nan, 0.0)):
        with pytest.raises(ValueError, match="2 - b and b"):
            DistiLLM2(beta=beta, growth=growth)


def test_the_object_is_its_recipe_and_keeps_the_contracts():
    method = DistiLLM2(SkewKL(0.2), curriculum="paper", beta=0.5, detach_mixture=True)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.distillm2"]) == method
    assert isinstance(method, Method) and isinstance(method, Adaptive)
    assert DistiLLM2().sampler == Both() and DistiLLM2().estimator == fdiv.Exact()
    assert set(method.reads) >= {
        "by_student",
        "sequence",
        "sequences",
        "log_p_label",
        "log_q_label",
        "progress",
    }
