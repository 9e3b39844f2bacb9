"""Weights that follow the trained ones."""

import pytest
import torch
from torch import nn

from fdiv.averaging import Average


def test_the_average_is_the_geometric_sum_of_the_weights():
    model, rate = nn.Linear(1, 1, bias=False).double(), 0.95
    average, expected = Average(model, rate), model.weight.item()
    for step in range(300):
        nn.init.constant_(model.weight, step)
        average.follow(step)
        now = min(rate, (1 + step) / (10 + step))
        expected = now * expected + (1 - now) * step
    assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(299 - rate / (1 - rate), rel=1e-3)  # what a ramp tends to
    assert model.weight.item() == 299
    average.settle()
    assert model.weight.item() == pytest.approx(expected, rel=1e-12)


def test_what_is_not_trained_is_left_alone():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    average = Average(model, 0.9)
    assert list(average.weights) == ["weight"]
    average.restore({"weight": torch.ones(2, 2)})
    average.settle()
    assert torch.equal(model.weight, torch.ones(2, 2))
