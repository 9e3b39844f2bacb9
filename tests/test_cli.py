"""What a user sees in the terminal."""

import signal
import subprocess
import sys
import time

import pytest
import yaml
from tests.test_train import TINY

from fdiv.cli import main


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command in this process and a folder of its own: (code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["fdiv", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, " ".join(out.split()), " ".join(err.split())

    return call


def test_list_shows_each_divergence_with_its_character(here):
    code, out, _ = here("list")
    assert code == 0
    assert "ReverseKL()" in out
    assert "mode-seeking" in out


def test_train_ends_with_a_table_and_the_path_of_the_report(tmp_path, here):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    code, out, err = here("train", "tiny.yaml", "--out", "runs")
    assert code == 0, err
    assert "report.html" in out
    assert (tmp_path / "runs" / "report.html").exists()
    assert [p.name for p in (tmp_path / "runs" / "tiny" / "seed-0").iterdir() if p.name != "teacher"] == [
        "kl"
    ]
    code, _, err = here("report", "runs", "--out", "again.html")
    assert code == 0, err
    assert (tmp_path / "again.html").exists()


def test_a_run_that_fails_is_named_and_ends_with_a_code_of_its_own(tmp_path, here):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    code, out, err = here("train", "tiny.yaml", "--out", "runs", "--set", "train.learning_rate=1e30")
    assert code == 1
    assert "failed: tiny, seed 0: KL()" in err
    assert "not finished: KL(), seed 0" in out


def test_ctrl_c_says_how_to_go_on(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-m", "fdiv", "train", "tiny.yaml", "--set", "train.steps=100000"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test run in the background of a script was itself told to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        log = tmp_path / "runs" / "train" / "tiny" / "seed-0" / "kl" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in " ".join(said.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "tiny.yaml", "--set", "train.step=3"], "did you mean 'steps'"),
        (["compare", "none.yaml"], "no recipe at none.yaml"),
        (["compare", "tiny.yaml", "--set", "train.steps"], "key=value"),
        (["report", "."], "a chapter folder holds a recipe.json"),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(tmp_path, here, arguments, said):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    code, _, err = here(*arguments)
    assert code == 2
    assert said in err
