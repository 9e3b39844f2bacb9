"""Two networks that teach each other: whose gradient is whose, and which divergence is weighted up."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows
from torch.nn.functional import cross_entropy

import fdiv
from fdiv import BDKD, JS, KD, KL, Jeffreys, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.distill.bdkd import surplus_certainty
from fdiv.methods.distill.mutual import MutualKD

B, C = 8, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1, 0, 2])
FLAT = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
SHARP = torch.tensor([[0.05, 0.05, 0.1, 0.8]], dtype=torch.float64).log()


def pair() -> dict:
    """Logits of a teacher and a student, both with gradient, and the labels."""
    teacher, student = (random_rows(B, C, seed).requires_grad_() for seed in (0, 1))
    return {"logits": student, "labels": LABELS, "p_logits": teacher}


def test_the_students_loss_does_not_reach_the_teacher_nor_the_teachers_the_student():
    given = pair()
    online, offline = (MutualKD(online=online)(**given).loss for online in (True, False))
    close(gradient(online, given["logits"]), gradient(offline, given["logits"]), 1e-13)
    alone = online - offline  # the teacher's terms
    assert gradient(alone, given["logits"]).abs().max() < 1e-15
    offline.backward()
    assert given["p_logits"].grad is None


def test_each_networks_gradient_is_that_of_its_own_loss_with_the_other_fixed():
    given = pair()
    loss = MutualKD(weight=3.0, share=0.7)(**given).loss
    log_p, log_q = (given[name].log_softmax(-1) for name in ("p_logits", "logits"))
    fixed_p, fixed_q = log_p.detach(), log_q.detach()
    surer = surplus_certainty(log_p, log_q) > 0
    assert surer.any() and not surer.all()
    covering, sharpening = torch.where(surer, 3.0, 1.0), torch.where(surer, 1.0, 3.0)
    of_student = covering * KL()(fixed_p, log_q) + sharpening * ReverseKL()(fixed_p, log_q)
    students = cross_entropy(given["logits"], LABELS) + 0.7 * of_student.mean()
    teachers = cross_entropy(given["p_logits"], LABELS) + 0.7 * KL()(fixed_q, log_p).mean()
    close(loss, students + teachers)
    close(gradient(loss, given["logits"]), gradient(students, given["logits"]), 1e-12)
    close(gradient(loss, given["p_logits"]), gradient(teachers, given["p_logits"]), 1e-12)


@pytest.mark.parametrize("weight", [1.0, 2.0, 3.0])
def test_a_student_that_is_too_sure_is_spread_and_one_that_is_not_is_sharpened(weight):
    method, labels = MutualKD(weight=weight, online=False), torch.tensor([0])
    spread = method(logits=SHARP, labels=labels, p_logits=FLAT)
    close(spread.loss, -SHARP[0, 0] + (weight * KL()(FLAT, SHARP) + KL()(SHARP, FLAT)).squeeze())
    sharpen = method(logits=FLAT, labels=labels, p_logits=SHARP)
    close(sharpen.loss, -FLAT[0, 0] + (KL()(SHARP, FLAT) + weight * KL()(FLAT, SHARP)).squeeze())
    assert spread.metrics["student_surer"] == 1 and sharpen.metrics["student_surer"] == 0


def test_equal_entropies_leave_the_plain_sum():
    log_p = random_rows(B, C)
    log_q = log_p[:, torch.randperm(C, generator=torch.Generator().manual_seed(0))]
    loss = MutualKD(weight=3.0, online=False)(logits=log_q, labels=LABELS, p_logits=log_p).loss
    close(loss, cross_entropy(log_q, LABELS) + Jeffreys()(log_p, log_q).mean())


def test_the_teachers_term_of_a_fixed_teacher_is_bdkd_on_the_same_rows():
    given = pair()
    log_p, log_q = (given[name].log_softmax(-1) for name in ("p_logits", "logits"))
    for divergence in (KL(), JS(0.3)):
        method = MutualKD(divergence, divergence.reverse, weight=3.0, online=False)
        loss = method(**given).loss - cross_entropy(given["logits"], LABELS)
        close(loss, BDKD(divergence)(log_p=log_p, log_q=log_q).loss)


def test_without_sharpening_a_fixed_teacher_is_hinton_kd():
    given = pair()
    method = MutualKD(sharpening=None, weight=1.0, share=0.5, temperature=3.0, online=False)
    log_p, log_q = ((given[name] / 3).log_softmax(-1) for name in ("p_logits", "logits"))
    label = -cross_entropy(given["logits"], LABELS, reduction="none")
    kd = KD(temperature=3.0, weight=1 / 3)(log_p=log_p, log_q=log_q, log_q_label=label).loss
    close(method(**given).loss, 1.5 * kd)


@each_divergence
def test_deep_mutual_learning_is_the_same_for_both(divergence):
    """Exchanging the networks exchanges their gradients."""
    given, method = pair(), MutualKD.dml(divergence)
    swapped = {"logits": given["p_logits"], "labels": LABELS, "p_logits": given["logits"]}
    one, other = method(**given).loss, method(**swapped).loss
    close(one, other, 1e-12)
    for name in ("logits", "p_logits"):
        close(gradient(one, given[name]), gradient(other, given[name]), 1e-9)


def test_deep_mutual_learning_is_cross_entropy_and_kl_from_the_other():
    given = pair()
    log_p, log_q = (given[name].log_softmax(-1) for name in ("p_logits", "logits"))
    expected = cross_entropy(log_p, LABELS) + cross_entropy(log_q, LABELS)
    expected = expected + (KL()(log_p, log_q) + KL()(log_q, log_p)).mean()
    close(MutualKD.dml()(**given).loss, expected)
    student = gradient(MutualKD.dml()(**given).loss, given["logits"]).view(B, C)
    one_hot = torch.nn.functional.one_hot(LABELS, C)
    close(student, (2 * log_q.exp() - log_p.exp() - one_hot).detach() / B, 1e-12)


def test_networks_that_agree_learn_from_the_labels_alone():
    same = random_rows(B, C)
    teacher, student = same.clone().requires_grad_(), same.clone().requires_grad_()
    loss = MutualKD()(logits=student, labels=LABELS, p_logits=teacher).loss
    for logits in (teacher, student):
        close(gradient(loss, logits), gradient(cross_entropy(logits, LABELS), logits), 1e-12)


def test_whether_the_teacher_is_trained_is_said_to_the_trainer():
    assert MutualKD().teaches == "both" and MutualKD.dml().teaches == "both"
    assert MutualKD(online=False).teaches == "student"


def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph():
    given = pair()
    whole, weights = MutualKD()(**given).loss, (given["logits"], given["p_logits"])
    losses = [
        MutualKD()(**{name: value[cut] for name, value in given.items()}, count=float(B)).loss
        for cut in (slice(0, 1), slice(1, 8), slice(8, 8))
    ]
    close(sum(losses), whole, 1e-13)
    close(gradient(sum(losses), *weights), gradient(whole, *weights), 1e-12)
    assert losses[2] == 0 and not gradient(losses[2], *weights).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_stay_finite(dtype):
    teacher = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    student = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 1.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = MutualKD()(logits=student, labels=torch.tensor([1, 2]), p_logits=teacher).loss
    assert loss.isfinite() and gradient(loss, teacher, student).isfinite().all()


def test_a_teacher_that_excludes_a_class_is_refused_where_the_divergence_is_infinite():
    p = random_rows(B, C)
    p[0, 3] = -math.inf
    logits = random_rows(B, C, 1).requires_grad_()
    given = {"logits": logits, "labels": LABELS, "p_logits": p}
    with pytest.raises(ValueError, match=r"ReverseKL\(\) is infinite at 1 of 8 rows.*JS"):
        MutualKD()(**given)
    loss = MutualKD(sharpening=JS(0.5), online=False)(**given).loss
    assert loss.isfinite() and gradient(loss, logits).isfinite().all()


def test_wrong_settings_are_refused_with_what_to_write_instead():
    for setting, says in (
        ({"weight": 0.5}, "factor >= 1"),
        ({"weight": math.inf}, "factor >= 1"),
        ({"share": -1.0}, "weight >= 0"),
        ({"temperature": 0.0}, "temperature divides"),
        ({"sharpening": None}, "write weight=1.0"),
    ):
        with pytest.raises(ValueError, match=says):
            MutualKD(**setting)
    for name in ("divergence", "sharpening", "of_teacher"):
        with pytest.raises(TypeError, match="f-divergence"):
            MutualKD(**{name: fdiv.Renyi(2.0)})


def test_the_object_is_its_recipe_and_keeps_the_contract():
    for method in (MutualKD(JS(0.3), share=0.5), MutualKD.dml(KL(), temperature=2.0)):
        assert fdiv.parse(repr(method), ["fdiv.methods.distill.mutual"]) == method
        assert isinstance(method, Method) and method.consumes == "examples"
