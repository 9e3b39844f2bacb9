"""From a recipe to a report, at the smallest size."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from fdiv import FDPO, GKD, JS, KL, SFT, TV, ReverseKL
from fdiv.adapters.transformers import CausalLM
from fdiv.compare import compare
from fdiv.recipe import RecipeError, load, measures, members, normalised
from fdiv.train import Run, learning_rate, train_member, train_reference

DEMO = Path(__file__).parents[1] / "recipes" / "demo"
TINY = {
    "name": "tiny",
    "task": "Grammar(symbols=4, successors=2, length=2, prompts=6, trained_on=5)",
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


def write(folder: Path, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return CausalLM.load(folder / "model").model.state_dict()


# -- recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.yaml")), ids=lambda p: p.stem)
def test_each_demo_recipe_is_valid_and_names_its_members_once(path):
    recipe = load(path)
    labels = [m.label for m in members(recipe)]
    assert len(set(labels)) == len(labels) > 3


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_claims_of_a_demo_recipe_name_members_of_it(path):
    recipe = load(path)
    known = {recipe.reference.label, *(m.label for m in members(recipe))}
    for claim in recipe.report.expect:
        assert claim["left"][0] in known
        assert not isinstance(claim["right"], list) or claim["right"][0] in known


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(RecipeError, match=r"unknown key 'train.step'; did you mean 'steps'\?"):
        load(write(tmp_path), {"train.step": "3"})


def test_an_unknown_divergence_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'ReverseKL'"):
        load(write(tmp_path, divergences=["ReversKL()"]))


def test_a_wrong_value_is_refused_with_what_was_got(tmp_path):
    with pytest.raises(RecipeError, match=r"train.steps: .*got -3"):
        load(write(tmp_path), {"train.steps": "-3"})


def test_a_combination_that_cannot_work_is_refused_before_training(tmp_path):
    with pytest.raises(RecipeError, match="FDPO cannot use TV"):
        load(write(tmp_path, method="FDPO()", divergences=["TV()"]))


def test_a_missing_recipe_and_a_recipe_that_is_no_mapping_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(RecipeError, match="a mapping of keys is expected"):
        load(tmp_path / "list.yaml")


def test_overrides_reach_nested_keys(tmp_path):
    assert load(write(tmp_path), {"train.learning_rate": "0.5"}).train.learning_rate == 0.5


def test_members_are_baselines_and_the_method_under_each_divergence(tmp_path):
    recipe = load(write(tmp_path, baselines=[{"label": "hard labels", "method": "SFT()"}]))
    rows = members(recipe)
    assert [m.label for m in rows] == ["hard labels", "KL()", "JS(0.3)"]
    assert rows[0].method == SFT()
    assert rows[1].method == GKD(divergence=KL())
    assert rows[2].divergence == JS(0.3)


def test_divergences_are_divided_by_their_curvature_unless_told_otherwise(tmp_path):
    assert normalised(JS(0.5)).curvature_at_one == pytest.approx(1)
    assert normalised(KL()) == KL()
    assert normalised(TV()) == TV()  # a kink has no curvature to divide by
    recipe = load(write(tmp_path, normalise=False))
    assert members(recipe)[1].method.divergence == JS(0.3)


def test_a_sweep_varies_a_field_for_every_divergence(tmp_path):
    sweep = {"field": "beta", "values": [0.1, 1.0]}
    recipe = load(write(tmp_path, method="FDPO()", divergences=["ReverseKL()", "KL()"], sweep=sweep))
    rows = members(recipe)
    assert [m.label for m in rows][:2] == ["ReverseKL(), beta 0.1", "ReverseKL(), beta 1"]
    assert rows[1].method == FDPO(divergence=ReverseKL(), beta=1.0)
    assert rows[3].group == "KL()"


def test_the_matrix_measures_what_was_trained_unless_told_otherwise(tmp_path):
    assert list(measures(load(write(tmp_path)))) == ["KL()", "JS(0.3)"]
    assert list(measures(load(write(tmp_path, measure=["TV()"])))) == ["TV()"]


def test_a_plugin_file_beside_the_recipe_brings_its_names(tmp_path):
    shutil.copy(DEMO / "k3_in_loss.py", tmp_path)
    changes = {"plugins": ["k3_in_loss.py"], "method": "GRPO(estimator=K3InLoss())"}
    assert "K3InLoss" in repr(members(load(write(tmp_path, **changes)))[0].method)


# -- training ----------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_to_nothing(tmp_path):
    spec = load(write(tmp_path), {"train.warmup": "4", "train.steps": "100"}).train
    assert learning_rate(spec, 0) == pytest.approx(spec.learning_rate / 4)
    assert learning_rate(spec, 4) == pytest.approx(spec.learning_rate)
    assert learning_rate(spec, 99) < 0.01 * spec.learning_rate


METHODS = {
    "distil": ("GKD(divergence=JS(0.3))", {"hidden_size": 8, "heads": 2}),
    "distil on-policy": ("GKD(lmbda=0.5)", {"hidden_size": 8, "heads": 2}),
    "distil fused": ("GKD(estimator=FusedLinear())", {"hidden_size": 8, "heads": 2}),
    "labels": ("SFT()", {"hidden_size": 8, "heads": 2}),
    "prefer": ("FDPO()", "reference"),
    "reinforce": ("GRPO()", "reference"),
    "reinforce exact": ("GRPO(divergence=KL(), estimator=Exact())", "reference"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, name):
    method, student = METHODS[name]
    recipe = load(write(tmp_path, method=method, divergences=[], student=student))
    member = members(recipe)[0]

    def killed(step, steps, loss):
        if step > 6:
            raise KeyboardInterrupt

    whole, halves = Run(recipe, 0, tmp_path / "whole"), Run(recipe, 0, tmp_path / "halves", killed)
    for run in (whole, halves):
        train_reference(Run(recipe, 0, run.folder))
    train_member(whole, member)
    with pytest.raises(KeyboardInterrupt):
        train_member(halves, member)
    assert not (halves.member_folder(member) / "evaluation.json").exists()
    train_member(Run(recipe, 0, halves.folder), member)

    a, b = (weights(run.member_folder(member)) for run in (whole, halves))
    assert all(torch.equal(a[key], b[key]) for key in a)
    logs = [(run.member_folder(member) / "metrics.jsonl").read_text() for run in (whole, halves)]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [1, 3, 6, 9, 12]


def test_a_gradient_that_is_not_finite_stops_the_run_and_says_where(tmp_path):
    recipe = load(write(tmp_path), {"train.learning_rate": "1e30"})
    run = Run(recipe, 0, tmp_path / "run")
    train_reference(run)
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        train_member(run, members(recipe)[0])


def test_distillation_brings_the_student_nearer_to_its_teacher(tmp_path):
    changes = {"train": TINY["train"] | {"steps": 60, "batch_size": 32, "examples": 256}}
    recipe = load(write(tmp_path, divergences=["KL()"], **changes))
    run = Run(recipe, 0, tmp_path / "run")
    train_reference(run)
    train_member(run, members(recipe)[0])
    lines = [json.loads(x) for x in (run.folder / "seed-0/kl/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    recipe = write(folder, seeds=[0, 1], baselines=[{"label": "hard labels", "method": "SFT()"}])
    return folder, recipe, compare([recipe], folder / "runs", jobs=2)


def test_compare_runs_every_member_and_seed(finished):
    _, _, (chapters, failures) = finished
    assert failures == []
    found = sorted(str(p.parent.relative_to(chapters[0])) for p in chapters[0].glob("*/*/evaluation.json"))
    names = ("hard-labels", "js-0.3", "kl", "teacher")
    assert found == [f"seed-{s}/{name}" for s in (0, 1) for name in names]


def test_a_trained_member_is_a_transformers_model(finished):
    _, _, (chapters, _) = finished
    folder = chapters[0] / "seed-1" / "kl" / "model"
    assert (folder / "model.safetensors").exists()
    assert CausalLM.load(folder).parameters > 0


def test_compare_does_not_train_what_is_finished(finished):
    folder, recipe, (chapters, _) = finished
    before = {p: p.stat().st_mtime_ns for p in chapters[0].glob("*/*/model/*")}
    compare([recipe], folder / "runs")
    assert before == {p: p.stat().st_mtime_ns for p in chapters[0].glob("*/*/model/*")}


def test_compare_refuses_a_folder_that_holds_another_recipe(finished):
    folder, recipe, _ = finished
    with pytest.raises(FileExistsError, match="another version of this recipe"):
        compare([recipe], folder / "runs", overrides={"train.steps": "13"})


def test_a_member_that_fails_is_reported_and_the_others_are_kept(tmp_path):
    recipe = write(tmp_path, baselines=[{"label": "stops", "method": "GRPO(clip=0.5)"}], student="reference")
    chapters, failures = compare([recipe], tmp_path / "runs", overrides={"train.group_size": "16"})
    assert len(failures) == 1
    assert "stops" in failures[0]
    assert (chapters[0] / "seed-0" / "kl" / "evaluation.json").exists()
