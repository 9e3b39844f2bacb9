"""A comparison on a Ray cluster is the comparison on this machine: here the cluster is two CPUs of it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fdiv import compare as comparison
from fdiv.compare import Job, compare

INSTALL = 'pip install "fdiv[ray]"'
TINY = {
    "name": "tiny",
    "task": "Grammar(symbols=4, successors=2, length=2, questions=6, trained_on=5)",
    "reference": {
        "model": {"hidden_size": 8, "heads": 2},
        "data": "truth",
        "train": {"steps": 5, "batch_size": 8, "examples": 32},
    },
    "student": {"hidden_size": 8, "heads": 2},
    "method": "GKD()",
    "divergences": ["KL()", "JS(0.3)"],
    "train": {"steps": 12, "batch_size": 8, "examples": 32, "log_every": 3, "checkpoint_every": 4},
}

# A run's process is killed in its sixth step under this method, once.
FALLS = """
import os, signal
from dataclasses import dataclass
from pathlib import Path

from fdiv import GKD

FALLEN, STEPS = Path(__file__).with_name("fallen"), Path(__file__).with_name("steps")

@dataclass(frozen=True)
class Falls(GKD):
    def __call__(self, **evidence):
        with STEPS.open("a") as file:
            file.write(".")
        if STEPS.stat().st_size == 6 and not FALLEN.exists():
            FALLEN.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(**evidence)

@dataclass(frozen=True)
class Raises(GKD):
    def __call__(self, **evidence):
        raise ArithmeticError("on purpose")
"""


def write(folder: Path, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    (folder / "falls.py").write_text(FALLS)
    return path


def files(folder: Path) -> dict[str, bytes]:
    """Weights and logs of all runs."""
    found = [*folder.glob("*/*/metrics.jsonl"), *folder.glob("*/*/model/*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_without_ray_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "fdiv.adapters.ray", raising=False)
    from fdiv.cli import _cluster

    with pytest.raises(ImportError) as error:
        _cluster(None)
    assert INSTALL in str(error.value)


# -- on a cluster ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason=f"Ray is not installed: {INSTALL}")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else Ray reports to its makers that it is used
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def cluster(ray):
    from fdiv.adapters.ray import Cluster

    return Cluster


@pytest.mark.slow
def test_weights_and_logs_are_those_of_one_process_byte_for_byte(tmp_path, cluster, monkeypatch):
    recipe, shown = write(tmp_path, seeds=[0, 1]), []
    monkeypatch.setattr(comparison.Board, "show", lambda board, news: shown.append(news))
    monkeypatch.chdir(tmp_path)
    one, _ = compare([recipe], Path("one"))
    shown.clear()
    many, failures = compare([recipe], Path("many"), pool=cluster())  # relative, unlike the nodes' folder
    assert failures == []
    assert files(many[0]) == files(one[0])
    assert len(files(one[0])) == 2 * 2 * 3  # seeds, log and weights, reference and two members
    ends = {name: loss for name, step, steps, loss in shown if step == steps == 12}
    last = json.loads((many[0] / "seed-1/kl/metrics.jsonl").read_text().splitlines()[-1])
    assert ends["tiny, seed 1: KL()"] == last["loss"]


@pytest.mark.slow
def test_a_member_whose_worker_is_killed_goes_on_from_its_checkpoint(tmp_path, cluster):
    recipe = write(tmp_path, plugins=["falls.py"], method="Falls()", divergences=["KL()"])
    fallen, steps, runs = tmp_path / "fallen", tmp_path / "steps", {}
    for name in ("killed", "whole"):
        steps.write_text("")
        (runs[name],), failures = compare([recipe], tmp_path / name, pool=cluster())
        assert failures == []
        assert fallen.exists()
        # The checkpoint is of step 4, so the fifth and sixth are taken twice.
        assert steps.stat().st_size == {"killed": 6 + 8, "whole": 12}[name]
    assert files(runs["killed"]) == files(runs["whole"])
    log = (runs["killed"] / "seed-0/kl/metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 3, 6, 9, 12]


@pytest.mark.slow
def test_a_member_that_fails_is_named_with_its_reason_and_the_others_are_kept(tmp_path, cluster):
    wrong = {"label": "wrong", "method": "Raises()"}
    recipe = write(tmp_path, plugins=["falls.py"], baselines=[wrong], divergences=["KL()"])
    chapters, failures = compare([recipe], tmp_path / "runs", pool=cluster())
    assert failures == ["tiny, seed 0: wrong: on purpose"]
    assert (chapters[0] / "seed-0/kl/evaluation.json").exists()


@pytest.mark.slow
def test_a_job_that_ends_its_worker_each_time_is_given_up(tmp_path, cluster):
    def dies(job, tell):
        with (job.folder / "tries").open("a") as file:
            file.write(".")
        os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "recipe.yaml").touch()
    with cluster() as pool:
        pool.start(dies, Job(write(tmp_path), (), tmp_path, 0, None))
        while not (ended := pool.done()):
            pass
    assert "worker died" in str(ended[0][1])
    assert (tmp_path / "tries").stat().st_size == 4


@pytest.mark.slow
def test_no_more_jobs_are_at_work_than_were_asked_for(tmp_path, cluster):
    def clocked(job, tell):
        began = time.time()
        time.sleep(0.5)
        tell((began, time.time()))

    (tmp_path / "recipe.yaml").touch()
    jobs = [Job(write(tmp_path), (), tmp_path, seed, None) for seed in range(3)]
    ended, spans = [], []
    with cluster(jobs=1) as pool:
        for job in jobs:
            pool.start(clocked, job)
        while len(ended) < 3:
            ended += pool.done()
            spans += pool.news()
    assert [job for job, _ in ended] == jobs
    assert spans == sorted(spans)
    assert all(one[1] <= next_[0] for one, next_ in itertools.pairwise(spans))


@pytest.mark.slow
def test_a_folder_that_a_node_does_not_see_is_named(tmp_path, cluster):
    job = Job(write(tmp_path), (), tmp_path / "elsewhere", 0, None)
    with cluster() as pool:
        pool.start(comparison.work, job)
        while not (ended := pool.done()):
            pass
    assert "give an --out that all nodes see" in str(ended[0][1])


@pytest.mark.slow
def test_a_job_takes_its_threads_and_a_gpu_where_it_can_use_one(tmp_path, ray, monkeypatch, capsys):
    from fdiv.adapters.ray import needs

    def job(device):
        recipe = write(tmp_path, train=TINY["train"] | {"device": device, "threads": 2})
        return Job(recipe, (), tmp_path, 0, "KL()")

    assert needs(job("auto")) == {"num_cpus": 2, "num_gpus": 0}
    assert capsys.readouterr().err == ""
    assert needs(job("cuda")) == {"num_cpus": 2, "num_gpus": 1}
    assert "waits for a node" in capsys.readouterr().err
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2, "GPU": 1})
    assert needs(job("auto")) == {"num_cpus": 2, "num_gpus": 1}
    assert needs(job("cpu")) == {"num_cpus": 2, "num_gpus": 0}


@pytest.mark.slow
def test_ctrl_c_ends_what_is_at_work_and_says_how_to_go_on(tmp_path, ray):
    write(tmp_path, divergences=["KL()", "JS(0.3)"])
    command = [sys.executable, "-m", "fdiv", "compare", "tiny.yaml", "--on", "ray"]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen(
        [*command, "--set", "train.steps=100000"],
        cwd=tmp_path,
        env=os.environ | address,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        log = tmp_path / "runs/compare/tiny/seed-0/kl/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert log.exists()
        assert ray.available_resources().get("CPU", 0) < 2
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in " ".join(said.split())
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2
