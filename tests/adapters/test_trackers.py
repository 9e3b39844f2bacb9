"""A tracker shows what metrics.jsonl holds, also after a kill. Nothing here leaves the machine."""

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.thinned import thinned

from fdiv.adapters import trackers
from fdiv.adapters.trackers import open_trackers

PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb-offline": "wandb"}
LOSS = {1: 1.0, 3: 0.5, 6: 0.25, 8: 0.125, 9: 0.0625, 12: 0.03125}  # float32 holds them exactly
INSTALL = 'pip install "fdiv[track]"'

# Logs four steps to a tracker, and four to metrics.jsonl, and is killed. No step after 8 is in a checkpoint.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from fdiv.adapters.trackers import open_trackers

name, folder = sys.argv[1], Path(sys.argv[2])
(tracker,) = open_trackers([name], folder, "demo", "seed-0/kl", {"beta": 0.1})
with (folder / "metrics.jsonl").open("w", buffering=1) as log:
    for step, loss in {1: 1.0, 3: 0.5, 6: 0.25, 8: 0.125, 9: 7.0, 11: 7.0}.items():
        log.write(json.dumps({"step": step, "loss": loss}) + "\\n")
        tracker.log(step, {"loss": loss})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No account, no settings of this machine's user, no reports of errors to anybody."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("trackio.utils", "trackio.sqlite_storage"):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "TRACKIO_DIR", tmp_path / "trackio")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    yield
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()


def installed(name: str) -> str:
    package = PACKAGES[name]
    pytest.importorskip(package, reason=f"{package} is not installed: {INSTALL}")
    return name


def log(folder: Path, steps: list[int], tracker=None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": LOSS[step]}) + "\n")
            if tracker:
                tracker.log(step, {"loss": LOSS[step]})


# -- reading back ------------------------------------------------------------------------------------------


def curve(name: str, folder: Path) -> list[tuple[int, float]]:
    """The points that the tracker shows of the run in this folder."""
    return {"tensorboard": from_events, "trackio": from_sqlite, "wandb-offline": from_wandb}[name](folder)


def from_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(point.step, point.value) for point in events.Scalars("loss")]


def from_sqlite(folder):
    run = (folder / "trackio.id").read_text()
    query = "SELECT step, metrics FROM metrics WHERE run_id = ? ORDER BY id"
    rows = sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "demo.db").execute(query, (run,))
    return [(step, json.loads(metrics)["loss"]) for step, metrics in rows]


def from_wandb(folder):
    sys.modules["wandb"].teardown()  # its service writes the file when it ends, after `finish` has returned
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")  # one, or `wandb sync` would send the wrong one too
    rows = [{i.key or ".".join(i.nested_key): i.value_json for i in r.history.item} for r in records(file)]
    return [(int(row["_step"]), float(row["loss"])) for row in rows if "loss" in row]


def records(file: Path):
    """wandb's transaction log: a head of 7 bytes, then protobufs in the framing of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, body = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # what is left of a block holds no header
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from(
            "<IHB", data, at
        )  # checksum; 1: whole, 2: first, 3: middle, 4: last
        body += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(body)
            body = b""


# -- what is shown -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_shows_each_step_once(tmp_path, name):
    (tracker,) = open_trackers([installed(name)], tmp_path / "run", "demo", "seed-0/kl", {"beta": 0.1})
    log(tmp_path / "run", list(LOSS), tracker)
    tracker.close()
    assert curve(name, tmp_path / "run") == list(LOSS.items())


@pytest.mark.parametrize("name", thinned(PACKAGES))
def test_a_run_that_was_killed_and_goes_on_shows_each_step_once(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED, installed(name), str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))  # as train.resume does: the checkpoint is of 8
    time.sleep(1)  # TensorBoard and wandb name their files by the second
    (tracker,) = open_trackers([name], folder, "demo", "seed-0/kl", {"beta": 0.1}, start_step=8)
    log(folder, [9, 12], tracker)
    tracker.close()
    assert curve(name, folder) == list(LOSS.items())


@pytest.mark.parametrize("name", PACKAGES)
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_an_empty_curve(tmp_path, name):
    for last in ([1, 3, 6], [1, 3]):
        (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
        (tracker,) = open_trackers([installed(name)], tmp_path / "run", "demo", "seed-0/kl", {})
        log(tmp_path / "run", last, tracker)
        tracker.close()
    assert curve(name, tmp_path / "run") == [(1, 1.0), (3, 0.5)]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_that_is_added_later_shows_the_steps_before(tmp_path, name):
    log(tmp_path / "run", [1, 3, 6])
    (tracker,) = open_trackers([installed(name)], tmp_path / "run", "demo", "seed-0/kl", {}, start_step=6)
    log(tmp_path / "run", [9], tracker)
    tracker.close()
    assert curve(name, tmp_path / "run") == [(s, LOSS[s]) for s in (1, 3, 6, 9)]


@pytest.mark.parametrize("name", PACKAGES)
def test_runs_of_one_name_in_two_folders_stay_apart(tmp_path, name):
    opened = {}
    for folder in ("a", "b"):
        (opened[folder],) = open_trackers([installed(name)], tmp_path / folder, "demo", "seed-0/kl", {})
        log(tmp_path / folder, [1], opened[folder])
    for tracker in opened.values():
        tracker.close()
    (again,) = open_trackers([name], tmp_path / "b", "demo", "seed-0/kl", {}, start_step=1)
    log(tmp_path / "b", [3], again)
    again.close()
    assert curve(name, tmp_path / "a") == [(1, 1.0)]
    assert curve(name, tmp_path / "b") == [(1, 1.0), (3, 0.5)]


def test_several_trackers_show_the_same(tmp_path):
    names = [installed(name) for name in PACKAGES]
    opened = open_trackers(names, tmp_path / "run", "demo", "seed-0/kl", {"train": {"steps": 12}})
    for step, loss in LOSS.items():
        for tracker in opened:
            tracker.log(step, {"loss": loss, "not a number": float("nan")})
    for tracker in opened:
        tracker.close()
    assert all(curve(name, tmp_path / "run") == list(LOSS.items()) for name in names)


def test_the_config_is_kept_beside_the_curves(tmp_path):
    installed("trackio")
    (tracker,) = open_trackers(["trackio"], tmp_path / "run", "demo", "seed-0/kl", {"train": {"steps": 12}})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    (row,) = sqlite3.connect(tmp_path / "trackio" / "demo.db").execute("SELECT config FROM configs")
    assert json.loads(row[0])["train"] == {"steps": 12}


# -- Weights & Biases online -------------------------------------------------------------------------------


def test_wandb_is_not_sent_the_steps_that_its_server_has(tmp_path, monkeypatch):
    installed("wandb-offline")
    from fdiv.adapters import wandb as adapter

    sent, asked = [], []
    server = SimpleNamespace(
        starting_step=7, log=lambda numbers, step: sent.append((step, numbers["loss"])), finish=lambda: None
    )
    monkeypatch.setattr(adapter.wandb, "login", lambda **options: True)
    monkeypatch.setattr(adapter.wandb, "init", lambda **options: asked.append(options) or server)
    log(tmp_path / "run", [1, 3, 6, 8])
    for _ in range(2):
        (tracker,) = open_trackers(["wandb"], tmp_path / "run", "demo", "seed-0/kl", {}, start_step=8)
    assert asked[0]["mode"] is None and asked[0]["resume"] == "allow"
    assert asked[0]["id"] == asked[1]["id"]
    sent.clear()
    tracker.log(6, {"loss": 0.25})
    tracker.log(9, {"loss": 0.0625})
    assert sent == [(9, 0.0625)]


def test_wandb_adds_what_its_server_lacks_of_the_past(tmp_path, monkeypatch):
    installed("wandb-offline")
    from fdiv.adapters import wandb as adapter

    sent = []
    server = SimpleNamespace(starting_step=4, log=lambda numbers, step: sent.append((step, numbers)))
    monkeypatch.setattr(adapter.wandb, "login", lambda **options: True)
    monkeypatch.setattr(adapter.wandb, "init", lambda **options: server)
    log(tmp_path / "run", [1, 3, 6, 8])
    open_trackers(["wandb"], tmp_path / "run", "demo", "seed-0/kl", {}, start_step=8)
    assert sent == [(6, {"loss": 0.25}), (8, {"loss": 0.125})]


def test_wandb_without_a_key_is_refused_before_anything_is_written(tmp_path):
    installed("wandb-offline")
    with pytest.raises(ValueError, match="write wandb-offline"):
        open_trackers(["wandb"], tmp_path / "run", "demo", "seed-0/kl", {})
    assert not list((tmp_path / "run").iterdir())


def test_wandb_takes_its_mode_from_the_environment(tmp_path, monkeypatch):
    installed("wandb-offline")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tracker,) = open_trackers(["wandb"], tmp_path / "run", "demo", "seed-0/kl", {})
    log(tmp_path / "run", [1], tracker)
    tracker.close()
    assert from_wandb(tmp_path / "run") == [(1, 1.0)]


# -- mistakes ----------------------------------------------------------------------------------------------


def test_an_unknown_tracker_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match=r"no tracker is called 'tensorbord'; did you mean 'tensorboard'\?"):
        open_trackers(["tensorbord"], tmp_path / "run", "demo", "seed-0/kl", {})
    with pytest.raises(ValueError, match="There are tensorboard, trackio, wandb, wandb-offline"):
        open_trackers(["mlflow"], tmp_path / "run", "demo", "seed-0/kl", {})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio"), ("wandb-offline", "wandb")],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # what Python does with None: ImportError
    monkeypatch.delitem(sys.modules, f"fdiv.adapters.{trackers.TRACKERS[name][0]}", raising=False)
    with pytest.raises(ImportError) as error:
        open_trackers([name], tmp_path / "run", "demo", "seed-0/kl", {})
    assert INSTALL in str(error.value)


def test_when_one_tracker_cannot_be_opened_those_before_it_are_closed(tmp_path, monkeypatch):
    closed = []
    first = SimpleNamespace(close=lambda: closed.append("first"))
    openers = {"first": lambda place: first, "second": lambda place: 1 / 0}
    monkeypatch.setattr(trackers, "find_tracker", openers.get)
    with pytest.raises(ZeroDivisionError):
        open_trackers(["first", "second"], tmp_path / "run", "demo", "seed-0/kl", {})
    assert closed == ["first"]
