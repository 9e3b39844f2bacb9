"""Inputs with classes: where they come from, what is done to them, and how a classifier is measured."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics

from fdiv import KL
from fdiv.adapters.classifier import Classifier
from fdiv.methods.robust.attacks import Attack
from fdiv.networks.all import MLP
from fdiv.tasks.classification import Classification
from fdiv.tasks.labelled import Labelled, loaded
from fdiv.tasks.labelled_measurement import classified, g_mean, macro_f1, under_attack
from fdiv.tasks.shifts import shifted

NEW = torch.Generator


def students(task: Classification) -> Labelled:
    return task.examples(None, 10**6, NEW())


@pytest.mark.parametrize(
    ("source", "shape", "classes"),
    [("digits", (1, 8, 8), 10), ("breast_cancer", (30,), 2), ("wine", (13,), 3), ("mnist1d", (1, 40), 10)],
)
def test_shipped_data_keep_every_class_on_both_sides(source, shape, classes):
    task = Classification(source)
    training, test = students(task), task.held_out(None)
    assert tuple(training.inputs.shape[1:]) == shape and task.classes == classes
    assert set(training.labels.tolist()) == set(test.labels.tolist()) == set(range(classes))
    whole = loaded(source, None, numeric=False)
    assert len(training.inputs) + len(test.inputs) == len(whole.inputs)
    share = len(test.inputs) / len(whole.inputs)
    assert share == pytest.approx(0.25, abs=0.01)


def test_rows_of_numbers_are_standardised_by_the_training_side_alone():
    training, test = students(Classification("wine")), Classification("wine").held_out(None)
    torch.testing.assert_close(training.inputs.mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(training.inputs.std(0), torch.ones(13), atol=1e-5, rtol=0)
    assert test.inputs.mean(0).abs().max() > 1e-3
    assert students(Classification("wine", standardise=False)).inputs.max() > 100


@pytest.mark.parametrize("noise", ["uniform", "pairs"])
def test_the_share_of_wrong_labels_is_what_is_said_and_only_the_student_sees_them(noise):
    task = Classification("digits", label_noise=0.4, noise=noise)
    right, seen = task.examples("truth", 10**6, NEW()), students(task)
    wrong = right.labels != seen.labels
    assert wrong.float().mean().item() == pytest.approx(0.4, abs=0.04)  # 3 sigma of 1347
    assert torch.equal(right.inputs, seen.inputs)
    steps = (seen.labels - right.labels)[wrong] % 10
    assert set(steps.tolist()) == ({1} if noise == "pairs" else set(range(1, 10)))
    assert torch.equal(task.held_out(None).labels, Classification("digits").held_out(None).labels)


def test_classes_are_thinned_in_training_only():
    task = Classification("digits", keep=((3, 0.1), (7, 0.5)))
    before = torch.bincount(students(Classification("digits")).labels)
    after = torch.bincount(students(task).labels)
    assert after[3] == round(0.1 * before[3].item()) and after[7] == round(0.5 * before[7].item())
    assert after[0] == before[0]
    assert task.log_prior(students(task)).exp().sum().item() == pytest.approx(1)
    assert task.log_prior(students(task)).argmin() == 3


def test_a_shift_reaches_the_student_and_the_test_and_not_the_reference():
    task, plain = Classification("digits", shift="rotate:90"), Classification("digits")
    turned = students(task).inputs
    torch.testing.assert_close(turned, students(plain).inputs.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(task.examples("truth", 9999, NEW()).inputs, students(plain).inputs)
    assert not torch.equal(task.held_out(None).inputs, plain.held_out(None).inputs)
    assert torch.equal(task.held_out("truth").inputs, plain.held_out(None).inputs)
    noise = shifted(torch.zeros(2000, 1), "noise:0.5", NEW().manual_seed(0))
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_file_of_records_and_one_of_arrays_are_read(tmp_path):
    rows = [{"a": n, "b": n / 2, "kind": "xyz"[n % 3]} for n in range(30)]
    table, arrays = tmp_path / "t.jsonl", tmp_path / "t.npz"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(arrays, inputs=np.array([[r["a"], r["b"]] for r in rows]), labels=np.arange(30) % 3)
    one, two = loaded(str(table), "kind", False), loaded(str(arrays), None, False)
    assert torch.equal(one.inputs, two.inputs) and torch.equal(one.labels, two.labels)
    assert Classification(str(table), target="kind").classes == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Classification(test=1.0), "between 0 and 1"),
        (lambda: Classification(noise="pair"), "'uniform' or 'pairs'"),
        (lambda: Classification(label_noise=1.0), r"\[0, 1\)"),
        (lambda: Classification(prior=(0.5, 0.4)), "together 1"),
        (lambda: students(Classification(keep=((12, 0.5),))), "has none of it"),
        (lambda: students(Classification(shift="rotate")), "rotate:DEGREES"),
        (lambda: students(Classification("wine", shift="rotate:3")), "only images"),
        (lambda: students(Classification("wine", target="kind")), "knows its own target"),
        (lambda: Classification().examples("train", 1, NEW()), "'truth' and 'noisy'"),
        (lambda: Classification(prior=(0.5, 0.5)).log_prior(students(Classification())), "for 10 classes"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_table_without_the_field_names_those_it_has(tmp_path):
    table = tmp_path / "t.jsonl"
    table.write_text('{"a": 1, "b": "two"}\n{"a": 2, "b": "one"}\n')
    with pytest.raises(ValueError, match=r"no field 'c'; target is one of \['a', 'b'\]"):
        loaded(str(table), "c", False)
    with pytest.raises(ValueError, match="every field but 'a' is a number"):
        loaded(str(table), "a", False)


@pytest.fixture(scope="module")
def measured():
    task = Classification("digits", attack=Attack(epsilon=0.2, steps=3))
    model = Classifier.fresh(MLP(width=8), torch.Size([1, 8, 8]), 10, seed=0)
    data = students(task)
    optimiser = torch.optim.Adam(model.model.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model.model(data.inputs), data.labels).backward()
        optimiser.step()
    return task, model, task.evaluate(model, model, {"KL()": KL()}, 0)


def test_the_numbers_of_an_evaluation_are_scikit_learns(measured):
    task, model, found = measured
    test, scalars = task.held_out(None), found["scalars"]
    log_q = model.log_probs(test.inputs).detach().double()
    label, guess, q = test.labels.numpy(), log_q.argmax(-1).numpy(), log_q.softmax(-1).numpy()
    assert scalars["accuracy"] == pytest.approx(metrics.accuracy_score(label, guess))
    assert scalars["nll"] == pytest.approx(metrics.log_loss(label, q), rel=1e-5)
    assert scalars["balanced accuracy"] == pytest.approx(metrics.balanced_accuracy_score(label, guess))
    assert scalars["macro f1"] == pytest.approx(metrics.f1_score(label, guess, average="macro"))
    recall: Any = metrics.recall_score(label, guess, average=None)  # pyright: ignore[reportArgumentType]
    assert scalars["worst class accuracy"] == pytest.approx(min(recall))
    assert scalars["g-mean"] == pytest.approx(np.prod(recall) ** 0.1)
    assert scalars["brier"] == pytest.approx(((q - np.eye(10)[label]) ** 2).sum(-1).mean(), rel=1e-5)
    assert scalars["KL()"] == pytest.approx(0, abs=1e-9) and scalars["teacher agreement"] == 1
    assert scalars["robust accuracy"] < scalars["accuracy"]
    deviation = (scalars["accuracy"] * (1 - scalars["accuracy"]) / len(label)) ** 0.5
    assert found["scalar_errors"]["accuracy"] == pytest.approx(deviation, rel=0.2)  # 300 resamples


def test_the_same_seed_measures_the_same_and_leaves_the_mode_alone(measured):
    task, model, found = measured
    model.model.train()
    again = task.evaluate(model, model, {"KL()": KL()}, 0)
    assert again == found and model.model.training


def test_a_class_that_is_never_guessed_counts_as_nothing():
    table = np.array([[0, 0], [0, 0], [1, 0]])
    assert g_mean(table) == 0 and macro_f1(table) == pytest.approx(0.4)


def test_without_a_reference_nothing_is_compared():
    data = Classification("wine").held_out(None)
    model = Classifier.fresh(MLP(width=4), torch.Size([13]), 3, seed=0)
    found = classified(model, None, data, {"KL()": KL()}, None, 0)
    assert found["divergences"] == {} and "KL()" not in found["scalars"]


def test_an_attack_goes_by_what_the_scores_mean(measured):
    """Read the other way round, the same scores are attacked the other way round."""

    class Turned:
        def log_probs(self, logits):
            return (-logits).log_softmax(-1)

    task, model, _ = measured
    turned = Classifier(model.model, model.architecture, model.shape, model.outputs, Turned())
    data, attack = task.held_out(None), Attack(epsilon=0.2, steps=3)
    wrong = Labelled(data.inputs, turned.log_probs(data.inputs).argmax(-1))
    assert (under_attack(turned, wrong, attack, 0) == wrong.labels.numpy()).mean() < 0.9
