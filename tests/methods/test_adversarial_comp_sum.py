"""Smooth adversarial comp-sum losses: linear networks, whose worst case is known, and the bound."""

import itertools
import math

import pytest
import torch
from tests.worlds import close, gradient
from torch import nn

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.robust.adversarial_comp_sum import AdversarialCompSum, shift
from fdiv.methods.robust.attacks import Attack
from fdiv.methods.supervise.comp_sum import CompSum

EPSILON = 0.1
ATTACK = Attack(epsilon=EPSILON, steps=10, bounds=None)


def linear(classes, places=4, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(places, classes, dtype=torch.float64)


def batch(places=4, classes=2, rows=6):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, places, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(classes, (rows,), generator=generator)


def called(method, network, inputs, labels, **more):
    return method(logits=network(inputs), labels=labels, inputs=inputs, network=network, **more)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.6, 2.0])
def test_without_nu_it_is_the_comp_sum_loss_at_the_temperature_rho(tau):
    network, (inputs, labels) = linear(3), batch(classes=3)
    out = called(AdversarialCompSum(tau, rho=0.5, nu=0.0), network, inputs, labels)
    close(out.loss, CompSum(tau)(logits=2 * network(inputs), labels=labels).loss, 1e-13)


def test_of_two_classes_and_a_linear_network_the_term_is_known():
    """sup |w . delta| = epsilon |w|_1, w the difference of the classes' weights; so is its gradient."""
    network, (inputs, labels) = linear(2), batch()
    w = (network.weight[0] - network.weight[1]).detach()
    out = called(AdversarialCompSum(nu=3.0, attack=ATTACK), network, inputs, labels)
    plain = CompSum()(logits=network(inputs), labels=labels).loss
    close(out.metrics["moved"], EPSILON * w.abs().sum(), 1e-12)
    close(out.loss, plain + 3 * EPSILON * w.abs().sum(), 1e-12)
    of_term = gradient(out.loss, network.weight) - gradient(plain, network.weight)
    close(of_term, 3 * EPSILON * torch.cat([w.sign(), -w.sign()]), 1e-11)


def test_under_the_euclidean_ball_too():
    network, (inputs, labels) = linear(2), batch()
    w = (network.weight[0] - network.weight[1]).detach()
    attack = Attack(epsilon=EPSILON, steps=20, step_size=1.0, norm="l2", bounds=None)
    out = called(AdversarialCompSum(attack=attack), network, inputs, labels)
    close(out.metrics["moved"], EPSILON * w.norm(), 1e-9)


def test_the_term_is_of_all_score_differences_with_the_label():
    change = torch.tensor([[1.0, 3.0, -2.0], [1.0, 3.0, -2.0]], dtype=torch.float64)
    expected = torch.tensor([math.hypot(2, 3), math.hypot(2, 5)], dtype=torch.float64)
    close(shift(change, torch.tensor([0, 1])), expected, 1e-14)


def test_of_more_classes_the_attack_comes_near_the_worst_corner():
    """The norm is convex, hence largest at a corner of the cube; all 16 are tried."""
    network, (inputs, labels) = linear(4), batch(classes=4, rows=40)
    corners = EPSILON * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    change = corners @ network.weight.detach().T
    worst = torch.stack([shift(change, torch.full((16,), int(y))).max() for y in labels])
    moved = torch.stack(
        [
            called(AdversarialCompSum(attack=ATTACK), network, x[None], y[None]).metrics["moved"]
            for x, y in zip(inputs, labels, strict=True)
        ]
    )
    assert (moved <= worst + 1e-12).all() and (moved / worst).mean() > 0.9


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7, 2.0])
def test_a_large_nu_makes_it_an_upper_bound_on_the_worst_margin_loss(tau):
    """max over x' of Phi(sum over y' of the margin loss min(1, (1 - d/rho)_+)), by enumeration of corners."""
    rho, classes = 0.7, 4
    network, (inputs, labels) = linear(classes, seed=2), batch(classes=classes, rows=30)
    corners = 0.8 * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    scores = network(inputs).detach()
    others = torch.stack([torch.tensor([k for k in range(classes) if k != y]) for y in labels.tolist()])
    moved = network(inputs[:, None] + corners).detach()  # [rows, corners, classes]

    def differences(h):
        own = h.gather(-1, labels.reshape(-1, *[1] * (h.ndim - 1)).expand(*h.shape[:-1], 1))
        return own - h.gather(-1, others.reshape(len(h), *[1] * (h.ndim - 2), 3).expand(*h.shape[:-1], 3))

    def phi(u):
        return u.log1p() if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)

    margins = phi((1 - differences(moved) / rho).clamp(0, 1).sum(-1)).amax(1)
    worst = (differences(moved) - differences(scores)[:, None]).norm(dim=-1).amax(1)
    fitted = CompSum(tau)
    for row in range(30):
        first = fitted(logits=scores[row][None] / rho, labels=labels[row][None]).loss
        assert first + math.sqrt(classes - 1) / rho * worst[row] >= margins[row]


def test_of_a_constant_network_the_term_is_zero_and_so_is_its_gradient():
    network, (inputs, labels) = linear(3), batch(classes=3)
    nn.init.zeros_(network.weight)
    out = called(AdversarialCompSum(attack=ATTACK), network, inputs, labels)
    plain = CompSum()(logits=network(inputs), labels=labels).loss
    assert out.loss == plain and out.metrics["moved"] == 0
    close(gradient(out.loss, network.weight), gradient(plain, network.weight), 1e-13)


def test_the_network_is_left_in_its_modes_and_without_stray_gradients():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    network[1].eval()
    inputs, labels = batch(classes=3)
    called(AdversarialCompSum(attack=ATTACK), network, inputs, labels).loss.backward()
    assert network.training and network[0].training and not network[1].training
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert not inputs.requires_grad


def test_micro_batches_add_up_to_the_global_batch():
    network, (inputs, labels) = linear(2), batch()
    method = AdversarialCompSum(1.5, nu=2.0, attack=ATTACK)
    whole = called(method, network, inputs, labels).loss
    parts = [called(method, network, inputs[s], labels[s], count=6).loss for s in (slice(0, 2), slice(2, 6))]
    close(sum(parts), whole, 1e-12)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7])
def test_scores_that_are_worlds_apart_give_finite_values_and_gradients(tau):
    network, (inputs, labels) = linear(2).float(), batch()
    nn.init.constant_(network.weight, 2e3)
    network.weight.data[0] *= -1
    out = called(AdversarialCompSum(tau, attack=ATTACK), network, inputs.float(), labels)
    assert network(inputs.float()).abs().max() > 1e3
    assert out.loss.isfinite() and gradient(out.loss, network.weight).isfinite().all()


def test_without_an_example_the_loss_is_zero():
    network, (inputs, labels) = linear(2), batch()
    out = called(AdversarialCompSum(attack=ATTACK), network, inputs[:0], labels[:0], count=4)
    assert out.loss == 0 and not gradient(out.loss, network.weight).any()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="tau is finite"):
        AdversarialCompSum(-1.0)
    for rho in (0.0, math.inf):
        with pytest.raises(ValueError, match="rho is a margin"):
            AdversarialCompSum(rho=rho)
    for nu in (-1.0, math.nan):
        with pytest.raises(ValueError, match="nu is a finite weight"):
            AdversarialCompSum(nu=nu)
    with pytest.raises(ValueError, match="no slope at x itself"):
        AdversarialCompSum(attack=Attack(start="none"))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = AdversarialCompSum(1.7, attack=ATTACK)
    modules = ["fdiv.methods.robust.adversarial_comp_sum", "fdiv.methods.robust.attacks"]
    assert fdiv.parse(repr(method), modules) == method
    assert isinstance(method, Method)
