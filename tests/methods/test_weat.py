"""WEAT: the weights, both forms, and TRADES where the weights are equal."""

import math
from typing import Any

import pytest
import torch
from tests.methods.test_trades import called, example, gradients
from tests.worlds import close
from torch import nn

from fdiv import JS, KL
from fdiv.methods._method import Method
from fdiv.methods.robust.attacks import Attack
from fdiv.methods.robust.trades import TRADES, farthest
from fdiv.methods.robust.weat import WEAT, energy, energy_weight

ATTACK = Attack(epsilon=0.2, steps=3, start="normal")


def test_the_weight_is_largest_where_the_energy_is_zero():
    energies = torch.tensor([0.0, 1.0, -1.0, 3.0, -3.0, 1e4, -1e4], dtype=torch.float64)
    found = energy_weight(energies)
    close(found[0], torch.tensor(1 / math.log(2), dtype=torch.float64))
    close(found[1], torch.tensor(1 / math.log(1 + math.e), dtype=torch.float64))
    close(found[1::2], found[2::2])
    close(found[5], torch.tensor(1e-4, dtype=torch.float64))  # log(1 + e^x) is x there
    assert (found[:6:2].diff() < 0).all()


@pytest.mark.parametrize("labels_at", ["nat", "adv"])
def test_the_loss_is_the_weighted_sum_of_both_terms_with_the_weight_held(labels_at):
    network, inputs, labels = example()
    method = WEAT(labels_at=labels_at, attack=ATTACK)
    assert method.weight == {"nat": 6.0, "adv": 7.0}[labels_at]
    torch.manual_seed(1)
    out = called(method, network, inputs, labels)
    torch.manual_seed(1)
    moved = network(farthest(network, inputs, KL(), ATTACK))
    logits = network(inputs)
    weight = (1 / (1 + logits.logsumexp(-1).abs().exp()).log()).detach()
    nll = nn.functional.cross_entropy(logits if labels_at == "nat" else moved, labels, reduction="none")
    apart = (logits.softmax(-1) * (logits.log_softmax(-1) - moved.log_softmax(-1))).sum(-1)
    wanted = (weight * (nll + method.weight * apart)).mean()
    close(out.loss, wanted)
    close(gradients(out.loss, network), gradients(wanted, network))
    close(out.metrics["weight"], weight.mean())


def test_where_all_energies_are_zero_it_is_trades_over_log_two():
    network, inputs, labels = example()

    class Normalised(nn.Module):
        def forward(self, x):
            return network(x).log_softmax(-1)

    model = Normalised()
    for divergence in (KL(), JS(0.5)):
        torch.manual_seed(1)
        out = called(WEAT(divergence, beta=2.0, attack=ATTACK), model, inputs, labels)
        torch.manual_seed(1)
        trades = called(TRADES(divergence, beta=2.0, attack=ATTACK), model, inputs, labels)
        close(out.loss, trades.loss / math.log(2))
    close(energy(model(inputs)).detach(), torch.zeros(6, dtype=torch.float64))


def test_extreme_logits_and_empty_batches_stay_finite():
    network, inputs, labels = example()
    with torch.no_grad():
        list(network.parameters())[2].mul_(1e4)
    out = called(WEAT(attack=ATTACK), network, inputs, labels)
    assert out.loss.isfinite() and gradients(out.loss, network).isfinite().all()
    assert called(WEAT(), network, inputs[:0], labels[:0]).loss.item() == 0


def test_it_keeps_the_contract_and_refuses_what_makes_no_sense():
    assert isinstance(WEAT(), Method)
    assert WEAT(beta=0.5).weight == 0.5
    options: dict[str, Any]
    for options, complaint in (
        ({"labels_at": "both"}, "labels_at"),
        ({"beta": -1.0}, "beta"),
        ({"attack": Attack(start="none")}, "no slope"),
    ):
        with pytest.raises(ValueError, match=complaint):
            WEAT(**options)
