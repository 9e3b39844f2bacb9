"""TRADES and plain adversarial training: reductions, the direction of the divergence, and its energies."""

import math
from typing import Any

import pytest
import torch
from tests.worlds import close
from torch import nn

from fdiv import JS, KL, TV, Renyi, ReverseKL, SquaredHellinger
from fdiv.methods._method import Method
from fdiv.methods.robust.attacks import AdversarialTraining, Attack
from fdiv.methods.robust.trades import TRADES, farthest

CLASSES, WIDTH = 3, 4


def example(seed=0, rows=6, dropout=0.0):
    """(network, inputs, labels), float64."""
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers).double(), torch.rand(rows, WIDTH).double(), torch.arange(rows) % CLASSES


def called(method, network, inputs, labels, **given):
    return method(logits=network(inputs), labels=labels, inputs=inputs, network=network, **given)


def gradients(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


@pytest.mark.parametrize(
    "divergence", [KL(), ReverseKL(), JS(0.5), SquaredHellinger(), TV(), Renyi(2.0)], ids=repr
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_loss_and_its_gradient_are_those_of_the_formula_at_the_attacked_inputs(divergence, norm):
    network, inputs, labels = example()
    attack = Attack(epsilon=0.2, steps=3, norm=norm, start="normal", noise=0.01)
    torch.manual_seed(1)
    out = called(TRADES(divergence, beta=3.0, attack=attack), network, inputs, labels)
    torch.manual_seed(1)
    moved = farthest(network, inputs, divergence, attack)
    log_p, log_q = network(inputs).log_softmax(-1), network(moved).log_softmax(-1)
    apart = divergence(log_p, log_q).mean()
    wanted = nn.functional.cross_entropy(network(inputs), labels) + 3.0 * apart
    close(out.loss, wanted)
    close(gradients(out.loss, network), gradients(wanted, network))  # through both arguments
    close(out.metrics["divergence"], apart.detach())
    still = divergence(log_p, network(inputs + 1e-3 * torch.randn_like(inputs)).log_softmax(-1))
    assert apart > 10 * still.mean()


def test_the_default_direction_is_the_papers():
    """KL from the natural to the attacked prediction: torch's kl_div(log q(x'), q(x))."""
    network, inputs, labels = example()
    torch.manual_seed(1)
    out = called(TRADES(attack=Attack(epsilon=0.2, start="normal")), network, inputs, labels)
    torch.manual_seed(1)
    moved = farthest(network, inputs, KL(), Attack(epsilon=0.2, start="normal"))
    log_q, p = network(moved).log_softmax(-1), network(inputs).softmax(-1)
    close(out.metrics["divergence"], nn.functional.kl_div(log_q, p, reduction="batchmean").detach())
    assert TRADES().beta == 6.0 and TRADES().attack == Attack(0.031, 10, 0.007, start="normal")


def test_the_divergence_is_a_difference_of_energies():
    network, inputs, labels = example()
    torch.manual_seed(1)
    attack = Attack(epsilon=0.3, start="normal")
    out = called(TRADES(attack=attack), network, inputs, labels)
    torch.manual_seed(1)
    z, moved = network(inputs), network(farthest(network, inputs, KL(), attack))
    of_classes = (z.softmax(-1) * (-moved + z)).sum(-1)
    of_inputs = -z.logsumexp(-1) + moved.logsumexp(-1)
    close(out.metrics["divergence"], (of_classes + of_inputs).mean().detach())


def test_the_attack_finds_the_farthest_point_of_a_linear_model_of_two_classes():
    """There D grows with |z' - z|, which is largest in the corner that the weights' signs tell."""
    torch.manual_seed(0)
    network, inputs = nn.Linear(WIDTH, 2).double(), torch.rand(5, WIDTH).double()
    attack = Attack(epsilon=0.1, steps=20, start="normal", bounds=None)
    moved = farthest(network, inputs, KL(), attack)
    close(
        (network(moved) - network(inputs)).diff().abs().squeeze(-1),
        0.1 * network.weight.diff(dim=0).abs().sum(-1).expand(5),
    )


def test_without_a_weight_or_a_ball_it_is_cross_entropy():
    network, inputs, labels = example()
    wanted = nn.functional.cross_entropy(network(inputs), labels)
    for method in (TRADES(beta=0.0), TRADES(attack=Attack(epsilon=0.0))):
        close(called(method, network, inputs, labels).loss, wanted)
    plain = AdversarialTraining(Attack(epsilon=0.0))(labels=labels, inputs=inputs, network=network)
    close(plain.loss, wanted)


def test_adversarial_training_is_cross_entropy_where_a_linear_model_is_worst():
    torch.manual_seed(0)
    network, inputs, labels = nn.Linear(WIDTH, 2).double(), torch.rand(5, WIDTH).double(), torch.arange(5) % 2
    method = AdversarialTraining(Attack(epsilon=0.1, bounds=None))
    out = method(labels=labels, inputs=inputs, network=network)
    logits = network(inputs)
    margin = logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])
    shrunk = margin.squeeze(1) - 0.1 * network.weight.diff(dim=0).abs().sum()
    close(out.loss, nn.functional.softplus(-shrunk).mean())
    assert out.loss > nn.functional.cross_entropy(logits, labels)
    assert gradients(out.loss, network).isfinite().all()


def test_parts_of_a_batch_add_up_and_modes_stay():
    network, inputs, labels = example(dropout=0.5)
    network.train()
    network[2].eval()  # no draws, so that the parts see what the whole sees
    for method in (
        TRADES(attack=Attack(0.1, start="normal", noise=0.0)),
        AdversarialTraining(Attack(0.1, start="none")),
    ):

        def loss(rows, method=method, **given):
            some = {"labels": labels[rows], "inputs": inputs[rows], "network": network, **given}
            if "logits" in method.reads:
                some["logits"] = network(inputs[rows])
            return method(**some).loss

        whole = loss(slice(None))
        close(loss(slice(0, 2), count=6) + loss(slice(2, 6), count=6), whole)
        assert [m.training for m in network.modules()] == [True, True, True, False, True]


def test_extreme_logits_and_empty_batches_stay_finite():
    network, inputs, labels = example()
    with torch.no_grad():
        list(network.parameters())[2].mul_(1e4)
    for method in (TRADES(attack=Attack(0.1, start="normal")), TRADES(JS(0.5)), TRADES(ReverseKL())):
        out = called(method, network, inputs, labels)
        assert out.loss.isfinite() and gradients(out.loss, network).isfinite().all()
        nothing = called(method, network, inputs[:0], labels[:0])
        assert nothing.loss.requires_grad and nothing.loss.item() == 0
    nothing = AdversarialTraining()(labels=labels[:0], inputs=inputs[:0], network=network)
    assert nothing.loss.item() == 0


def test_it_keeps_the_contract_and_refuses_what_makes_no_sense():
    assert isinstance(TRADES(), Method) and isinstance(AdversarialTraining(), Method)
    options: dict[str, Any]
    for options in ({"beta": -1.0}, {"beta": math.inf}):
        with pytest.raises(ValueError, match="beta"):
            TRADES(**options)
    with pytest.raises(ValueError, match="no slope"):
        TRADES(attack=Attack(start="none"))
    for options in ({"divergence": "KL"}, {"attack": 0.1}):
        with pytest.raises(TypeError, match=r"divergence|attack"):
            TRADES(**options)
