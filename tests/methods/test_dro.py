"""DRO and CVaR as losses over a batch, and what a batch does to them."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from tests.worlds import close

from fdiv import JS, KL, TV, Alpha, Pearson, Renyi
from fdiv.methods._method import Adaptive, Method
from fdiv.methods.robust.dro import DRO, CVaR
from fdiv.operators.dro import constrained, cvar, penalised

CLASSES = 3


def batch(rows=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, CLASSES, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), torch.randint(0, CLASSES, (rows,), generator=generator)


def losses_of(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def gradient(out, logits):
    return torch.autograd.grad(out.loss, logits, retain_graph=True)[0]


METHODS = [
    (DRO(lam=0.7), lambda x: penalised(x, KL(), 0.7)),
    (DRO(Pearson(), lam=2.0), lambda x: penalised(x, Pearson(), 2.0)),
    (DRO(rho=0.2), lambda x: constrained(x, KL(), 0.2)),
    (DRO(JS(0.5), rho=0.05), lambda x: constrained(x, JS(0.5), 0.05)),
    (DRO(Alpha(3.0), rho=0.2), lambda x: constrained(x, Alpha(3.0), 0.2)),
    (DRO(TV(), rho=0.25), lambda x: constrained(x, TV(), 0.25)),
    (CVaR(0.3), lambda x: cvar(x, 0.3)),
]


@pytest.mark.parametrize(("method", "robust"), METHODS, ids=lambda v: str(getattr(v, "__name__", v))[:40])
def test_the_loss_is_the_worst_mean_and_its_gradient_that_of_the_weighted_losses(method, robust):
    logits, labels = batch()
    found = robust(losses_of(logits, labels).detach())
    out = method(logits=logits, labels=labels, count=8)
    close(out.loss.detach(), found.value)
    (weighted,) = torch.autograd.grad((found.weights * losses_of(logits, labels)).sum(), logits)
    close(gradient(out, logits), weighted)
    effective = 1 / (found.weights.square().sum() * 8)
    close(out.metrics["effective"], effective)
    close(out.metrics["nll"], losses_of(logits, labels).mean().detach())


def test_without_a_radius_and_at_a_high_price_it_is_cross_entropy():
    logits, labels = batch()
    mean = losses_of(logits, labels).mean()
    close(DRO(rho=0.0)(logits=logits, labels=labels).loss, mean)
    close(CVaR(1.0)(logits=logits, labels=labels).loss, mean)
    assert abs(DRO(lam=1e6)(logits=logits, labels=labels).loss - mean) < 1e-5


def test_at_a_low_price_and_in_a_large_ball_only_the_worst_example_counts():
    logits, labels = batch()
    worst = losses_of(logits, labels).max()
    for method in (DRO(rho=100.0), DRO(TV(), rho=1.0), CVaR(0.01)):
        out = method(logits=logits, labels=labels)
        close(out.loss, worst)
        assert (gradient(out, logits).abs().sum(-1) > 0).sum() == 1


# -- what a batch does ---------------------------------------------------------------------------------


def over_batches(method, logits, labels, size, state=None):
    """The mean over all batches of this size of (loss, gradient in the logits of all examples)."""
    losses, gradients = [], []
    for some in combinations(range(len(labels)), size):
        rows = list(some)
        given = {} if state is None else {"state": state}
        out = method(logits=logits[rows], labels=labels[rows], **given)
        losses.append(out.loss.detach())
        gradients.append(gradient(out, logits))
    return torch.stack(losses).mean(), torch.stack(gradients).mean(0)


@pytest.mark.parametrize(("method", "robust"), METHODS, ids=lambda v: str(getattr(v, "__name__", v))[:40])
def test_batches_underestimate_the_robust_loss_the_less_the_larger_they_are(method, robust):
    losses = losses_of(*batch()).detach()
    means = [
        robust(torch.stack([losses[list(some)] for some in combinations(range(8), size)])).value.mean()
        for size in (1, 2, 5, 8)
    ]
    close(means[0], losses.mean())
    assert means[0] < means[1] < means[2] < means[3]
    close(means[3], method(logits=batch()[0], labels=batch()[1]).loss)


def relative(estimate, exact):
    return ((estimate - exact).norm() / exact.norm()).item()


def test_the_running_estimate_takes_the_bias_of_batches_away():
    """By all 28 batches of 2 of 8, at a state that has seen E exp(loss/lam): of order rate is left."""
    logits, labels = batch()
    lam = 0.4
    log_moment = (losses_of(logits, labels) / lam).logsumexp(0).item() - math.log(8)
    state = {"log_moment": log_moment, "steps": 1e9}
    exact = gradient(DRO(lam=lam)(logits=logits, labels=labels), logits)
    naive = relative(over_batches(DRO(lam=lam), logits, labels, 2)[1], exact)
    assert naive > 0.2
    left = {
        rate: relative(over_batches(DRO(lam=lam, rate=rate), logits, labels, 2, state)[1], exact)
        for rate in (0.1, 0.01, 0.001)
    }
    assert left[0.1] < naive / 3
    assert left[0.01] == pytest.approx(10 * left[0.001], rel=0.1)
    assert left[0.001] < naive / 300


def test_the_running_estimate_settles_on_the_moment_of_the_data():
    logits, labels = batch(64)
    method, lam = DRO(lam=1.0, rate=1e-4), 1.0
    generator = torch.Generator().manual_seed(0)
    state = method.initial_state()
    for _ in range(400):
        rows = torch.randint(0, 64, (8,), generator=generator)
        out = method(logits=logits.detach()[rows], labels=labels[rows], state=state)
        state = method.advance(state, {name: value.item() for name, value in out.metrics.items()}, 0.5)
    tilted = (losses_of(logits, labels) / lam).exp()
    spread = (tilted.std() / math.sqrt(3200) / tilted.mean()).item()
    wanted = tilted.mean().log().item()
    assert state["log_moment"] == pytest.approx(wanted, abs=4 * spread)
    assert state["steps"] == 400


def test_a_rate_of_one_and_the_first_step_are_the_batch_alone():
    logits, labels = batch()
    plain = DRO(lam=0.5)(logits=logits, labels=labels)
    for rate, steps in ((1.0, 7.0), (0.01, 0.0)):
        method = DRO(lam=0.5, rate=rate)
        out = method(logits=logits, labels=labels, state={"log_moment": 3.0, "steps": steps})
        close(out.loss.detach(), plain.loss.detach())
        close(gradient(out, logits), gradient(plain, logits))
        close(out.metrics["effective"], plain.metrics["effective"])


# -- contract ------------------------------------------------------------------------------------------


def test_it_keeps_the_contract_of_a_method():
    for method, _ in METHODS:
        assert method.consumes == "examples" and method.unit == "batch"
        assert isinstance(method, Method)
    assert DRO(lam=1.0).reads == ("logits", "labels")
    assert DRO(lam=1.0, rate=0.1).reads == ("logits", "labels", "state")
    assert isinstance(DRO(lam=1.0, rate=0.1), Adaptive)
    assert DRO(rho=0.1).initial_state() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_and_empty_batches_stay_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    labels = torch.tensor([0, 0, 1])
    state = {"log_moment": 0.0, "steps": 5.0}
    for method in [method for method, _ in METHODS] + [DRO(lam=1e-2, rate=0.1)]:
        given = {"state": state} if "state" in getattr(method, "reads", ()) else {}
        scores = logits.clone().requires_grad_()
        out = method(logits=scores, labels=labels, **given)
        (slope,) = torch.autograd.grad(out.loss, scores)
        assert out.loss.isfinite() and slope.isfinite().all()
        assert all(value.isfinite() for value in out.metrics.values())
        nothing = method(logits=scores[:0], labels=labels[:0], **given)
        assert nothing.loss.requires_grad and nothing.loss.item() == 0
        if given:
            assert method.advance(state, {}, 0.5) == state


def test_what_makes_no_sense_is_refused():
    options: dict[str, Any]
    for options in ({}, {"lam": 1.0, "rho": 1.0}):
        with pytest.raises(ValueError, match="one of them"):
            DRO(**options)
    for options in ({"lam": 0.0}, {"lam": math.inf}, {"rho": -1.0}, {"rho": math.nan}):
        with pytest.raises(ValueError, match=r"lam|rho"):
            DRO(**options)
    with pytest.raises(ValueError, match="rate is in"):
        DRO(lam=1.0, rate=0.0)
    for options in ({"rho": 1.0}, {"lam": 1.0, "divergence": Pearson()}):
        with pytest.raises(ValueError, match="leave rate out"):
            DRO(rate=0.1, **options)
    with pytest.raises(TypeError, match="f-divergence"):
        DRO(Renyi(2.0), lam=1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="share"):
        CVaR(0.0)
    logits, labels = batch()
    with pytest.raises(ValueError, match="whole batch of 16"):
        DRO(lam=1.0)(logits=logits, labels=labels, count=16)
    with pytest.raises(TypeError, match="reads state"):
        DRO(lam=1.0, rate=0.1)(logits=logits, labels=labels)
