"""Training a student whose tokenizer is not its teacher's."""

import json

import pytest
import yaml
from tests.teachers.tiny_tokenizers import CORPUS, byte_level, sentencepiece

from fdiv.adapters.transformers import CausalLM
from fdiv.recipe import load, members
from fdiv.teachers._signal import TeacherError
from fdiv.train import Run, train_member, train_reference

TRAIN = {"steps": 8, "batch_size": 4, "examples": 8, "learning_rate": 0.01, "log_every": 4}
METHODS = ("ULD()", "GOLD()", "GOLD(sampler=Mix(0.5))", "DSKD()")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A text, a byte-level teacher and a sentencepiece student, on disk."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text("\n".join(CORPUS[:2] * 20))
    for name, tokenizer, width, seed in (
        ("teacher", byte_level(90), 24, 0),
        ("student", sentencepiece(), 16, 1),
    ):
        model = CausalLM.fresh(len(tokenizer), width, 1, 2, seed)
        CausalLM(model.model, None, tokenizer).save(folder / name)
    return folder


def recipe(world, tmp_path, method, **changes):
    told = {
        "name": "two",
        "task": f"Corpus(source='{world}/text.txt', block=16, vocabulary='full', continuations=4)",
        "reference": {"model": {"path": f"{world}/teacher"}},
        "student": {"path": f"{world}/student"},
        "method": method,
        "measure": ["KL()"],
        "train": TRAIN | changes,
    }
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(told))
    return load(path)


def trained(world, tmp_path, method, **changes):
    loaded = recipe(world, tmp_path, method, **changes)
    run, member = Run(loaded, 0, tmp_path / "run"), members(loaded)[0]
    train_reference(run)
    train_member(run, member)
    folder = run.member_folder(member)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return log, json.loads((folder / "evaluation.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_a_student_learns_from_a_teacher_with_another_tokenizer(world, tmp_path, method):
    log, result = trained(world, tmp_path, method, validate_every=8, validate_on=4)
    assert log[-1]["loss"] < log[0]["loss"]
    assert result["scalars"]["perplexity"] > 1
    assert not result["divergences"]  # of two vocabularies there is none to measure


@pytest.mark.parametrize("method", ["GOLD(sampler=Mix(0.5))", "DSKD()"])
def test_micro_batches_change_nothing(world, tmp_path, method):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, split = (
        trained(world, tmp_path / name, method, **more)[0]
        for name, more in (("a", {}), ("b", {"micro_batch": 1}))
    )
    for one, two in zip(whole, split, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_method_for_one_vocabulary_refuses_two(world, tmp_path):
    with pytest.raises(TeacherError, match="ULD, GOLD, DSKD"):
        trained(world, tmp_path, "GKD()")
