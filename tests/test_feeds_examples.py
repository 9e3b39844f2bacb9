"""Training on inputs with labels: what methods are handed over, in which order, and what is refused."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from fdiv import GKD, GRPO, KD, KL, SFT, TAID, Out, TopK
from fdiv.adapters.classifier import Classifier
from fdiv.compare import compare
from fdiv.feeds import Counts, feed_of
from fdiv.feeds.examples import Batch, Examples
from fdiv.feeds.reading import Reading
from fdiv.methods._method import READABLE_IN_EXAMPLES
from fdiv.networks.all import MLP
from fdiv.parallel import World
from fdiv.recipe import LoraSpec, ModelSpec, TrainSpec, load, members
from fdiv.tasks.classification import Classification
from fdiv.tasks.grammar import Grammar
from fdiv.tasks.regression import Regression
from fdiv.train import Run, train_member, train_reference

TASK, SHAPE = Classification("wine"), torch.Size([13])
OF_TEXT_ALONE = ("q_hidden", "q_weight", "p_weight")
SPEC = TrainSpec(steps=12, batch_size=16, learning_rate=0.01, log_every=1, checkpoint_every=4)


def network(seed: int, outputs: int = 3) -> Classifier:
    return Classifier.fresh(MLP(width=6), SHAPE, outputs, seed)


def feed(method, spec: TrainSpec = SPEC, world: World | None = None, reference=None) -> Examples:
    other: Any = reference or network(1)
    made = feed_of(method, TASK)(method, TASK, other, spec, 0, world or World(device="cpu"))
    assert isinstance(made, Examples)
    return made


@dataclass(frozen=True)
class Ask:
    """Returns nothing but what it was given."""

    consumes: ClassVar[str] = "examples"
    divergence: KL = field(default_factory=KL)
    reads: tuple[str, ...] = ()

    def __call__(self, **given):
        ASKED.append(given)
        return Out(torch.zeros((), requires_grad=True), {})


ASKED: list[dict] = []


def asked(feed: Examples, model: Classifier, step: int = 0) -> dict:
    ASKED.clear()
    feed.attend(model)
    (part,) = feed.parts(model, step)
    feed.loss(model, part, part.counts)
    return ASKED[0]


def test_everything_on_the_menu_is_handed_over_in_the_shape_that_it_states():
    names = [n for row in READABLE_IN_EXAMPLES for n in row.split(", ") if n not in OF_TEXT_ALONE]
    given = asked(feed(Ask(reads=tuple(names))), network(0))
    assert given.keys() == {*names, "count"} and given["count"] == 16
    shapes = {"logits": (16, 3), "labels": (16,), "inputs": (16, 13), "features": (16, 6), "log_prior": (3,)}
    shapes |= {"p_logits": (16, 3), "p_features": (16, 6), "index": (16,), "targets": (16,)}
    assert {name: tuple(given[name].shape) for name in shapes} == shapes
    assert [tuple(s.shape) for s in given["stages"]] == [(16, 6)] * 2
    torch.testing.assert_close(given["network"](given["inputs"]), given["logits"])
    torch.testing.assert_close(given["p_network"](given["inputs"]), given["p_logits"])
    assert given["logits"].requires_grad and given["features"].requires_grad
    assert not given["p_logits"].requires_grad and not given["p_stages"][0].requires_grad


def test_every_example_comes_once_an_epoch_in_another_order_each_time():
    own, model = feed(Ask()), network(0)
    size = len(own.data.inputs)  # 133: epochs do not end with a batch
    steps = range(3 * size // 16 + 1)
    index = torch.cat([own.parts(model, step)[0].index for step in steps])
    epochs = index[: 3 * size].split(size)
    assert all(torch.equal(epoch.sort().values, torch.arange(size)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    (part,) = own.parts(model, 1)
    torch.testing.assert_close(part.data.inputs, own.data.inputs[part.index])


@pytest.mark.parametrize(
    "method", [SFT(), KD(temperature=2.0), GKD(), TAID()], ids=lambda m: type(m).__name__
)
def test_the_split_into_micro_batches_and_processes_changes_nothing(method):
    def gradient(spec: TrainSpec, worlds: list[World]) -> torch.Tensor:
        model = network(0)
        for world in worlds:
            own = feed(method, spec, world)
            own.attend(model)
            for part in own.parts(model, 3):
                own.loss(model, part, Counts(16.0, 16.0, 0.0, 0.0)).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.model.parameters() if p.grad is not None])

    whole = gradient(SPEC, [World(device="cpu")])
    micro = SPEC.model_copy(update={"micro_batch": 3})
    torch.testing.assert_close(gradient(micro, [World(device="cpu")]), whole)
    torch.testing.assert_close(gradient(SPEC, [World(0, 2, "cpu"), World(1, 2, "cpu")]), whole)


def test_distillation_is_that_of_rows_and_the_plain_loss_is_cross_entropy():
    model, reference = network(0), network(1)
    own = feed(KD(temperature=3.0, weight=0.7), reference=reference)
    (part,) = own.parts(model, 0)
    z, t = model.model(part.data.inputs), reference.model(part.data.inputs)
    soft = nn.functional.kl_div((z / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="batchmean")
    hard = nn.functional.cross_entropy(z, part.data.labels)
    torch.testing.assert_close(own.loss(model, part, part.counts).loss, 0.3 * hard + 0.7 * 9 * soft)
    torch.testing.assert_close(feed(SFT()).loss(model, part, part.counts).loss, hard)


@dataclass(frozen=True)
class Counting:
    """Keeps how often each example was seen, and a module beside the student."""

    consumes: ClassVar[str] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "index", "memory", "module", "features", "p_logits")
    teaches: ClassVar[str] = "both"
    divergence: KL = field(default_factory=KL)

    def initial_memory(self, data, reference):
        assert isinstance(reference, nn.Module)
        return {"seen": torch.zeros(len(data.inputs), dtype=torch.long)}

    def module(self, shapes):
        return nn.Linear(shapes.width, shapes.classes)

    def remember(self, memory, index, **rest):
        memory["seen"][index] += 1

    def __call__(self, *, logits, features, module, p_logits, index, memory, count):
        both = (logits + module(features) - p_logits).square().sum() / count
        return Out(both, {"seen": memory["seen"].float().mean()})


def test_a_method_has_its_tables_its_module_and_its_teacher_trained():
    model, reference, before = network(0), network(1), network(1).fingerprint()
    own = feed(Counting(), reference=reference)
    beside = own.attend(model)
    assert (
        beside is not None and sum(p.numel() for p in beside.parameters()) == reference.parameters + 6 * 3 + 3
    )
    for step in range(2):
        (part,) = own.parts(model, step)
        out = own.loss(model, part, part.counts)
        out.loss.backward()
        own.after_step(model, {}, 0.0)
        assert out.metrics["seen"].item() == pytest.approx(step * 16 / len(own.data.inputs))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in beside.parameters())
    assert own.memory["seen"].sum() == 32 and own.memory["seen"].max() == 1
    assert reference.fingerprint() == before  # the reference itself stays


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: feed(GRPO()), "consumes rollouts"),
        (lambda: feed(GKD(estimator=TopK(2))), r"write Exact\(\)"),
        (lambda: feed(Ask(reads=("q_hidden",))), "reads q_hidden, which inputs with labels do not have"),
        (lambda: feed(Ask(), SPEC.model_copy(update={"lora": LoraSpec()})), "trained whole"),
        (lambda: feed(Ask(), SPEC.model_copy(update={"batch_size": 500})), "500 is more than the 133"),
        (lambda: feed(Ask(), SPEC.model_copy(update={"reuse": 2})), "train.reuse"),
        (lambda: feed(Counting(), world=World(0, 2, "cpu")), "one process"),
        (lambda: feed(Counting(), SPEC.model_copy(update={"validate_every": 2})), "held-out ones have none"),
        (lambda: feed(Ask()).attend(network(0, outputs=4)), "4 outputs and the reference 3"),
        (lambda: Classification("wine").load(ModelSpec(hidden_size=4), 0), "read by a network"),
    ],
)
def test_what_would_be_ignored_or_wrong_is_refused_in_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("method", [SFT(), KD()])
def test_numbers_are_no_classes(method):
    task, model = Regression(), Classifier.fresh(MLP(width=6), torch.Size([10]), 1, 0)
    other: Any = Classifier.fresh(MLP(width=6), torch.Size([10]), 1, 1)
    made: Any = feed_of(method, task)(method, task, other, SPEC, 0, World(device="cpu"))
    made.attend(model)
    (part,) = made.parts(model, 0)
    with pytest.raises(ValueError, match="learns classes, and this task has numbers to be predicted"):
        made.loss(model, part, part.counts)


def test_a_loss_of_a_whole_batch_is_not_split():
    class Whole(Ask):
        unit: ClassVar[str] = "batch"

    with pytest.raises(ValueError, match="whole batch"):
        feed(Whole(), SPEC.model_copy(update={"micro_batch": 4}))
    assert feed(Whole(), SPEC.model_copy(update={"micro_batch": 16}))


def test_text_is_fed_as_before_whatever_the_method():
    assert feed_of(KD(), Grammar()).__name__ == "Responses" and feed_of(KD(), TASK) is Examples


def test_names_that_methods_may_read_are_those_that_a_reading_has():
    names = {n for row in READABLE_IN_EXAMPLES for n in row.split(", ") if n not in OF_TEXT_ALONE}
    own = {n for n in vars(Reading) if not n.startswith("_")}
    assert names <= own


# -- runs -------------------------------------------------------------------------------------------------

RECIPE = {
    "name": "tiny",
    "task": 'Classification("wine")',
    "reference": {
        "model": {"network": "MLP(width=16)"},
        "data": "truth",
        "train": {"steps": 30, "batch_size": 32, "learning_rate": 0.01},
    },
    "student": {"network": "MLP(width=8, dropout=0.2)"},
    "method": "KD(temperature=2.0)",
    "divergences": ["KL()", "JS()"],
    "baselines": [{"label": "labels", "method": "SFT()"}],
    "train": {"steps": 24, "batch_size": 32, "learning_rate": 0.01, "log_every": 4, "checkpoint_every": 5},
}


def write(folder: Path, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return path


def test_a_comparison_trains_reports_and_keeps_networks_that_load(tmp_path):
    folders, failures = compare([write(tmp_path)], tmp_path / "out")
    assert not failures
    results = {
        json.loads(path.read_text())["label"]: json.loads(path.read_text())
        for path in folders[0].glob("seed-0/*/evaluation.json")
    }
    assert results.keys() == {"teacher", "KL()", "JS()", "labels"}
    assert all(r["scalars"]["accuracy"] > 0.6 for r in results.values())
    assert results["KL()"]["parameters"] == network_parameters(13, 8, 3)
    found = Classifier.load(folders[0] / "seed-0" / "kl" / "model")
    again = TASK.evaluate(found, None, {}, 0)
    assert again["scalars"]["accuracy"] == results["KL()"]["scalars"]["accuracy"]


def network_parameters(inputs: int, width: int, outputs: int) -> int:
    return (inputs + 1) * width + (width + 1) * width + (width + 1) * outputs


# A critic beside the student, and steps that leave the student alone.
TURNS = """
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar
from fdiv import KL, Out

@dataclass(frozen=True)
class Turns:
    consumes: ClassVar[str] = "examples"
    alternating: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("inputs", "network", "module", "step")
    divergence: KL = KL()

    def beside(self, network, p_network):
        return deepcopy(network)

    def __call__(self, *, inputs, network, module, step, count):
        target = module(inputs)
        loss = (target - 1).square().mean()
        if step % 3 == 2:
            loss = loss + (network(inputs) - target.detach()).square().mean()
        return Out(loss, {})
"""


def test_what_gets_no_gradient_is_not_moved():
    namespace: dict[str, Any] = {}
    exec(TURNS, namespace)
    made, model = feed(namespace["Turns"]()), network(0)
    beside = made.attend(model)
    assert beside is not None
    optimizer = torch.optim.AdamW([*model.model.parameters(), *beside.parameters()])
    moved = []
    for step in range(6):
        before = [p.clone() for p in model.model.parameters()]
        (part,) = made.parts(model, step)
        made.loss(model, part, part.counts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(
            any(not torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True))
        )
    assert moved == [False, False, True, False, False, True]


@pytest.mark.parametrize("method", ["TAID()", "Turns()"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, method):
    (tmp_path / "turns.py").write_text(TURNS)
    train = RECIPE["train"] | {"average": 0.9}
    recipe = load(write(tmp_path, method=method, divergences=[], plugins=["turns.py"], train=train))
    member = next(m for m in members(recipe) if m.label != "labels")

    class Killed(Exception):
        pass

    def kill(step, steps, loss):
        if loss is not None and step == 16:
            raise Killed

    whole, cut = (Run(recipe, 0, tmp_path / name) for name in ("whole", "cut"))
    train_reference(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    train_member(whole, member)
    with pytest.raises(Killed):
        train_member(Run(recipe, 0, tmp_path / "cut", kill), member)
    assert (cut.member_folder(member) / "checkpoint").exists()
    train_member(cut, member)
    one, two = (run.member_folder(member) for run in (whole, cut))
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_students_network_may_be_a_plugins_and_start_from_the_reference(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom fdiv.networks.mlp import MLP\n"
        "@dataclass(frozen=True)\nclass Narrow(MLP):\n    width: int = 4\n"
    )
    model = {"reference": RECIPE["reference"] | {"model": {"network": "Narrow()"}}, "student": "reference"}
    recipe = load(write(tmp_path, plugins=["mine.py"], **model))
    run = Run(recipe, 0, tmp_path / "out")
    train_reference(run)
    for member in members(recipe):
        train_member(run, member)
    assert json.loads((run.reference_folder / "model" / "network.json").read_text())["network"].startswith(
        "Narrow"
    )


def test_a_network_that_is_misspelt_is_refused_when_the_recipe_is_read(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'MLP'"):
        load(write(tmp_path, student={"network": "MLPP(width=3)"}))


def test_a_batch_counts_its_examples():
    data = TASK.held_out(None)
    batch = Batch(data, torch.arange(len(data.labels)))
    assert batch.counts.tokens == len(data.labels) == sum(part.counts.tokens for part in batch.split(7))
