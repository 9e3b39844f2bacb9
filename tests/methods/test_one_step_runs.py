"""One-step students trained by the trainer itself: critics beside them, turns, a killed run, samples."""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fdiv.recipe import load, members
from fdiv.train import Run, train_member, train_reference

RECIPE = {
    "name": "tiny",
    "task": 'Points("ring", samples=256)',
    "reference": {
        "model": {"network": "Denoiser(width=16, blocks=1, sigma_data=1.4)"},
        "data": "truth",
        "train": {"steps": 10, "batch_size": 32, "learning_rate": 0.01},
    },
    "student": "reference",
    "divergences": [],
    "train": {
        "steps": 10, "batch_size": 32, "learning_rate": 0.001, "betas": [0.0, 0.999], "log_every": 1,
        "checkpoint_every": 4, "average": 0.9,
    },
}  # fmt: skip
METHODS = {
    "FDistill": "FDistill(JS(0.5), every=2, gan=0.01, bins=4, bin_rate=0.5, levels=Karras(0.05, 5.0))",
    "UniInstruct": "UniInstruct(KL(), every=2, gan=0.01, bins=4, critic=Critic(features='own'))",
    "SiD": "SiD(every=2)",
    "SIM": "SIM(huber=0.1, every=2)",
    "RCM": "RCM(warmup=3, every=2, sigma_data=1.4, levels=LogNormal(0.0, 1.6), dmd_levels=LogLogistic(7.0))",
}


class Killed(Exception):
    pass


def kill(step, steps, loss):
    if loss is not None and step == 7:
        raise Killed


def recipe(folder, method, **changes):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"method": method} | changes))
    return load(path)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, method):
    read = recipe(tmp_path, method)
    (member,) = members(read)
    whole, cut = (Run(read, 0, tmp_path / name) for name in ("whole", "cut"))
    train_reference(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    train_member(whole, member)
    with pytest.raises(Killed):
        train_member(Run(read, 0, tmp_path / "cut", kill), member)
    assert (cut.member_folder(member) / "checkpoint").exists()
    train_member(cut, member)
    one, two = (run.member_folder(member) for run in (whole, cut))
    log = (one / "metrics.jsonl").read_text()
    assert log == (two / "metrics.jsonl").read_text()
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    start = load_file(whole.reference_folder / "model" / "model.safetensors")
    assert any(not torch.equal(left[name], start[name]) for name in left)
    assert all(math.isfinite(json.loads(line)["loss"]) for line in log.splitlines())
    # Samples of the evaluation are the method's: one call of the network each, RCM's four.
    calls = json.loads((one / "evaluation.json").read_text())["scalars"]["network calls"]
    assert calls == (4 if method.startswith("RCM") else 1)


def test_a_gaussian_that_is_to_be_a_mixture_is_trained_by_laws_that_are_known(tmp_path):
    method = (
        "FDistill(ReverseKL(), every=1, gan=0.0, levels=Karras(0.01, 0.03), weight='score', critic=Known())"
    )
    changes = {
        "task": 'Points("two modes", samples=256)',
        "reference": {"model": {"network": "ClosedForm()"}},
        "student": {"network": "Affine(mean=2.0, scale=0.5)"},
        "train": {"steps": 120, "batch_size": 64, "learning_rate": 0.05, "weight_decay": 0.0, "clip": 10.0},
    }
    read = recipe(tmp_path, method, **changes)
    (member,) = members(read)
    run = Run(read, 0, tmp_path / "out")
    train_reference(run)
    train_member(run, member)
    found = load_file(run.member_folder(member) / "model" / "model.safetensors")
    assert found["mean"].item() == pytest.approx(3.0, abs=0.15)  # the nearer mode
    assert found["log_scale"].exp().item() == pytest.approx(0.6, abs=0.15)


def test_a_batch_is_not_split_where_ratios_are_normalised_over_it(tmp_path):
    read = recipe(tmp_path, METHODS["FDistill"], train=RECIPE["train"] | {"micro_batch": 8})
    (member,) = members(read)
    run = Run(read, 0, tmp_path / "out")
    train_reference(run)
    with pytest.raises(ValueError, match="whole batch"):
        train_member(run, member)
