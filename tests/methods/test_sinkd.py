"""SinKD: the worked plan, its limits, and what taking the bias off changes."""

import math
from itertools import permutations

import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv import JS, KD, KL, TV, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.distill.sinkd import SinKD, plan

B, C = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1])
Q = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]], dtype=torch.float64).log()
P = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], dtype=torch.float64).log()


def scores(seed: int = 0) -> torch.Tensor:
    return random_rows(B, C, seed)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_the_worked_example():
    close(SinKD().costs(P, Q), torch.tensor([[0.8, 0.8], [1.0, 0.2]], dtype=torch.float64))
    close(SinKD().transport(P, Q), number(1.019352416), 1e-9)


def test_costs_are_the_l1_distances_of_all_pairs_of_rows():
    log_p, log_q = scores(), scores(1)
    close(SinKD().costs(log_p, log_q), torch.cdist(log_q.exp(), log_p.exp(), p=1))


def test_scalings_in_logs_are_those_of_the_kernel():
    cost = SinKD().costs(scores(), scores(1))
    kernel = (-cost / 0.1).exp()
    for _ in range(20):
        kernel = kernel / kernel.sum(1, keepdim=True)
        kernel = kernel / kernel.sum(0, keepdim=True)
    close(plan(cost, 0.1, 20).exp(), kernel, 1e-12)
    close(SinKD().transport(scores(), scores(1)), (kernel * cost).sum(), 1e-12)


def test_the_plan_carries_the_mass_of_the_batch():
    after = plan(SinKD().costs(scores(), scores(1)), 0.1, 20).exp()
    close(after.sum(0), torch.ones(B, dtype=torch.float64))
    close(after.sum(), number(B))
    converged = plan(SinKD().costs(scores(), scores(1)), 0.1, 5000).exp()
    close(converged.sum(1), torch.ones(B, dtype=torch.float64))


def test_a_small_eps_is_the_best_assignment_once_the_iterations_suffice():
    cost = SinKD().costs(scores(), scores(1))
    rows = torch.arange(B)
    best = min(cost[rows, list(order)].sum().item() for order in permutations(range(B)))
    for eps in (0.3, 0.1, 0.02):
        value = SinKD(eps=eps, iterations=3000).transport(scores(), scores(1)).item()
        assert best < value < best + eps * B * math.log(B)  # the entropy is at most B log B
    close(SinKD(eps=0.01, iterations=20_000).transport(P, Q), number(1.0), 1e-3)


def test_twenty_iterations_stop_short_where_eps_is_small():
    """Columns have their mass, rows do not: the value stays above the best assignment's 1.0."""
    assert SinKD(eps=0.01).transport(P, Q) > 1.01
    assert (plan(SinKD().costs(P, Q), 0.01, 20).exp().sum(1) - 1).abs().max() > 0.01


def test_a_row_may_be_carried_to_the_teachers_row_of_another_example():
    """The student has the teacher's rows in another order: transport is for nothing, KL is not."""
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    sharp = SinKD(eps=1e-3, iterations=100)
    assert sharp.transport(scores(), scores()[order]) < 1e-6
    assert KL()(scores(), scores()[order]).mean() > 0.1


def test_the_teacher_itself_is_not_free_unless_the_bias_is_taken_off():
    log_p = (scores() / 4).log_softmax(-1)
    assert SinKD().transport(log_p, log_p) > 0.1
    assert SinKD(debias=True).transport(log_p, log_p).abs() < 1e-13


def test_without_its_bias_the_transport_is_never_negative_at_convergence():
    debiased = SinKD(debias=True, iterations=2000)
    for seed in range(1, 12):
        assert debiased.transport(scores(), scores(seed)) > 1e-3
    near = (scores() + 0.01 * torch.randn(B, C, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    assert debiased.transport(scores(), near) > 0


def test_the_debiased_value_is_the_dual_problems():
    """O = max over f, g of sum f + sum g - eps (sum exp((f + g - W) / eps) / B - B): at convergence."""
    cost, eps = SinKD().costs(scores(), scores(1)), 0.1
    f, g = torch.zeros(B, 1, dtype=torch.float64), torch.zeros(1, B, dtype=torch.float64)
    for _ in range(3000):
        f = eps * (math.log(B) - ((g - cost) / eps).logsumexp(1, keepdim=True))
        g = eps * (math.log(B) - ((f - cost) / eps).logsumexp(0, keepdim=True))
    dual = f.sum() + g.sum() - eps * (((f + g - cost) / eps).exp().sum() / B - B)
    close(SinKD(iterations=3000).value(cost), dual, 1e-10)
    close(SinKD(iterations=None).value(cost), dual, 1e-8)


@pytest.mark.parametrize("debias", [False, True])
def test_without_a_number_of_iterations_it_is_the_fixed_point_and_its_gradient(debias):
    logits = scores(1).requires_grad_()
    values = [
        SinKD(iterations=n, debias=debias).transport(scores(), logits.log_softmax(-1)) for n in (None, 1500)
    ]
    close(values[0], values[1], 1e-7)
    close(gradient(values[0], logits), gradient(values[1], logits), 1e-6)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("divergence", [2 * TV(), JS(0.5)], ids=repr)
def test_the_gradient_runs_through_the_iterations(divergence, debias):
    method = SinKD(divergence, iterations=3, debias=debias, weight=1.0)
    logits = scores(1).requires_grad_()
    given = {"labels": LABELS, "p_logits": scores()}
    assert torch.autograd.gradcheck(lambda x: method(logits=x, **given).loss, (logits,))


@pytest.mark.parametrize("pointwise", [KL(), JS(0.3)], ids=repr)
def test_without_the_transport_it_is_hinton_kd(pointwise):
    logits, p_logits = scores(1).requires_grad_(), scores()
    loss = SinKD(pointwise=pointwise, weight=0.0)(logits=logits, labels=LABELS, p_logits=p_logits).loss
    log_p, log_q = ((t / 2).log_softmax(-1) for t in (p_logits, logits))
    label = -torch.nn.functional.cross_entropy(logits, LABELS, reduction="none")
    kd = KD(pointwise, temperature=2.0, weight=0.8)(log_p=log_p, log_q=log_q, log_q_label=label).loss
    close(loss, kd)
    close(gradient(loss, logits), gradient(kd, logits))


def test_the_transport_is_added_with_the_mass_of_the_batch():
    given = {"logits": scores(1), "labels": LABELS, "p_logits": scores()}
    loss = [SinKD(weight=weight)(**given).loss for weight in (0.0, 0.3)]
    transport = SinKD().transport((scores() / 2).log_softmax(-1), (scores(1) / 2).log_softmax(-1))
    close(loss[1] - loss[0], 0.3 * transport)
    close(SinKD()(**given).metrics["transport"], transport / B)


def test_the_teacher_gets_no_gradient_and_an_empty_batch_has_a_graph():
    logits, p_logits = scores(1).requires_grad_(), scores().requires_grad_()
    SinKD(debias=True)(logits=logits, labels=LABELS, p_logits=p_logits).loss.backward()
    assert p_logits.grad is None
    for debias, iterations in ((False, 20), (True, 20), (True, None)):
        method = SinKD(debias=debias, iterations=iterations)
        empty = method(logits=logits[:0], labels=LABELS[:0], p_logits=p_logits[:0]).loss
        assert empty == 0 and not gradient(empty, logits).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.1, 1e-4])
def test_logits_of_ten_thousand_excluded_classes_and_a_small_eps_stay_finite(dtype, eps):
    """exp(-2 / 1e-4) is 0 in every precision: the kernel itself could not be scaled."""
    p = torch.tensor([[1e4, 0.0, -1e4], [-math.inf, 1.0, 0.0], [0.0, -1e4, 1e4]], dtype=dtype)
    q = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 1.0, 0.0], [1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    for debias in (False, True):
        loss = SinKD(eps=eps, debias=debias)(logits=q, labels=torch.tensor([0, 1, 2]), p_logits=p).loss
        assert loss.isfinite() and gradient(loss, q).isfinite().all()


def test_an_infinite_cost_is_refused_with_what_to_write_instead():
    p = scores()
    p[0, 0] = -math.inf
    with pytest.raises(ValueError, match=r"ReverseKL\(\) is infinite.*JS"):
        SinKD(ReverseKL())(logits=scores(1), labels=LABELS, p_logits=p)
    with pytest.raises(ValueError, match=r"ReverseKL\(\) is infinite at 1 of 6 rows"):
        SinKD(pointwise=ReverseKL())(logits=scores(1), labels=LABELS, p_logits=p)


def test_wrong_settings_are_refused_with_what_to_write_instead():
    for setting, says in (
        ({"kd": 1.5}, "share beside the labels"),
        ({"weight": -1.0}, "weight >= 0"),
        ({"temperature": 0.0}, "temperature divides"),
        ({"eps": 0.0}, "spread of the plan"),
        ({"iterations": 0}, ">= 1"),
        ({"iterations": 2.5}, "whole number.*None"),
    ):
        with pytest.raises(ValueError, match=says):
            SinKD(**setting)
    for name in ("divergence", "pointwise"):
        with pytest.raises(TypeError, match="f-divergence"):
            SinKD(**{name: fdiv.Renyi(2.0)})


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = SinKD(JS(0.5), kd=0.5, debias=True)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.sinkd"]) == method
    assert fdiv.parse(repr(SinKD()), ["fdiv.methods.distill.sinkd"]) == SinKD()
    assert isinstance(method, Method) and method.unit == "batch" and method.consumes == "examples"
