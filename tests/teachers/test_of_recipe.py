"""`fdiv cache`: what a recipe's teacher says about its text, kept for its training."""

import json
import sys

import pytest
import yaml
from tests.test_train import TINY

from fdiv import FusedAtoms, FusedLinear, SampledLogits, TopK
from fdiv.cli import main
from fdiv.compare import compare
from fdiv.recipe import RecipeError
from fdiv.teachers._signal import TeacherError
from fdiv.teachers.cache import Cached
from fdiv.teachers.of_recipe import Kept, written

RECIPE = TINY | {"method": "GKD(estimator=FusedAtoms(TopK(3)))", "divergences": ["KL()"]}


def recipe(folder, **changes):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return path


def cached(tmp_path, path, kept=None, **overrides):
    return written(path, tmp_path / "cache", tmp_path / "runs", kept or Kept(), overrides)


def losses(folder):
    lines = (folder / "tiny" / "seed-0" / "kl" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "loss" in k} for line in lines]


def test_training_from_a_cache_has_the_losses_of_training_from_the_teacher(tmp_path):
    train = TINY["train"] | {"validate_every": 6, "validate_on": 16}
    path = recipe(tmp_path, train=train)
    reference = TINY["reference"] | {"source": f"Cached({str(tmp_path / 'cache')!r})"}
    (tmp_path / "second").mkdir()
    second = recipe(tmp_path / "second", train=train, reference=reference)
    cached(tmp_path, second)
    _, failures = compare([second], tmp_path / "runs")
    assert not failures
    compare([path], tmp_path / "local")
    assert losses(tmp_path / "runs") == losses(tmp_path / "local")
    assert any("validation loss" in line for line in losses(tmp_path / "runs"))


def test_each_teacher_has_a_folder_and_the_same_command_asks_nothing_again(tmp_path):
    path = recipe(tmp_path, seeds=[0, 1])
    first = cached(tmp_path, path)
    assert len(first) == 2
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("shard*")}
    assert [manifest.shards for _, manifest in cached(tmp_path, path)] == [m.shards for _, m in first]
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("shard*")}


@pytest.mark.parametrize(
    ("kept", "estimator"),
    [
        (Kept(), FusedAtoms(TopK(3))),
        (Kept(k=4), FusedAtoms(TopK(4))),
        (Kept(samples=7), FusedAtoms(SampledLogits(7, "teacher"))),
        (Kept(hidden=True), FusedLinear()),
    ],
    ids=repr,
)
def test_what_is_kept_can_be_chosen(tmp_path, kept, estimator):
    ((folder, manifest),) = cached(tmp_path, recipe(tmp_path), kept)
    assert manifest.tokens > 0
    Cached(str(folder)).open(estimator, 1.0, None)


def test_the_signal_is_made_at_the_temperature_of_the_method(tmp_path):
    path = recipe(tmp_path, method="GKD(estimator=FusedAtoms(TopK(3)), temperature=2.0)")
    ((folder, _),) = cached(tmp_path, path)
    Cached(str(folder)).open(FusedAtoms(TopK(3)), 2.0, None)
    with pytest.raises(TeacherError, match="made at temperature 2"):
        Cached(str(folder)).open(FusedAtoms(TopK(3)), 1.0, None)


@pytest.mark.parametrize(
    ("method", "kept", "said"),
    [
        ("GKD()", Kept(), r"write estimator=FusedAtoms\(TopK\(64\)\).*--k 64"),
        ("GKD()", Kept(k=3, samples=3), "one of --k, --samples and --hidden"),
        ("FDPO()", Kept(k=3), "asks no teacher about text"),
        ("GKD(lmbda=0.5)", Kept(k=3), "write lmbda=0"),
        ("OPSD()", Kept(k=3), r"source: Local\(\)"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_trained(tmp_path, method, kept, said):
    with pytest.raises(RecipeError, match=said):
        cached(tmp_path, recipe(tmp_path, method=method), kept)
    assert not (tmp_path / "runs").exists()


def test_the_command_says_tokens_and_sizes_and_answers_a_mistake_in_a_sentence(tmp_path, monkeypatch, capsys):
    def fdiv(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["fdiv", "cache", str(recipe(tmp_path)), "--out", "cache", *arguments]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, " ".join(said.out.split()), " ".join(said.err.split())

    monkeypatch.chdir(tmp_path)
    code, out, _ = fdiv()
    assert code == 0
    assert "tokens" in out and "bytes a token" in out
    code, _, error = fdiv("--half")
    assert code == 2
    assert "another signal" in error and "Traceback" not in error
