"""From a recipe to a report, at the smallest size."""

import json
import shutil
from math import isfinite
from pathlib import Path

import pytest
import torch
import yaml
from tests.thinned import thinned
from transformers import LlamaConfig, LlamaForCausalLM

from fdiv import FDPO, GKD, JS, KL, SFT, TV, ReverseKL
from fdiv.adapters.lora import adapted
from fdiv.adapters.transformers import CausalLM
from fdiv.compare import compare
from fdiv.feeds import Tokens
from fdiv.parallel import Spread, World
from fdiv.recipe import LoraSpec, RecipeError, load, measures, members, normalised
from fdiv.tasks.grammar import Grammar
from fdiv.teachers._signal import TeacherError
from fdiv.train import Run, learning_rate, train_member, train_reference, whole

DEMO = Path(__file__).parents[1] / "recipes" / "demo"
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
    "adaptive teacher": ("TAID()", {"hidden_size": 8, "heads": 2}),
    "replay": (
        "DistiLLM(sampler=AdaptiveReplay(start=0.9, step=0, capacity=12), estimator=FusedLinear())",
        {"hidden_size": 8, "heads": 2},
    ),
    "contrast": ("DistiLLM2(reference_steps=5)", {"hidden_size": 8, "heads": 2}),
    "pass rates": ("PACED()", {"hidden_size": 8, "heads": 2}),
    "a teacher that follows": ("SDPO(estimator=TopK(3, 'student'))", "reference"),
    "labels": ("SFT()", {"hidden_size": 8, "heads": 2}),
    "prefer": ("FDPO()", "reference"),
    "reinforce": ("GRPO()", "reference"),
    "reinforce exact": ("GRPO(divergence=KL(), estimator=Exact())", "reference"),
}


FRESH = (
    "KD()",
    "KD(estimator=FusedLinear())",
    "KD(estimator=FusedAtoms(TopK(3)))",
    "SeqKD()",
    "MiniLLM()",
    "SequenceFDistill(divergence=JS(0.5), mixture='posterior')",
    "DistiLLM(divergence=SkewReverseKL(0.1))",
    "ABKD()",
    "AMiD()",
    "AKL()",
    "BDKD()",
    "OnPolicyDistillation(discount=1.0)",
    "OnPolicyDistillation(estimator=MonteCarlo('behaviour'))",
    "TIP()",
    "TIP(estimator=FusedLinear())",
    "GKD(lmbda=1.0, temperature=2.0)",
    "GKD(estimator=SampledLogits(4, 'teacher'))",
    "GKD(estimator=FusedAtoms(SampledLogits(4, 'teacher')))",
)


@pytest.mark.parametrize("method", thinned(FRESH, 2))
def test_every_method_trains_and_reports_finite_numbers(tmp_path, method):
    log, _ = trained(tmp_path / "run", method=method, steps=3, validate_every=3, validate_on=6)
    assert all(isfinite(value) for row in log for value in row.values())
    assert log[-1]["grad_norm"] > 0


@pytest.mark.parametrize("name", thinned(METHODS))
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
    return folder, recipe, compare([recipe], folder / "runs")


def test_compare_runs_every_member_and_seed(finished):
    _, _, (chapters, failures) = finished
    assert failures == []
    found = sorted(str(p.parent.relative_to(chapters[0])) for p in chapters[0].glob("*/*/evaluation.json"))
    names = ("hard-labels", "js-0.3", "kl", "teacher")
    assert found == [f"seed-{s}/{name}" for s in (0, 1) for name in names]


@pytest.mark.slow
def test_two_jobs_train_what_one_does(tmp_path, finished):
    _, recipe, (one, _) = finished
    two, failures = compare([recipe], tmp_path / "runs", jobs=2)
    assert failures == []
    logs = [{p.relative_to(c): p.read_text() for p in c.glob("*/*/metrics.jsonl")} for c in (one[0], two[0])]
    assert len(logs[0]) == 8 and logs[0] == logs[1]


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


# -- the loop ----------------------------------------------------------------------------------------------


def trained(folder: Path, **train) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Log and weights of one run of GKD under these training settings."""
    method = train.pop("method", "GKD(divergence=JS(0.3))")
    changes = {"method": method, "divergences": [], "train": TINY["train"] | train}
    folder.mkdir()
    recipe = load(write(folder, **changes))
    run, member = Run(recipe, 0, folder / "run"), members(recipe)[0]
    train_reference(run)
    train_member(run, member)
    log = (run.member_folder(member) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in log], weights(run.member_folder(member))


def same(one, two, tolerance=2e-5):
    for a, b in zip(one[0], two[0], strict=True):
        assert b == {name: pytest.approx(value, rel=tolerance, abs=1e-7) for name, value in a.items()}
    for name, weight in one[1].items():
        torch.testing.assert_close(two[1][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", thinned(["GKD(estimator=FusedLinear())", "GKD(lmbda=0.5)", "SFT()"]))
def test_the_split_into_micro_batches_changes_nothing(tmp_path, method):
    whole = trained(tmp_path / "whole", method=method, validate_every=6)
    for size in (1, 3):
        same(whole, trained(tmp_path / f"{size}", method=method, validate_every=6, micro_batch=size))


def test_recomputed_activations_change_nothing(tmp_path):
    same(trained(tmp_path / "kept"), trained(tmp_path / "recomputed", gradient_checkpointing=True))


@pytest.mark.parametrize("precision", thinned(["float32", "bfloat16"]))
@pytest.mark.parametrize("estimator", ["Exact()", "FusedLinear()", "FusedAtoms(TopK(3))"])
def test_asking_the_teacher_once_or_at_each_step_changes_nothing(tmp_path, estimator, precision):
    train = {"method": f"KD(estimator={estimator})", "precision": precision, "validate_every": 6}
    once, each = (trained(tmp_path / when, signal=when, **train) for when in ("auto", "each step"))
    same(once, each)


def test_low_rank_adapters_train_little_and_are_merged_into_the_saved_model(tmp_path):
    start = trained(tmp_path / "start", lora={"rank": 2}, learning_rate=1e-12, weight_decay=0)[1]
    log, weights = trained(tmp_path / "lora", lora={"rank": 2}, steps=40)
    assert log[-1]["loss"] < log[0]["loss"]
    assert weights.keys() == start.keys()  # a plain transformers model
    changed = {name for name in start if not torch.allclose(start[name], weights[name], atol=1e-7)}
    assert changed and all("proj" in name for name in changed)  # embeddings, norms and head are frozen


def test_the_loss_on_other_text_is_logged_and_finite(tmp_path):
    log, _ = trained(tmp_path / "run", validate_every=5)
    assert [row["step"] for row in log if "validation loss" in row] == [5, 10]


def test_low_rank_adapters_start_from_the_seed_whatever_was_drawn_before():
    starts = []
    for drawn, seed in ((0, 3), (1, 3), (1, 4)):
        model = CausalLM.fresh(5, 8, 1, 2, 0)
        torch.manual_seed(drawn)
        starts.append(adapted(model, LoraSpec(rank=2), seed).state_dict())
    one, two, other = ([t for name, t in start.items() if "lora_A" in name] for start in starts)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_published_reference_is_trained_as_it_is_meant_to_be(tmp_path, monkeypatch):
    """from_pretrained gives a model for evaluation: no dropout, and no activation is recomputed."""
    seen = []
    monkeypatch.setattr(Tokens, "loss", lambda self, model, *_: seen.append(model.model.training) or 1 / 0)
    folder = tmp_path / "published"
    CausalLM.fresh(5, 8, 1, 2, 0).save(folder)
    monkeypatch.setattr(Grammar, "load", lambda self, spec, seed: CausalLM.load(folder))
    with pytest.raises(ZeroDivisionError):
        train_reference(Run(load(write(tmp_path)), 0, tmp_path / "run"))
    assert seen == [True]


def test_a_run_killed_while_it_swaps_checkpoints_can_write_the_next_one(tmp_path, monkeypatch):
    """Between the new one's taking its place and the old one's removal."""
    removed = shutil.rmtree

    def killed(folder, **options):
        if Path(folder).name == "checkpoint.old" and (Path(folder) / "state.pt").exists():
            raise KeyboardInterrupt
        removed(folder, **options)

    plain = trained(tmp_path / "whole", checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("fdiv.train.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "halves", checkpoint_every=2)
    recipe = load(tmp_path / "halves" / "tiny.yaml")
    run, member = Run(recipe, 0, tmp_path / "halves" / "run"), members(recipe)[0]
    folder = run.member_folder(member)
    assert (folder / "checkpoint").exists() and (folder / "checkpoint.old").exists()
    train_member(run, member)
    assert all(weight.equal(plain[1][name]) for name, weight in weights(folder).items())
    assert not list(folder.glob("checkpoint*"))


def test_a_run_killed_while_it_is_evaluated_does_not_train_anew(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    recipe, steps = load(write(tmp_path)), []
    member = members(recipe)[0]
    train_reference(Run(recipe, 0, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Grammar, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            train_member(Run(recipe, 0, tmp_path), member)
    train_member(Run(recipe, 0, tmp_path, lambda step, *_: steps.append(step)), member)
    assert min(steps) > 8  # the last checkpoint's


def test_a_gathered_model_keeps_tied_weights_and_where_its_answers_end(tmp_path):
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    network = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    network.generation_config.eos_token_id = [2, 5]
    spread = Spread(network, "fsdp", World(device="cpu"))
    spread.sharded = True
    spread.everything = lambda: {name: t.clone() for name, t in network.state_dict().items()}
    found = whole(CausalLM(network), spread, None, load(write(tmp_path)).train)
    assert found.model is not network
    assert found.ends == (2, 5)
    assert found.parameters == CausalLM(network).parameters
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight


def test_each_process_has_a_gpu_of_its_own_by_whatever_name(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert World.join("cuda").device == "cuda:3"
    assert World.join("cuda:1").device == "cuda:1"


@pytest.mark.parametrize("missing", ["data", "train"])
def test_a_reference_that_is_half_told_how_to_train_is_refused(tmp_path, missing):
    half = {key: value for key, value in TINY["reference"].items() if key != missing}
    with pytest.raises(RecipeError, match="give both or neither"):
        load(write(tmp_path, reference=half))


def test_processes_of_torchrun_do_not_start_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "join", lambda *_: World(size=2))
    with pytest.raises(RecipeError, match="leave out --jobs"):
        compare([write(tmp_path)], tmp_path / "runs", jobs=2)


REFUSED = {
    "a batch of groups": ("GRPO()", {"batch_size": 12}, "no whole number of groups"),
    "no loss on other text": ("GRPO()", {"validate_every": 4}, "leave out validate_every"),
    "a batch of pairs of answers": ("DistiLLM2()", {"batch_size": 5}, "is odd"),
    "nothing to follow": ("DistiLLM()", {}, "write validate_every"),
    "a teacher asked once that moves": ("SDPO()", {"signal": "once"}, "write signal: auto"),
    "text of unknown probability": ("SDPO(sampler=AdaptiveReplay(step=0))", {}, "which is not kept"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_ignored_is_refused_before_training(tmp_path, case):
    method, train, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        trained(tmp_path / "run", method=method, **train)
    assert [p.parent.name for p in tmp_path.glob("run/run/seed-0/*/metrics.jsonl")] == ["teacher"]


@pytest.mark.parametrize("method", ["GRPO()", "FDPO()", "SDPO(estimator=TopK(3, 'student'))"])
def test_a_source_that_is_not_asked_is_refused(tmp_path, method):
    reference = TINY["reference"] | {"source": "Cached('nowhere')"}
    recipe = load(write(tmp_path, method=method, divergences=[], student="reference", reference=reference))
    run = Run(recipe, 0, tmp_path / "run")
    train_reference(run)
    with pytest.raises(TeacherError, match="asks the reference model itself"):
        train_member(run, members(recipe)[0])


def test_a_batch_that_processes_cannot_share_evenly_is_refused():
    assert [World(rank, 2, "cpu").share(4) for rank in range(2)] == [slice(0, 2), slice(2, 4)]
    with pytest.raises(ValueError, match="3 sequences cannot be shared evenly by 2 processes"):
        World(0, 2, "cpu").share(3)


def test_a_key_that_is_missing_is_named_without_repeating_the_recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({("methd" if k == "method" else k): v for k, v in TINY.items()}))
    with pytest.raises(RecipeError, match="key 'method' is missing; unknown key 'methd'") as error:
        load(path)
    assert len(str(error.value)) < 200 + len(str(path))
