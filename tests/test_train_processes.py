"""One run in several processes, and one that is killed: the numbers are those of an uninterrupted process."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.test_train import TINY

TRAIN = TINY["train"] | {"validate_every": 6, "validate_on": 16}
FUSED = {"method": "GKD(divergence=JS(0.3), estimator=FusedLinear(), lmbda=0.5)", "divergences": []}


def write(folder: Path, **train) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | FUSED | {"train": TRAIN | train}))
    return path


def command(recipe: Path, out: Path, processes: int, *options: str) -> list[str]:
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m", "fdiv"]
    words = [sys.executable, "-m", *(launcher if processes > 1 else ["fdiv"])]
    words += ["train", str(recipe), "--out", str(out)]
    for option in options:
        words += ["--set", option]
    return words


def run(*args) -> None:
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def member(out: Path) -> Path:
    (found,) = [p.parent for p in out.glob("tiny/seed-0/*/metrics.jsonl") if p.parent.name != "teacher"]
    return found


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (member(out) / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(member(out) / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run(write(folder), folder / "out", 1)
    return folder / "out"


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_the_weights_of_one(tmp_path, alone, how):
    """Half of the steps are on text that the student writes; each process writes its share of it."""
    run(write(tmp_path), tmp_path / "out", 2, f"train.parallel={how}", "train.micro_batch=2")
    for one, two in zip(lines(alone), lines(tmp_path / "out"), strict=True):
        assert two == {name: pytest.approx(value, rel=2e-5, abs=1e-7) for name, value in one.items()}
    one, two = weights(alone), weights(tmp_path / "out")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_rollouts_that_two_sharded_processes_write_train_the_weights_of_one(tmp_path):
    """They are scored when they are written, used twice, and three answers are rehearsed beside them."""
    method = "DPH(rehearsal=Rehearsal(tries=4, threshold=0.5, batch=3))"
    changes = {"method": method, "student": "reference", "divergences": []}
    train = TINY["train"] | {"group_size": 4, "reuse": 2, "learning_rate": 0.001}
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY | changes | {"train": train}))
    run(recipe, tmp_path / "one", 1)
    run(recipe, tmp_path / "two", 2, "train.parallel=fsdp", "train.micro_batch=2")
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert two == {name: pytest.approx(value, rel=1e-3, abs=1e-6) for name, value in one.items()}


@pytest.mark.slow
def test_adapters_of_a_sharded_model_train_as_those_of_one_process(tmp_path):
    recipe, lora = write(tmp_path), "train.lora={rank: 2}"
    run(recipe, tmp_path / "one", 1, lora)
    sharded = ("train.parallel=fsdp", "train.gradient_checkpointing=true", "train.micro_batch=2")
    run(recipe, tmp_path / "two", 2, lora, *sharded)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_killed_at_once_goes_on_as_if_nothing_had_happened(tmp_path, alone):
    recipe, out = write(tmp_path), tmp_path / "out"
    process = subprocess.Popen(command(recipe, out, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("tiny/seed-0/*/checkpoint")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (member(out) / "evaluation.json").exists()
    run(recipe, out, 1)
    assert lines(out) == lines(alone)
    one, two = weights(alone), weights(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    recipe = write(tmp_path, batch_size=7)
    done = subprocess.run(command(recipe, tmp_path / "out", 2), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "7 sequences cannot be shared evenly by 2 processes" in done.stderr + done.stdout


@pytest.mark.slow
def test_critics_and_student_take_turns_in_two_processes(tmp_path):
    """Each process draws noise of its own; a step that leaves the student alone must not wait for it."""
    net = {"network": "Denoiser(width=8, sigma_data=1.42)"}
    few = {"steps": 6, "batch_size": 8, "examples": 64, "log_every": 1}
    recipe = tmp_path / "tiny.yaml"
    changes = {"task": 'Points("ring", samples=256)', "divergences": [], "train": few}
    changes |= {"reference": {"model": net, "data": "truth", "train": few}, "student": "reference"}
    method = "FDistill(ReverseKL(), every=2, gan=0.01, critic=Critic(sigma_data=1.42))"
    recipe.write_text(yaml.safe_dump(TINY | changes | {"method": method}))
    run(recipe, tmp_path / "out", 2)
    log = lines(tmp_path / "out")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert ["gan_loss" in row for row in log] == [False, True] * 3
