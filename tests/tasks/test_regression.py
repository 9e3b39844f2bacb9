"""Regression: standard deviations everywhere, errors, and ensembles whose spread is right or wrong."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from fdiv.adapters.classifier import Classifier
from fdiv.methods.forecast.crps import gaussian_crps
from fdiv.methods.robust.attacks import Attack
from fdiv.methods.supervise.squared_error import SquaredError
from fdiv.networks.latent import Latent
from fdiv.networks.mlp import MLP
from fdiv.tasks.labelled import Labelled
from fdiv.tasks.regression import Regression
from fdiv.tasks.regression_measurement import drawn, regressed

NEW = torch.Generator


class Draws(torch.nn.Module):
    """A network whose ensemble is normal about 0, of this deviation."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def ensemble(self, inputs, members):
        return self.scale.detach() * torch.randn(members, len(inputs), 1)

    def forward(self, inputs):
        return torch.zeros(len(inputs), 1)


def measured(network, targets, members=256, attack=None):
    model = Classifier(network, MLP(), torch.Size([1]), 1)
    return regressed(model, Labelled(torch.zeros(len(targets), 1), targets), members, attack, seed=0)[
        "scalars"
    ]


def test_diabetes_has_a_quarter_held_out_and_both_sides_in_training_deviations():
    task = Regression()
    training, test = task.examples(None, 10**6, NEW()), task.held_out(None)
    assert (training.inputs.shape, training.labels.shape) == ((331, 10), (331, 1))
    assert len(test.inputs) == 111
    for tensor in training:
        torch.testing.assert_close(tensor.mean(0), torch.zeros(tensor.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(tensor.std(0), torch.ones(tensor.shape[1]), atol=1e-5, rtol=0)
    raw = Regression(standardise=False).examples(None, 10**6, NEW())
    assert raw.inputs.abs().max() < 0.3
    torch.testing.assert_close(raw.labels, training.labels)


def test_fewer_examples_are_drawn_and_other_splits_hold_others_out():
    assert len(Regression().examples("truth", 40, NEW()).inputs) == 40
    assert not torch.equal(Regression(split=1).held_out(None).inputs, Regression().held_out(None).inputs)


def test_outliers_are_the_students_alone_and_as_many_as_is_said():
    task = Regression(outliers=0.2)
    right, seen = task.examples("truth", 10**6, NEW()).labels, task.examples(None, 10**6, NEW()).labels
    wrong = right != seen
    assert wrong.double().mean().item() == pytest.approx(0.2, abs=0.066)  # 3 sigma of 331
    assert seen[wrong].std() > 3
    assert torch.equal(task.held_out(None).labels, Regression().held_out(None).labels)
    assert torch.equal(seen, Regression(outliers=0.2).examples(None, 10**6, NEW()).labels)


def test_several_targets_come_from_an_npz_file(tmp_path):
    path = tmp_path / "two.npz"
    random = np.random.default_rng(0)
    np.savez(path, inputs=random.normal(size=(40, 3)), targets=random.normal(size=(40, 2)) * [1, 100])
    task = Regression(str(path))
    assert task.examples(None, 100, NEW()).labels.shape == (30, 2)
    model = Classifier.fresh(MLP(width=4), torch.Size([3]), 2, seed=0)
    assert math.isfinite(task.evaluate(model, model, {}, 0)["scalars"]["rmse"])


def test_a_target_that_never_changes_is_refused(tmp_path):
    path = tmp_path / "flat.npz"
    np.savez(path, inputs=np.zeros((20, 1)), targets=np.ones(20))
    with pytest.raises(ValueError, match="never changes"):
        Regression(str(path)).held_out(None)


def test_errors_of_a_prediction_are_scikit_learns():
    task = Regression()
    test = task.held_out(None)
    model = Classifier.fresh(MLP(width=8), torch.Size([10]), 1, seed=0)
    scalars = task.evaluate(model, model, {}, 0)["scalars"]
    with torch.no_grad():
        guess, truth = model.model(test.inputs).double(), test.labels.double()
    assert scalars["rmse"] == pytest.approx(metrics.root_mean_squared_error(truth, guess))
    assert scalars["mae"] == pytest.approx(metrics.mean_absolute_error(truth, guess))
    assert scalars["r2"] == pytest.approx(metrics.r2_score(truth, guess))
    assert scalars["crps"] == pytest.approx(scalars["mae"])
    assert "coverage" not in scalars and "spread" not in scalars


def test_a_calibrated_ensemble_covers_as_much_as_it_says_and_others_do_not():
    targets = torch.randn(4000, 1, generator=NEW().manual_seed(1))
    right = measured(Draws(1.0), targets)
    assert right["coverage"] == pytest.approx(0.9, abs=0.02)
    assert right["spread"] == pytest.approx(right["rmse"], rel=0.05)
    zero = torch.zeros(4000, 1).double()
    expected = gaussian_crps(zero, zero + 1, targets.double()).mean().item()
    assert right["crps"] == pytest.approx(expected, rel=0.01)
    narrow, wide = measured(Draws(0.2), targets), measured(Draws(4.0), targets)
    assert narrow["coverage"] < 0.4 and wide["coverage"] > 0.99
    assert min(narrow["crps"], wide["crps"]) > right["crps"] + 0.05


def test_few_members_have_the_spread_and_the_score_of_many():
    targets = torch.randn(4000, 1, generator=NEW().manual_seed(1))
    few, many = measured(Draws(1.0), targets, members=3), measured(Draws(1.0), targets, members=256)
    assert few["crps"] == pytest.approx(many["crps"], rel=0.03)
    assert few["spread"] == pytest.approx(few["rmse"], rel=0.05)


def test_ensembles_depend_on_the_seed_and_leave_the_generator_alone():
    model = Classifier.fresh(Latent(width=8, latent=2), torch.Size([10]), 1, seed=0)
    inputs = Regression().held_out(None).inputs
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (drawn(model, inputs, 5, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (5, 111, 1)


def test_an_attack_raises_the_error_and_one_of_no_size_does_not():
    model = Classifier.fresh(MLP(width=8), torch.Size([10]), 1, seed=0)
    plain, moved = (
        Regression(attack=Attack(epsilon, bounds=None, start="none")).evaluate(model, model, {}, 0)["scalars"]
        for epsilon in (0.0, 0.3)
    )
    assert plain["robust rmse"] == pytest.approx(plain["rmse"])
    assert moved["robust rmse"] > moved["rmse"] + 0.01


def test_the_evaluation_is_what_a_report_reads():
    model = Classifier.fresh(Latent(width=8), torch.Size([10]), 1, seed=0)
    found = Regression(members=16).evaluate(model, model, {}, 0)
    assert found["scalars"].keys() == found["scalar_errors"].keys()
    assert all(math.isfinite(v) for v in [*found["scalars"].values(), *found["scalar_errors"].values()])
    json.dumps(found)


def test_what_a_regression_does_not_have_is_refused():
    for wrong, says in (({"test": 1.0}, "test"), ({"members": 1}, "members"), ({"outliers": 1.0}, "share")):
        with pytest.raises(ValueError, match=says):
            Regression(**wrong)
    with pytest.raises(ValueError, match="'truth'"):
        Regression().examples("noisy", 10, NEW())
    with pytest.raises(ValueError, match="no classes"):
        Regression().log_prior(Regression().held_out(None))
    assert Regression.default_method == SquaredError()
