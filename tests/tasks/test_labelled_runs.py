"""Runs of a regression and of a clustering: methods of whole batches, of ensembles, and one with a table."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fdiv.recipe import load, members
from fdiv.train import Run, train_member, train_reference

STEPS = {"steps": 24, "batch_size": 30, "learning_rate": 0.01, "log_every": 4, "checkpoint_every": 5}
SQUARES = {
    "name": "tiny-regression",
    "task": 'Regression("diabetes", members=8)',
    "reference": {"model": {"network": "MLP(width=8)"}, "data": "truth", "train": STEPS},
    "student": {"network": "Latent(width=8, layers=1, latent=2)"},
    "method": "CRPSKL(members=4)",
    "baselines": [
        {"label": "squares", "method": "SquaredError()"},
        {"label": "bottleneck", "method": "CSIB()"},
    ],
    "train": STEPS,
}
GROUPS = {
    "name": "tiny-clustering",
    "task": 'Clustering("iris", restarts=2)',
    "reference": {
        "model": {"network": "Autoencoder(width=8, layers=1, latent=3)"},
        "data": "truth",
        "train": STEPS | {"steps": 100},
    },
    "student": "reference",
    "method": "DEPICT(warmup=0.3, restarts=2)",
    "train": STEPS,
}


def run_of(folder: Path, recipe: dict, **changes) -> Run:
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return Run(load(path), 0, folder / "out")


def evaluation(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())["scalars"]


def test_a_regression_trains_by_squares_by_kernels_and_by_ensembles(tmp_path):
    run = run_of(tmp_path, SQUARES)
    train_reference(run)
    assert "spread" not in evaluation(run.reference_folder)
    for member in members(run.recipe):
        train_member(run, member)
        found = evaluation(run.member_folder(member))
        assert found["rmse"] < 1.5
        assert {"crps", "spread", "coverage"} <= found.keys()


def test_a_kernel_method_is_refused_micro_batches(tmp_path):
    run = run_of(tmp_path, SQUARES, train=STEPS | {"micro_batch": 10})
    train_reference(run)
    with pytest.raises(ValueError, match="whole batch"):
        train_member(run, next(m for m in members(run.recipe) if m.label == "bottleneck"))


def test_a_clustering_that_was_killed_goes_on_with_its_table(tmp_path):
    whole = run_of(tmp_path, GROUPS)
    cut = Run(whole.recipe, 0, tmp_path / "cut")
    (member,) = members(whole.recipe)

    class Killed(Exception):
        pass

    def kill(step, steps, loss):
        if loss is not None and step == 16:
            raise Killed

    train_reference(whole)
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    train_member(whole, member)
    with pytest.raises(Killed):
        train_member(Run(whole.recipe, 0, tmp_path / "cut", kill), member)
    train_member(cut, member)
    one, two = (run.member_folder(member) for run in (whole, cut))
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert all(torch.equal(left[name], right[name]) for name in left)
    found = evaluation(one)
    assert found["nmi"] > 0.2
    assert (
        evaluation(whole.reference_folder)["accuracy"]
        == evaluation(whole.reference_folder)["features accuracy"]
    )
