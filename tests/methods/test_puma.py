"""Math-PUMA: aligned up to shift and scale, with the direction of each KL named right."""

import pytest
import torch
from tests.worlds import close, each_divergence, gradient

import fdiv
from fdiv import GKD, JS, KL, Jeffreys, Offline, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.distill.puma import EPSILON, MathPUMA, standardised

ROWS, VOCAB = 5, 7
MASK = torch.tensor([True, False, True, True, False])
LABELS = torch.tensor([0, 3, 6, 2, 2])


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) + 0.5


def evidence(teacher, student):
    log_q = student.log_softmax(-1)
    label = log_q.gather(-1, LABELS[:, None]).squeeze(-1)
    return {"log_p": teacher.log_softmax(-1), "log_q": log_q, "log_q_label": label}


@each_divergence
def test_the_loss_is_that_of_standardised_logits_beside_the_likelihood(divergence):
    teacher, student = logits(0), logits(1).requires_grad_()
    given = evidence(teacher, student)
    out = MathPUMA(divergence, weight=0.3, tau=2.0)(**given)
    p, q = (
        ((z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + EPSILON) / 2).log_softmax(-1)
        for z in (teacher, student)
    )
    expected = 0.3 * 4 * divergence(p, q).mean() - 0.7 * given["log_q_label"].mean()
    close(out.loss, expected, 1e-12)
    close(gradient(out.loss, student), gradient(expected, student), 1e-11)
    close(out.metrics["nll"], -given["log_q_label"].detach().mean(), 1e-14)


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_scaling_or_shifting_either_branch_changes_nothing(branch):
    """Up to the 1e-6 beside the standard deviation."""
    models = {"teacher": logits(0), "student": logits(1)}
    method = MathPUMA(weight=1.0)
    before = method(**evidence(**models)).loss
    models[branch] = 3.7 * models[branch] - torch.arange(ROWS).double()[:, None]
    close(method(**evidence(**models)).loss, before, 1e-5)
    models[branch] = models[branch].flip(-1)
    assert (method(**evidence(**models)).loss - before).abs() > 0.1 * before


def test_a_surer_teacher_of_the_same_pattern_teaches_nothing_where_gkd_would():
    student = logits(0).requires_grad_()
    given = evidence(3 * student.detach(), student)
    assert MathPUMA(weight=1.0)(**given).loss < 1e-10
    assert GKD()(log_p=given["log_p"], log_q=given["log_q"]).loss > 0.1


def test_the_papers_alpha_weighs_the_kl_from_student_to_teacher():
    """Its code's fkl is F.kl_div(log p, q) = KL(q, p)."""
    given, alpha = evidence(logits(0), logits(1)), 0.2
    p, q = (standardised(given[name]).log_softmax(-1) for name in ("log_p", "log_q"))
    fkl = torch.nn.functional.kl_div(p, q.exp(), reduction="sum") / ROWS
    rkl = torch.nn.functional.kl_div(q, p.exp(), reduction="sum") / ROWS
    out = MathPUMA(alpha * ReverseKL() + (1 - alpha) * KL(), weight=1.0)(**given)
    close(out.loss, alpha * fkl + (1 - alpha) * rkl, 1e-12)
    assert (fkl - rkl).abs() > 1e-3


def test_by_default_both_directions_count_the_same():
    given = evidence(logits(0), logits(1))
    halves = 0.5 * KL() + 0.5 * ReverseKL()
    close(MathPUMA()(**given).loss, MathPUMA(halves)(**given).loss, 1e-14)
    assert MathPUMA().divergence == 0.5 * Jeffreys()


def test_the_gradient_runs_through_mean_and_standard_deviation():
    assert torch.autograd.gradcheck(standardised, logits(0).requires_grad_())
    teacher = logits(0).log_softmax(-1)

    def loss(student):
        log_q = student.log_softmax(-1)
        return MathPUMA()(log_p=teacher, log_q=log_q, log_q_label=log_q[:, 0]).loss

    assert torch.autograd.gradcheck(loss, logits(1).requires_grad_())


def test_the_alignment_pulls_neither_along_the_logits_nor_along_a_constant():
    """Where the loss does not change its gradient has no part (the first up to the 1e-6)."""
    student = logits(1).requires_grad_()
    slope = torch.autograd.grad(MathPUMA(weight=1.0)(**evidence(logits(0), student)).loss, student)[0]
    centred = student.detach() - student.detach().mean(-1, keepdim=True)
    assert slope.sum(-1).abs().max() < 1e-14
    assert (slope * centred).sum(-1).abs().max() < 1e-5 * (slope.norm() * centred.norm())


def test_the_teacher_gets_no_gradient():
    teacher, student = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss = MathPUMA()(**evidence(teacher, student)).loss
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(loss, teacher)


def test_at_weight_0_it_is_maximum_likelihood():
    given = evidence(logits(0), logits(1))
    close(MathPUMA(weight=0.0)(**given).loss, -given["log_q_label"].mean(), 1e-14)


@pytest.mark.parametrize("rubbish", [torch.inf, -torch.inf, torch.nan])
def test_masked_rows_do_no_harm_and_count_is_that_of_the_global_batch(rubbish):
    given = {name: t.detach() for name, t in evidence(logits(0), logits(1)).items()}
    alone = MathPUMA()(**{name: t[MASK] for name, t in given.items()}).loss
    for tensor in given.values():
        tensor[~MASK] = rubbish
    given["log_q"].requires_grad_()
    out = MathPUMA()(**given, mask=MASK, count=6)
    close(out.loss, alone * 3 / 6, 1e-14)
    slope = torch.autograd.grad(out.loss, given["log_q"])[0]
    assert slope.isfinite().all() and not slope[~MASK].any()


def test_a_vocabulary_in_part_forbidden_is_standardised_over_the_rest():
    z = logits(0)
    forbidden = torch.cat([z, torch.full((ROWS, 2), -torch.inf)], -1).requires_grad_()
    close(standardised(forbidden)[:, :VOCAB], standardised(z), 1e-14)
    assert (standardised(forbidden)[:, VOCAB:] == -torch.inf).all()
    log_q = forbidden.log_softmax(-1)
    out = MathPUMA()(log_p=log_q.detach().flip(0), log_q=log_q, log_q_label=log_q[:, 0])
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, forbidden)[0].isfinite().all()


def test_a_row_of_equal_logits_is_uniform_and_has_a_finite_gradient():
    student = torch.zeros(ROWS, VOCAB, dtype=torch.float64, requires_grad=True)
    out = MathPUMA()(**evidence(logits(0), student))
    assert out.loss.isfinite() and torch.autograd.grad(out.loss, student)[0].isfinite().all()
    close(standardised(torch.ones(1, 4).double()), torch.zeros(1, 4).double(), 1e-14)


def test_in_float32_it_is_the_same_to_five_digits():
    wide, narrow = (
        {name: t.to(dtype) for name, t in evidence(logits(0), logits(1)).items()}
        for dtype in (torch.float64, torch.float32)
    )
    close(MathPUMA()(**narrow).loss.double(), MathPUMA()(**wide).loss, 1e-5)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="share"):
        MathPUMA(weight=1.5)
    with pytest.raises(ValueError, match="tau"):
        MathPUMA(tau=0.0)
    with pytest.raises(ValueError, match="ema"):
        MathPUMA(ema=2.0)
    with pytest.raises(TypeError, match=r"write KL\(\)"):
        MathPUMA("KL")
    given = evidence(logits(0), logits(1))
    with pytest.raises(ValueError, match="differ in shape"):
        MathPUMA()(**given, mask=MASK[:3])


def test_the_teacher_is_shown_more_and_the_object_is_its_recipe():
    assert MathPUMA().context == "privileged" and MathPUMA().ema == 1.0
    assert MathPUMA().reads == ("log_q_label",) and MathPUMA().sampler == Offline()
    method = MathPUMA(JS(0.3), weight=0.2, tau=1.5, ema=0.0)
    assert fdiv.parse(repr(method)) == method
    assert fdiv.parse(repr(MathPUMA())) == MathPUMA()
    assert hash(method) == hash(fdiv.parse(repr(method)))
    assert isinstance(method, Method)
