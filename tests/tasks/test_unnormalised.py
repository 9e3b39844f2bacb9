"""Unnormalised models: normalisers and divergences by quadrature, and runs of all three methods."""

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

from fdiv import JS, KL
from fdiv.adapters.classifier import Classifier
from fdiv.diffusion.mixture import Mixture
from fdiv.recipe import load, members
from fdiv.tasks.unnormalised import LAWS, Unnormalised
from fdiv.train import Run, train_member, train_reference

STEPS = {
    "steps": 9,
    "batch_size": 16,
    "learning_rate": 0.003,
    "examples": 64,
    "log_every": 1,
    "checkpoint_every": 5,
}
TINY = {
    "name": "tiny-energies",
    "task": "Unnormalised()",
    "reference": {"label": "noise", "model": {"network": "EnergyMLP(width=8)"}},
    "student": {"network": "EnergyMLP(width=8)"},
    "method": "FEBM(chains=8)",
    "divergences": ["KL()", "JS(0.5)"],
    "baselines": [
        {"label": "NCE", "method": "NCE(ratio=2)"},
        {"label": "MECO", "method": "MECO(samples=16)"},
        {"label": "MECO, average", "method": 'MECO(estimator="average", samples=16)'},
    ],
    "train": STEPS,
}


class OfLaw(nn.Module):
    """The energy of a law, up to a constant."""

    def __init__(self, law: Mixture, constant: float):
        super().__init__()
        self.law, self.constant = law, nn.Parameter(torch.tensor(constant, dtype=torch.float64))

    def forward(self, x):
        return (self.constant - self.law.log_prob(x)).unsqueeze(-1)


def evaluated(task, law, constant, **measures):
    model = Classifier(OfLaw(law, constant), None, torch.Size([law.dim]), 1)  # type: ignore[arg-type]
    return task.evaluate(model, None, measures, 0)


@pytest.mark.parametrize("law", LAWS)
def test_of_the_law_itself_every_divergence_is_0_and_log_z_is_the_constant(law):
    task = Unnormalised(law)
    found = evaluated(task, task.mixture, 1.7, js=JS(0.5))
    assert abs(found["scalars"]["log Z"] + 1.7) < 2e-6
    assert abs(found["scalars"]["kl"]) < 1e-6 and found["scalars"]["mode error"] < 1e-9
    assert abs(found["divergences"]["js"]) < 1e-9


def test_between_gaussians_they_are_closed_forms():
    """KL(N(0, 1), N(1, 2^2)) = log 2 + (1 + 1)/8 - 1/2."""
    task = Unnormalised(Mixture(((0.0,),), (1.0,), (1.0,)), reach=25.0)
    found = evaluated(task, Mixture(((1.0,),), (2.0,), (1.0,)), -300.0, kl=KL())
    assert found["scalars"]["kl"] == pytest.approx(math.log(2) - 0.25, abs=1e-8)
    assert found["divergences"]["kl"] == pytest.approx(math.log(2) - 0.25, abs=1e-8)
    assert found["scalars"]["reverse kl"] == pytest.approx(-math.log(2) + 5 / 2 - 0.5, abs=1e-8)
    assert found["scalars"]["log Z"] == pytest.approx(300.0, abs=1e-8)


def test_a_mode_that_is_half_as_heavy_is_an_error_of_log_2():
    task = Unnormalised(Mixture(((-3.0,), (3.0,)), (0.5, 0.5), (0.5, 0.5)))
    found = evaluated(task, Mixture(((-3.0,), (3.0,)), (0.5, 0.5), (0.25, 0.75)), 0.0)
    assert found["scalars"]["mode error"] == pytest.approx(math.log(2), abs=1e-3)


def test_data_are_draws_of_the_law_and_held_out_ones_are_others():
    task = Unnormalised("ring")
    some = task.examples(None, 4000, torch.Generator().manual_seed(0)).inputs
    assert some.shape == (4000, 2) and some.dtype == torch.float32
    close(some.norm(dim=1).mean(), torch.tensor(2.0), 0.03)
    assert not torch.equal(task.held_out(None).inputs[:64], some[:64])
    with pytest.raises(ValueError, match="law"):
        Unnormalised("torus")
    with pytest.raises(ValueError, match="one or two dimensions"):
        Unnormalised(Mixture(((0.0, 0.0, 0.0),), (1.0,), (1.0,)))
    with pytest.raises(ValueError, match="reach"):
        Unnormalised(reach=0.0)


def run_of(folder: Path, **changes) -> Run:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return Run(load(path), 0, folder / "out")


class Killed(Exception):
    pass


def kill(step, steps, loss):
    if loss is not None and step == 6:
        raise Killed


def test_all_three_train_and_a_killed_run_goes_on_bit_for_bit(tmp_path):
    whole = run_of(tmp_path)
    train_reference(whole)
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    cut = Run(whole.recipe, 0, tmp_path / "cut")
    for member in members(whole.recipe):
        train_member(whole, member)
        with pytest.raises(Killed):
            train_member(Run(whole.recipe, 0, tmp_path / "cut", kill), member)
        train_member(cut, member)
        one, two = (run.member_folder(member) for run in (whole, cut))
        assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
        left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
        assert all(torch.equal(left[name], right[name]) for name in left)
        found = json.loads((one / "evaluation.json").read_text())
        assert found["exact"] and math.isfinite(found["scalars"]["kl"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["NCE()", "MECO()", "FEBM(chains=256)", "FEBM(JS(0.5), chains=256)"])
def test_each_learns_two_modes(tmp_path, method):
    run = run_of(
        tmp_path, method=method, divergences=[], baselines=[], normalise=False,
        student={"network": "EnergyMLP()"}, train={"steps": 600, "batch_size": 256, "learning_rate": 0.005},
    )  # fmt: skip
    train_reference(run)
    (member,) = members(run.recipe)
    train_member(run, member)
    found = json.loads((run.member_folder(member) / "evaluation.json").read_text())["scalars"]
    assert found["kl"] < 0.03 and found["mode error"] < 0.2
