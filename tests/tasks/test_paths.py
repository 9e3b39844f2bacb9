"""Paths: the surfaces' known places, a sampler's weights against brute force, and runs that are killed."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.worlds import close
from torch import nn

from fdiv.feeds.paths import PathsFeed
from fdiv.methods.paths.log_variance import LogVariance
from fdiv.networks.bias import Unbiased
from fdiv.recipe import load, members
from fdiv.tasks.paths import Paths, Rolled
from fdiv.tasks.paths_measurement import (
    Transitions,
    _log_weights,
    against,
    brute_force,
    occupation,
    of_transitions,
    picture,
    transitions,
)
from fdiv.tasks.surfaces import SURFACES
from fdiv.train import Run, train_member, train_reference

PLACES = {  # (minima, saddles, tops): place, energy
    "double well": (
        [((-math.sqrt(1.25), 0.0), -1 / 12), ((math.sqrt(1.25), 0.0), -1 / 12)],
        [((0.0, 1.0), 1.0), ((0.0, -1.0), 1.0)],
        [((0.0, 0.0), 2.0)],
    ),
    "mueller-brown": (
        [((-0.558224, 1.441726), -146.6995), ((0.623499, 0.028038), -108.1667),
         ((-0.050011, 0.466694), -80.7678)],
        [((-0.822002, 0.624313), -40.6648), ((0.212487, 0.292988), -72.2489)],
        [],
    ),
}  # fmt: skip
HOT = Paths(temperature=0.25, samples=4000, brute=20_000)
STEPS = {"steps": 9, "batch_size": 8, "learning_rate": 0.003, "reuse": 3, "weight_decay": 0.0}
TINY = {
    "name": "tiny-paths",
    "task": "Paths(samples=16, brute=2000, steps=20)",
    "reference": {"label": "unbiased", "model": {"network": "Unbiased()"}},
    "student": {"network": "BiasForce(width=8)"},
    "method": "LogVariance(paths=6, capacity=10, importance=0.5)",
    "baselines": [
        {"label": "batch", "method": 'LogVariance(control="batch", paths=6)'},
        {"label": "none", "method": "LogVariance(control=None, paths=6)"},
    ],
    "train": STEPS | {"log_every": 1, "checkpoint_every": 5},
}


# -- surfaces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SURFACES)
def test_the_force_is_minus_the_gradient(name):
    surface = SURFACES[name]
    x = torch.rand(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    x.requires_grad_()
    (slope,) = torch.autograd.grad(surface.energy(x).sum(), x)
    close(surface.force(x), -slope, 1e-12)


@pytest.mark.parametrize("name", SURFACES)
def test_minima_saddles_and_tops_are_where_they_are_known_to_be(name):
    surface = SURFACES[name]
    for below, places in enumerate(PLACES[name]):  # directions in which the energy falls
        for place, energy in places:
            x = torch.tensor(place, dtype=torch.float64)
            hessian = torch.func.hessian(surface.energy)(x)
            if (name, below) != ("double well", 1):  # whose saddles are flat to second order
                assert int((torch.linalg.eigvalsh(hessian) < 0).sum()) == below
            assert surface.force(x).norm() < 2e-6 * max(1.0, hessian.norm().item())
            assert surface.energy(x).item() == pytest.approx(energy, abs=1e-4)
    starts = [place for place, _ in PLACES[name][0]]
    for end in (surface.start, surface.target):
        assert min(math.dist(end, place) for place in starts) < 1e-6


def test_the_double_wells_saddles_fall_along_a_bend():
    """U(x, 1 + d) = 1 + 4 d^2 + 20/3 x^2 d + 4/3 x^4 + ..., least at d = -5/6 x^2, is 1 - 13/9 x^4 there."""
    x = torch.tensor([1e-2, 2e-2], dtype=torch.float64)
    bend = torch.stack([x, 1 - 5 / 6 * x**2], -1)
    energy = SURFACES["double well"].energy(bend)
    close((energy - 1) / x**4, torch.full_like(x, -13 / 9), 1e-2)
    across = SURFACES["double well"].energy(torch.stack([x, torch.ones_like(x)], -1))
    close((across - 1) / x**4, torch.full_like(x, 4 / 3), 1e-2)


# -- roll-outs ----------------------------------------------------------------------------------------------


class Push(nn.Module):
    def __init__(self, *force: float):
        super().__init__()
        self.force = nn.Parameter(torch.tensor(force))

    def forward(self, x, target, when=None):
        return self.force.expand_as(x)


def test_a_path_is_its_moves_and_its_drift():
    task, generator = Paths(), torch.Generator().manual_seed(1)
    positions, moves = task.rolled(Push(0.3, -0.1), 5, generator)
    assert positions.shape == (5, 201, 2) and moves.shape == (5, 200, 2) and not moves.requires_grad
    drift = task.surface.force(positions[:, :-1]) * task.surface.step_size
    close(positions[:, 1:], positions[:, :-1] + drift + moves, 1e-5)
    spread = (moves - torch.tensor([0.3, -0.1]) * 0.05).std()
    assert spread.item() == pytest.approx(math.sqrt(2 * 8.617e-5 * 1200 * 0.05), rel=0.05)
    hot = task.rolled(Push(0.0, 0.0), 5, torch.Generator().manual_seed(1), heat=4.0).moves
    cold = task.rolled(Push(0.0, 0.0), 5, torch.Generator().manual_seed(1)).moves
    close(hot, 2 * cold, 1e-5)


def test_the_reward_is_that_of_the_nearest_place():
    task, end = Paths(width=0.5), math.sqrt(1.25)
    positions = torch.tensor([[[end, 0.0], [0.0, 0.0], [end - 0.2, 0.1], [end, 0.4]]])
    log_reward, length = task.nearest(positions)  # the start does not count
    close(log_reward, torch.tensor([-(0.04 + 0.01) / 2 / (2 * 0.25)]), 1e-5)
    assert length.tolist() == [2]


def test_a_transition_is_from_the_last_departure_to_the_first_arrival():
    surface = SURFACES["double well"]
    a, b, up = surface.start, surface.target, (0.0, 1.0)
    rows = torch.tensor([[a, up, a, up, b, up, b], [a, up, up, up, up, up, a]])
    found, arrived = transitions(surface, rows)
    assert arrived.tolist() == [True, False]
    assert (found.departure.tolist(), found.arrival.tolist()) == ([2], [4])
    rows = of_transitions(surface, found)
    assert rows["upper channel"].tolist() == [1.0]
    assert rows["top energy"].item() == pytest.approx(1.0, abs=1e-5)
    assert rows["duration"].item() == pytest.approx(0.1)
    spent = occupation(surface, found)
    assert spent.sum() == 1 and spent.max() == pytest.approx(1 / 3)


@pytest.mark.parametrize("force", [(0.25, 0.0), (0.1, 0.3)])
def test_the_weighted_rate_of_any_sampler_is_that_of_brute_force(force):
    """A push that is not the best one; and without weights it is another rate."""
    network = Push(*force)
    rolled = HOT.rolled(network, HOT.samples, torch.Generator().manual_seed(3))
    own, arrived = transitions(HOT.surface, rolled.positions)
    log_weight = _log_weights(HOT, network, rolled, arrived, own.arrival, "cpu")
    found = against(HOT, own, log_weight, brute_force(HOT))
    weights = torch.zeros(HOT.samples).masked_scatter(arrived, log_weight.exp().float())
    p = found["transition probability, brute force"]
    error = math.sqrt(weights.var().item() / HOT.samples + p / HOT.brute)
    assert 0.02 < p < 0.2 and error < 0.15 * p
    assert abs(found["transition probability"] - p) < 4 * error
    assert arrived.float().mean() > 1.5 * p
    assert found["occupation tv, weighted"] < found["occupation tv"] + 0.02


def test_the_picture_shows_transitions_where_they_are_on_the_surface():
    surface, brute = HOT.surface, brute_force(HOT)
    found = picture(surface, Transitions(*(t[:3] for t in brute)), brute)
    assert len(found["paths"]) == 3 and found["paths"] == found["target"][:3]
    path = torch.tensor(found["paths"][0])
    assert math.dist(path[0], surface.start) < surface.radius + 0.3
    assert math.dist(path[-1], surface.target) < surface.radius
    x, y, energy = (torch.tensor(found["surface"][name]) for name in ("x", "y", "energy"))
    row, column = 7, 30  # y is down the rows
    assert energy[row, column].item() == pytest.approx(
        min(surface.energy(torch.stack([x[column], y[row]])).item(), energy.max().item()), abs=0.05
    )


def test_brute_force_is_one_ensemble_and_its_own_sampler_agrees():
    assert brute_force(HOT) is brute_force(Paths(temperature=0.25, samples=4000, brute=20_000))
    network = Unbiased().build(torch.Size([2]), 2)
    rolled = HOT.rolled(network, HOT.samples, torch.Generator().manual_seed(3))
    own, arrived = transitions(HOT.surface, rolled.positions)
    log_weight = _log_weights(HOT, network, rolled, arrived, own.arrival, "cpu")
    assert (log_weight == 0).all()
    found = against(HOT, own, log_weight, brute_force(HOT))
    assert found["effective share"] == pytest.approx(1.0)
    assert abs(found["log10 of rates"]) < 0.15


def test_a_sampler_that_never_arrives_is_measured_too():
    task = Paths(samples=4, brute=50, steps=3)
    rolled = Rolled(*(t.expand(4, -1, 2) for t in (torch.zeros(1, 4, 2), torch.zeros(1, 3, 2))))
    own, arrived = transitions(task.surface, rolled.positions)
    found = against(task, own, torch.zeros(0).double(), brute_force(task))
    assert not arrived.any() and found["transition probability"] == 0 and math.isnan(found["log10 of rates"])


@pytest.mark.parametrize(
    "wrong", [{"potential": "hill"}, {"temperature": 0.0}, {"steps": -1}, {"samples": 1}, {"brute": 0.5}]
)
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Paths(**wrong)


# -- runs ---------------------------------------------------------------------------------------------------


def run_of(folder: Path, **changes) -> Run:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return Run(load(path), 0, folder / "out")


def test_a_killed_run_goes_on_bit_for_bit_with_its_paths(tmp_path):
    whole = run_of(tmp_path)
    train_reference(whole)
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    member = next(m for m in members(whole.recipe) if "capacity" in m.label)
    train_member(whole, member)

    class Killed(Exception):
        pass

    def kill(step, steps, loss):
        if loss is not None and step == 6:  # after a checkpoint at 5, between two roll-outs
            raise Killed

    with pytest.raises(Killed):
        train_member(Run(whole.recipe, 0, tmp_path / "cut", kill), member)
    kept = torch.load(tmp_path / "cut" / "seed-0" / member.slug / "checkpoint" / "state.pt")["memory"]
    assert len(kept["positions"]) == len(kept["weight"]) == 10 and "log_partition" in kept
    cut = Run(whole.recipe, 0, tmp_path / "cut")
    train_member(cut, member)
    one, two = (run.member_folder(member) for run in (whole, cut))
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert (one / "evaluation.json").read_text().split('"seconds"')[0] == (
        two / "evaluation.json"
    ).read_text().split('"seconds"')[0]


def test_part_of_a_batch_is_drawn_by_weight(tmp_path):
    """Two kept paths, one of which has all of the weight."""
    spec, shares = run_of(tmp_path).recipe.train.model_copy(update={"batch_size": 4000}), {}
    for importance in (0.0, 0.5, 1.0):
        feed = PathsFeed.__new__(PathsFeed)
        feed.method, feed.spec = LogVariance(importance=importance), spec
        feed.memory = {"length": torch.zeros(2), "weight": torch.tensor([0.0, 1.0])}
        drawn = feed._index(torch.Generator().manual_seed(0))
        assert len(drawn) == 4000
        shares[importance] = drawn.double().mean().item()
    assert shares[0.0] == pytest.approx(0.5, abs=0.04)
    assert shares[0.5] == pytest.approx(0.75, abs=0.04)
    assert shares[1.0] == 1


def test_every_control_trains_and_is_evaluated(tmp_path):
    run = run_of(tmp_path, train=TINY["train"] | {"validate_every": 5, "validate_on": 4})
    train_reference(run)
    for member in members(run.recipe):
        train_member(run, member)
        found = json.loads((run.member_folder(member) / "evaluation.json").read_text())
        assert found["scalars"].keys() == found["scalar_errors"].keys()
        assert {"hit rate", "rate", "occupation tv"} <= found["scalars"].keys()


def test_what_would_be_ignored_is_refused(tmp_path):
    for change, message in (
        ({"train": TINY["train"] | {"lora": {}}}, "trained whole"),
        (
            {"method": 'LogVariance(control="batch")', "train": TINY["train"] | {"micro_batch": 2}},
            "micro_batch",
        ),
        ({"method": "SquaredError()"}, "consumes examples"),
        ({"method": "LogVariance(importance=0.01)"}, "less than one path of batch_size 8"),
    ):
        run = run_of(tmp_path, baselines=[], **change)
        train_reference(run)
        with pytest.raises(ValueError, match=message):
            train_member(run, members(run.recipe)[0])
    run = run_of(tmp_path, baselines=[], task='Regression("diabetes")', student={"network": "MLP(width=4)"},
                 reference={"label": "r", "model": {"network": "MLP(width=4)"}})  # fmt: skip
    train_reference(Run(run.recipe, 1, run.folder))
    with pytest.raises(ValueError, match="paths"):
        train_member(Run(run.recipe, 1, run.folder), members(run.recipe)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("control", "most", "least"), [("learned", 1.0, 0.95), ("batch", 1.0, 0.95), (None, 0.05, 0.0)]
)
def test_with_a_control_variate_paths_arrive_and_without_one_they_do_not(tmp_path, control, most, least):
    run = run_of(
        tmp_path,
        task="Paths(brute=2000)",
        student={"network": 'BiasForce("potential")'},
        baselines=[],
        method=repr(LogVariance(control=control)),
        train={"steps": 1000, "batch_size": 64, "learning_rate": 0.003, "reuse": 50, "weight_decay": 0.0},
    )
    train_reference(run)
    (member,) = members(run.recipe)
    train_member(run, member)
    found = json.loads((run.member_folder(member) / "evaluation.json").read_text())["scalars"]
    assert least <= found["hit rate"] <= most
