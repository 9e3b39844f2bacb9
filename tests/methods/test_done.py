"""DONE: the smooth inner problem, the derivative through its solution, and its reductions."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tests.methods.test_trades import example, gradients
from tests.worlds import close
from torch import nn

from fdiv.methods._method import Adaptive, Method
from fdiv.methods.robust.attacks import AdversarialTraining, Attack
from fdiv.methods.robust.done import DONE, box_of, highest
from fdiv.methods.robust.dro import DRO
from fdiv.operators.linear import GMRES, ConjugateGradients

ATTACK = Attack(epsilon=0.2, steps=3)
FRESH = {"log_moment": 0.0, "steps": 0.0}


def exact(**options):
    """The inner problem, and the linear systems, solved to the end."""
    return DONE(
        **{"attack": ATTACK, "steps": 100, "barrier": 0.05, "linear": GMRES(tolerance=1e-12)} | options
    )


def surprise(network, inputs, labels):
    return nn.functional.cross_entropy(network(inputs), labels, reduction="none")


def test_the_closed_form_of_the_ascent_is_the_highest_point():
    places = torch.linspace(-0.9999, 0.9999, 20001, dtype=torch.float64)
    for pull in (-30.0, -1.0, 0.0, 0.3, 8.0):
        grid = places[(pull * places + (1 - places.square()).log()).argmax()]
        assert highest(torch.tensor(pull, dtype=torch.float64)).tanh().item() == pytest.approx(
            grid.item(), abs=1e-4
        )


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_the_attack_ends_at_the_maximum_of_the_smooth_problem(bounds):
    network, inputs, labels = example(rows=3)
    inputs[0] = inputs[0].round()  # in the corner of the bounds
    attack = Attack(epsilon=0.2, steps=3, bounds=bounds)
    worst, off = exact(attack=attack).worst(inputs, labels, network)
    assert off < 1e-12
    low, high = inputs - 0.2, inputs + 0.2
    if bounds is not None:
        low, high = low.clamp(min=0), high.clamp(max=1)
    assert ((low < worst) & (worst < high)).all()
    for row in range(3):

        def smooth(x, row=row):
            loss = surprise(network, torch.tensor(x)[None], labels[row : row + 1]).item()
            walls = np.log(x - low[row].numpy()) + np.log(high[row].numpy() - x)
            return -loss - 0.05 * walls.sum()

        at = worst[row].detach().numpy()
        start = ((low + high) / 2)[row].numpy()
        found = minimize(smooth, start, bounds=list(zip(low[row] + 1e-9, high[row] - 1e-9, strict=True)))
        assert smooth(at) <= found.fun + 1e-9
        np.testing.assert_allclose(at, found.x, atol=1e-4)


def test_a_small_barrier_leaves_the_attack_at_the_corners():
    torch.manual_seed(0)
    network, inputs, labels = nn.Linear(4, 2).double(), torch.rand(5, 4).double(), torch.arange(5) % 2
    method = DONE(attack=Attack(0.1, bounds=None), barrier=1e-9)
    away = method.worst(inputs, labels, network)[0] - inputs
    sign = torch.where(labels == 1, -1.0, 1.0)[:, None] * network.weight.diff(dim=0).sign()
    torch.testing.assert_close(away, 0.1 * sign, rtol=0.0, atol=1e-6)


# -- the derivative ------------------------------------------------------------------------------------


def objective(network, inputs, labels, method):
    """lam log mean exp(l_i(theta, x_i'(theta))/lam), the inner problem solved anew."""
    torch.manual_seed(1)
    worst = method.worst(inputs, labels, network)[0].detach()
    scaled = surprise(network, worst, labels) / method.lam
    return method.lam * (scaled.logsumexp(0) - math.log(len(labels)))


@pytest.mark.parametrize("linear", [GMRES(tolerance=1e-12), ConjugateGradients(tolerance=1e-12)], ids=repr)
def test_the_gradient_is_that_of_the_whole_objective_through_the_attack(linear):
    network, inputs, labels = example()
    method = exact(lam=0.5, linear=linear)
    torch.manual_seed(1)
    out = method(labels=labels, inputs=inputs, network=network, state=FRESH)
    close(out.loss.detach(), objective(network, inputs, labels, method).detach())
    found = gradients(out.loss, network)
    weights = nn.utils.parameters_to_vector(network.parameters()).detach()
    for seed in range(3):
        direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(seed)).double()
        ends = []
        for step in (1e-5, -1e-5):
            nn.utils.vector_to_parameters(weights + step * direction, network.parameters())
            ends.append(objective(network, inputs, labels, method).detach())
        slope = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(found @ direction, slope, rtol=0.0, atol=1e-8)
    nn.utils.vector_to_parameters(weights, network.parameters())
    first = exact(lam=0.5, linear=None)
    torch.manual_seed(1)
    held = gradients(first(labels=labels, inputs=inputs, network=network, state=FRESH).loss, network)
    assert (held - found).norm() > 1e-3 * found.norm()


def test_the_first_order_variant_is_dro_at_the_attacked_inputs():
    network, inputs, labels = example()
    method = DONE(lam=0.5, rate=0.1, attack=ATTACK, linear=None)
    state = {"log_moment": 1.2, "steps": 50.0}
    torch.manual_seed(1)
    out = method(labels=labels, inputs=inputs, network=network, state=state, count=6)
    torch.manual_seed(1)
    worst, _ = method.worst(inputs, labels, network)
    assert not worst.requires_grad
    other = DRO(lam=0.5, rate=0.1)(logits=network(worst), labels=labels, state=state)
    close(out.loss, other.loss)
    close(gradients(out.loss, network), gradients(other.loss, network))
    assert method.advance(state, {"log_moment": 2.0}, 0.5) == {"log_moment": 2.0, "steps": 51.0}


def test_at_a_high_price_it_is_adversarial_training():
    torch.manual_seed(0)
    network, inputs, labels = nn.Linear(4, 2).double(), torch.rand(5, 4).double(), torch.arange(5) % 2
    attack = Attack(epsilon=0.1, bounds=None)
    out = DONE(lam=1e6, attack=attack, barrier=1e-9, rate=1.0, linear=None)(
        labels=labels, inputs=inputs, network=network, state=FRESH
    )
    plain = AdversarialTraining(attack)(labels=labels, inputs=inputs, network=network)
    torch.testing.assert_close(out.loss, plain.loss, rtol=0.0, atol=1e-5)
    close(gradients(out.loss, network), gradients(plain.loss, network), 1e-5)


def test_examples_that_are_hard_to_defend_weigh_more():
    network, inputs, labels = example()
    method = exact(lam=0.1, linear=None)
    torch.manual_seed(1)
    out = method(labels=labels, inputs=inputs, network=network, state=FRESH)
    assert out.metrics["effective"] < 0.99
    assert out.metrics["nll"] < out.loss < out.metrics["worst"]


# -- the network, and hostile inputs -------------------------------------------------------------------


def test_the_network_is_attacked_in_eval_mode_and_trains_as_before():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    network[1].eval()
    seen = {name: value.clone() for name, value in network.named_buffers()}
    inputs, labels = torch.rand(6, 4), torch.arange(6) % 3
    out = DONE(attack=ATTACK)(labels=labels, inputs=inputs, network=network, state=FRESH)
    assert gradients(out.loss, network).isfinite().all()
    assert [m.training for m in network.modules()] == [True, True, False, True, True, True]
    assert all(torch.equal(value, seen[name]) for name, value in network.named_buffers())
    assert out.metrics["off"] < 0.1


def test_extreme_logits_and_empty_batches_stay_finite():
    network, inputs, labels = example()
    network, inputs = network.float(), inputs.float()
    with torch.no_grad():
        list(network.parameters())[2].mul_(1e4)
    for linear in (None, GMRES(tolerance=1e-3)):
        method = DONE(attack=ATTACK, linear=linear)
        out = method(labels=labels, inputs=inputs, network=network, state=FRESH)
        assert out.loss.isfinite() and gradients(out.loss, network).isfinite().all()
        nothing = method(labels=labels[:0], inputs=inputs[:0], network=network, state=FRESH)
        assert nothing.loss.requires_grad and nothing.loss.item() == 0


def test_the_box_is_the_ball_within_the_bounds():
    box = box_of(torch.tensor([0.0, 0.05, 0.5, 1.0]), Attack(epsilon=0.1))
    close(box.middle - box.half, torch.tensor([0.0, 0.0, 0.4, 0.9]), 1e-6)
    close(box.middle + box.half, torch.tensor([0.1, 0.15, 0.6, 1.0]), 1e-6)


def test_it_keeps_the_contract_and_refuses_what_makes_no_sense():
    assert isinstance(DONE(), Method) and isinstance(DONE(), Adaptive)
    assert DONE().initial_state() == FRESH
    options: dict[str, Any]
    for options, complaint in (
        ({"lam": 0.0}, "lam"),
        ({"barrier": 0.0}, "barrier"),
        ({"steps": 0}, "steps"),
        ({"rate": None}, "rate"),
        ({"rate": 2.0}, "rate"),
        ({"attack": Attack(norm="l2")}, "box"),
        ({"attack": Attack(epsilon=0.0)}, "box"),
    ):
        with pytest.raises(ValueError, match=complaint):
            DONE(**options)
    network, inputs, labels = example()
    with pytest.raises(ValueError, match="whole batch"):
        DONE(attack=ATTACK)(labels=labels, inputs=inputs, network=network, state=FRESH, count=12)
    with pytest.raises(TypeError, match="state"):
        DONE(attack=ATTACK)(labels=labels, inputs=inputs, network=network)
