"""Attacks: projections onto ball and bounds, and what ascent reaches where that is known."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

from fdiv.methods.robust.attacks import Attack, evaluated, shrunk, unit

torch.set_num_threads(1)

NORMS: list[Literal["linf", "l2"]] = ["linf", "l2"]
STARTS = ["uniform", "normal", "none"]


def inputs_of(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def size(moved, inputs, norm):
    away = (moved - inputs).flatten(1)
    return away.abs().amax(-1) if norm == "linf" else away.norm(dim=-1)


def linear(weight):
    return lambda x: (x * weight).flatten(1).sum(-1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_an_attack_stays_in_the_ball_and_in_the_bounds(norm, start, bounds):
    torch.manual_seed(0)
    inputs = inputs_of(20, 3, 4)
    inputs[:5] = inputs[:5].round()  # corners of the bounds
    attack = Attack(epsilon=0.3, steps=7, norm=norm, start=start, bounds=bounds, noise=1.0)
    for weight in (torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, 4)):
        moved = attack(inputs, linear(weight))
        assert (size(moved, inputs, norm) <= 0.3 + 1e-12).all()
        assert bounds is None or (moved.min() >= 0 and moved.max() <= 1)
        assert not moved.requires_grad


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_objective_rises_by_epsilon_times_the_dual_norm_of_its_weight(start, norm):
    torch.manual_seed(1)
    inputs, weight = inputs_of(6, 5), torch.randn(5, dtype=torch.float64)
    dual = weight.abs().sum() if norm == "linf" else weight.norm()
    moved = Attack(epsilon=0.2, steps=30, step_size=1.0, norm=norm, start=start, bounds=None)(
        inputs, linear(weight)
    )
    rise = linear(weight)(moved) - linear(weight)(inputs)
    torch.testing.assert_close(rise, (0.2 * dual).expand(6), rtol=1e-12, atol=0.0)


def test_within_bounds_a_linear_objective_rises_by_what_each_place_has_room_for():
    torch.manual_seed(2)
    inputs, weight = inputs_of(6, 5), torch.randn(5, dtype=torch.float64)
    moved = Attack(epsilon=0.2, steps=20)(inputs, linear(weight))
    room = torch.where(weight > 0, (1 - inputs).clamp(max=0.2), inputs.clamp(max=0.2))
    torch.testing.assert_close(linear(weight)(moved - inputs), (room * weight.abs()).sum(-1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", STARTS)
def test_without_steps_an_attack_is_its_start(norm, start):
    inputs = inputs_of(4, 3)
    attack = Attack(epsilon=0.1, steps=0, norm=norm, start=start)

    def refuse(x):
        raise AssertionError("no step, no gradient")

    torch.manual_seed(3)
    found = attack(inputs, refuse)
    torch.manual_seed(3)
    assert torch.equal(found, attack.begin(inputs))
    assert torch.equal(found, inputs) == (start == "none")


def test_the_seed_of_torch_determines_an_attack():
    inputs = inputs_of(4, 3)
    weight = torch.ones(3, dtype=torch.float64)
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(Attack(steps=1, step_size=1e-3)(inputs, linear(weight)))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_start_of_l2_is_uniform_in_the_ball():
    torch.manual_seed(0)
    inputs = torch.zeros(40_000, 3, dtype=torch.float64)
    away = Attack(epsilon=2.0, norm="l2", bounds=None).begin(inputs)
    share = (away.norm(dim=-1) <= 1.0).double().mean().item()  # the half ball's volume
    assert share == pytest.approx(1 / 8, abs=4 * math.sqrt(1 / 8 * 7 / 8 / 40_000))
    assert away.mean(0).abs().max() < 0.02


@pytest.mark.parametrize("seed", range(6))
def test_projection_is_the_nearest_point_of_ball_and_bounds(seed):
    inputs = inputs_of(1, 4, seed=seed)
    inputs[0, 0] = float(seed % 2)
    moved = inputs + torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = Attack(epsilon=0.6, norm="l2").project(moved, inputs)
    # Dykstra's algorithm: projections onto the two sets in turn, each with its own correction.
    x, of_ball, of_box = moved, torch.zeros_like(moved), torch.zeros_like(moved)
    for _ in range(3000):
        away = x + of_ball - inputs
        y = inputs + away * (0.6 / away.norm()).clamp(max=1.0)
        of_ball = x + of_ball - y
        x = (y + of_box).clamp(0.0, 1.0)
        of_box = y + of_box - x
    torch.testing.assert_close(found, x, rtol=0.0, atol=1e-6)


def test_projection_leaves_what_is_inside_and_scales_where_nothing_bounds():
    inputs = torch.full((2, 3), 0.5)
    inside = inputs + torch.tensor([0.1, -0.1, 0.05])
    for norm in NORMS:
        torch.testing.assert_close(Attack(epsilon=0.2, norm=norm).project(inside, inputs), inside)
    away = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]])
    found = Attack(epsilon=0.5, norm="l2", bounds=None).project(inputs + away, inputs) - inputs
    torch.testing.assert_close(found, away / 10)


def test_no_room_and_no_radius_leave_no_way():
    room = torch.zeros(1, 3)
    assert torch.equal(shrunk(torch.ones(1, 3), room, 1.0), room)
    assert torch.equal(shrunk(torch.ones(1, 3), torch.full((1, 3), math.inf), 0.0), room)
    assert torch.equal(shrunk(room, room, 1.0), room)


def test_unit_keeps_its_length_at_sizes_whose_square_underflows():
    rows = torch.tensor([[3e-30, 4e-30], [3e30, 4e30], [0.0, 0.0]])
    torch.testing.assert_close(unit(rows), torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]))


def test_an_attack_raises_the_loss_of_a_network_and_gives_its_parameters_no_gradient():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    inputs, labels = torch.rand(32, 6), torch.randint(0, 3, (32,))

    def loss(x):
        return nn.functional.cross_entropy(network(x), labels, reduction="none")

    for norm in NORMS:
        with torch.no_grad():
            before, after = loss(inputs), loss(Attack(epsilon=0.2, norm=norm)(inputs, loss))
        assert (after > before).all()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_evaluated_gives_each_module_its_own_mode_back_also_after_an_error():
    network = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.BatchNorm1d(3)))
    network.train()
    network[1].eval()
    modes = [module.training for module in network.modules()]
    with evaluated(network) as same:
        assert same is network and not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == modes
    with pytest.raises(RuntimeError, match="broken"), evaluated(network):
        raise RuntimeError("broken")
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"steps": -1}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"norm": "l1"}, "norm"),
        ({"start": "zero"}, "start"),
        ({"noise": math.nan}, "noise"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        Attack(**options)


def test_inputs_and_objectives_without_a_meaning_are_refused():
    inputs = torch.full((2, 3), 0.5)
    with pytest.raises(ValueError, match="leave bounds"):
        Attack()(inputs + 1, linear(inputs))
    with pytest.raises(TypeError, match="floating"):
        Attack()(torch.ones(2, 3, dtype=torch.long), linear(inputs))
    with pytest.raises(ValueError, match="rows"):
        Attack()(inputs, lambda x: x.sum())
    with pytest.raises(ValueError, match="not finite"):
        Attack()(inputs, lambda x: (x * math.inf).sum(-1))
