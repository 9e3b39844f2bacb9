"""Points from mixtures: divergences by quadrature, modes found or missed, and runs that are resumed."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fdiv import JS, KL, TV, ReverseKL, SquaredHellinger
from fdiv.adapters.classifier import Classifier
from fdiv.diffusion.mixture import Mixture
from fdiv.networks.all import Affine, ClosedForm, Denoiser
from fdiv.recipe import ModelSpec, load, members
from fdiv.tasks.generation import drawn, finite, grouped, jackknifed
from fdiv.tasks.points import CLOUDS, Points, mixture
from fdiv.tasks.points_measurement import Gaussians, covered, divergences, grid, missed, modes, near, smoothed
from fdiv.train import Run, train_member, train_reference

MEASURES = {"KL()": KL(), "ReverseKL()": ReverseKL(), "JS()": JS(0.5), "TV()": TV()}
NEW = torch.Generator


def affine(mean: float, scale: float, dim: int = 1) -> Classifier:
    return Classifier.fresh(Affine(mean, scale), torch.Size([dim]), dim, seed=0)


def one(mean: float, scale: float, dim: int = 1) -> Mixture:
    return Mixture(((mean,) * dim,), (scale,), (1.0,))


# -- divergences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_divergences_of_gaussians_are_their_closed_forms(dim):
    noise, a, b = 0.2, (0.5, 0.6), (-0.4, 0.9)
    found = divergences(
        one(*a, dim), noise, affine(*b, dim).model, torch.empty(0), MEASURES | {"H2": SquaredHellinger()}
    )
    p, q = (a[1] ** 2 + noise**2, b[1] ** 2 + noise**2)
    gap, log_ratio = (a[0] - b[0]) ** 2, math.log(q / p)
    bhattacharyya = gap / (4 * (p + q)) + 0.5 * math.log((p + q) / (2 * math.sqrt(p * q)))
    assert found["KL()"][0] == pytest.approx(dim * ((p + gap) / q - 1 + log_ratio) / 2, abs=1e-6)
    assert found["ReverseKL()"][0] == pytest.approx(dim * ((q + gap) / p - 1 - log_ratio) / 2, abs=1e-6)
    assert found["H2"][0] == pytest.approx(1 - math.exp(-dim * bhattacharyya), abs=1e-6)
    assert all(error is None for _, error in found.values())


def test_the_settled_modes_of_a_narrow_gaussian_cost_what_is_known():
    """Two far modes, one of them met exactly: ReverseKL is log 2, TV a half, KL grows with the distance."""
    task = Points("two modes", noise=0.02)
    found = divergences(mixture(task), 0.02, affine(3.0, 0.6).model, torch.empty(0), MEASURES)
    assert found["ReverseKL()"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert found["TV()"][0] == pytest.approx(0.5, abs=1e-5)
    assert found["JS()"][0] == pytest.approx(0.75 * math.log(4 / 3), abs=1e-5)
    # 1/2 |6|^2 / (2 s^2) of the mode that is missed, less the entropy log 2 of which mode
    assert found["KL()"][0] == pytest.approx(36 / (4 * (0.36 + 0.0004)) - math.log(2), abs=1e-4)


def test_samples_of_the_law_itself_are_near_it_in_every_divergence():
    law = mixture(Points("ring"))
    found = divergences(law, 0.3, None, law.sample(2048, NEW().manual_seed(3)), MEASURES)
    assert all(0 < value < 0.05 for value, _ in found.values())
    assert found["KL()"][0] < 0.01


def test_the_density_of_samples_is_a_mean_over_all_of_them():
    law, samples = mixture(Points("two modes")), torch.linspace(-4, 4, 256).unsqueeze(1)
    found, _ = divergences(law, 0.3, None, samples, {"KL()": KL()})["KL()"]
    where = torch.linspace(-12, 12, 20_001, dtype=torch.float64).unsqueeze(1)
    log_p = law.log_prob(where, 0.3)
    of_each = torch.distributions.Normal(samples.double().T, 0.3).log_prob(where)
    log_q = of_each.logsumexp(1) - math.log(256)
    by_hand = (log_p.exp() * (log_p - log_q)).sum() * (where[1] - where[0]).item()
    assert found == pytest.approx(by_hand.item(), abs=1e-6)


def test_a_student_far_away_has_a_finite_divergence():
    """exp(-distance^2) is 0 in float64; its logarithm is not."""
    found = divergences(mixture(Points("two modes")), 0.2, None, torch.full((256, 1), 1e3), MEASURES)
    assert all(math.isfinite(value) for value, _ in found.values())
    assert found["TV()"][0] == pytest.approx(1) and found["JS()"][0] == pytest.approx(math.log(2))
    assert found["KL()"][0] > 1e6


def test_what_lies_outside_of_a_box_is_its_exact_share():
    law = Gaussians(torch.zeros(1, 2).double(), torch.ones(1, 2).double(), torch.zeros(1).double())
    for side, expected in ((1.0, 1 - 0.6826894921370859**2), (6.0, 2 * 1.973175290075396e-09)):
        found = law.log_outside(*(torch.full((2,), s).double() for s in (-side, side))).exp().item()
        assert found == pytest.approx(expected, rel=1e-6)
    assert law.log_outside(*(torch.full((2,), s).double() for s in (-60.0, 60.0))) == pytest.approx(
        -1804, abs=2
    )


@pytest.mark.parametrize("law", ["two modes", "ring", "rare mode"])
def test_the_cells_and_what_is_outside_hold_all_of_the_mass(law):
    task = Points(law)
    where = grid(mixture(task), task.noise)
    assert where.of(smoothed(mixture(task), task.noise)).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    rows = torch.randn(16, generator=NEW().manual_seed(0)).double()
    value, error = jackknifed(torch.mean, rows)
    assert value == pytest.approx(rows.mean().item())
    assert error == pytest.approx(rows.std().item() / 4)


def test_groups_of_equal_clouds_have_an_energy_distance_of_about_nothing():
    x, y = (torch.randn(2048, 2, generator=NEW().manual_seed(s)) for s in (0, 1))
    value, error = grouped(CLOUDS["energy distance"].between, x, y)
    assert abs(value) < 4 * error
    # a shift of 1 in one coordinate is 2 E|X - Y| - ... > 0, far beyond the error
    assert grouped(CLOUDS["energy distance"].between, x, y + torch.tensor([1.0, 0.0]))[0] > 20 * error


# -- modes ------------------------------------------------------------------------------------------------

HALVES = np.array([0.5, 0.5])


def test_a_student_of_one_mode_misses_half():
    rows = modes(mixture(Points("two modes")), 3 + 0.6 * torch.randn(4096, 1, generator=NEW().manual_seed(0)))
    assert missed(rows, HALVES) == 0.5 and covered(rows, HALVES) == 0.5
    assert near(rows) == pytest.approx(math.erf(3 / math.sqrt(2)), abs=4 * 0.0008)


def test_a_student_between_the_modes_covers_them_in_weight_and_has_little_quality():
    law = mixture(Points("two modes"))
    rows = modes(law, 0.1 * torch.randn(4096, 1, generator=NEW().manual_seed(0)))
    assert missed(rows, HALVES) < 0.05 and covered(rows, HALVES) == 0 and near(rows) == 0


def test_a_rare_mode_counts_as_covered_from_a_fifth_of_its_weight_on():
    weights = np.array([0.96, 0.04])
    rows = np.array([[0, 1]] * 992 + [[1, 1]] * 8)
    assert covered(rows, weights) == 1 and covered(np.concatenate([rows, rows[:1]]), weights) == 0.5
    assert missed(rows, weights) == pytest.approx(0.032)


def test_the_law_itself_passes_every_measure():
    task = Points("two modes", samples=2048)
    exact = Classifier.fresh(ClosedForm(mixture(task)), torch.Size([1]), 1, seed=0)
    found = task.evaluate(exact, exact, MEASURES, seed=0)
    scalars, errors = found["scalars"], found["scalar_errors"]
    assert (
        all(abs(scalars[name]) < 1e-9 for name in MEASURES) and found["divergences"].keys() == MEASURES.keys()
    )
    assert scalars["mode coverage"] == 1 and scalars["mode tv"] < 4 * errors["mode tv"]
    assert scalars["high quality"] > 0.99 and abs(scalars["mean"]) < 0.25
    assert abs(scalars["energy distance"]) < 4 * errors["energy distance"]
    assert scalars["network calls"] == 2 * task.default_method.steps - 1
    json.dumps(found)


def test_an_affine_student_is_measured_by_its_own_law_and_in_one_call():
    found = Points("two modes", samples=512).evaluate(affine(3.0, 0.6), None, MEASURES, seed=0)
    assert found["scalars"]["ReverseKL()"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["scalars"]["network calls"] == 1 and "KL()" not in found["scalar_errors"]
    assert found["scalars"]["mode coverage"] == 0.5


def test_a_student_that_has_diverged_is_said_to_have():
    with pytest.raises(ValueError, match="2 of 3 samples are not finite"):
        finite(torch.tensor([[0.0], [math.nan], [math.inf]]))


@dataclass(frozen=True)
class Counted:
    """Calls the network twice."""

    def sample(self, network, noise, condition=None):
        return network(network(noise, 1.0), 1.0)


def test_calls_of_the_network_are_counted_for_each_sample():
    model = affine(0.0, 2.0)
    model.method = Counted()
    noise = torch.randn(1500, 1)
    made = drawn(model, None, noise)
    assert made.evaluations == 2
    torch.testing.assert_close(made.points, 4 * noise)


# -- the task ---------------------------------------------------------------------------------------------


def test_draws_have_the_weights_and_the_moments_of_the_law():
    task = Points("two modes", weights=(0.8, 0.2))
    data = task.examples(None, 20_000, NEW().manual_seed(0))
    assert data.inputs.shape == (20_000, 1) and data.labels.unique().tolist() == [0]
    assert (data.inputs > 0).double().mean().item() == pytest.approx(0.2, abs=0.012)
    assert data.inputs.mean().item() == pytest.approx(-1.8, abs=0.08)
    assert data.inputs.std().item() == pytest.approx(math.sqrt(9 * 0.64 + 0.36), abs=0.05)
    assert torch.equal(
        task.examples("truth", 9, NEW().manual_seed(5)).inputs[:4].isfinite(), torch.ones(4, 1).bool()
    )


def test_the_modes_are_as_far_apart_as_is_said():
    means = torch.tensor(mixture(Points("ring", apart=0.5)).means)
    torch.testing.assert_close(means.norm(dim=1), torch.ones(8))
    assert mixture(Points(one(1.0, 0.5, 2))).dim == 2


def test_a_closed_form_is_told_the_law_of_the_task_and_survives_saving(tmp_path):
    task = Points("ring", weights=(1.0,) * 7 + (2.0,))
    spec = ModelSpec.model_construct(network=ClosedForm(), path=None, hidden_size=None, keep_layers=None)
    made = task.load(spec, seed=0)
    x = torch.randn(4, 2)
    torch.testing.assert_close(made.model(x, 0.7), mixture(task).denoise(x, 0.7))
    made.save(tmp_path)
    torch.testing.assert_close(task.reopen(tmp_path, spec, 0).model(x, 0.7), made.model(x, 0.7))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"law": "rings"}, "law is one of"),
        ({"law": "two modes", "weights": (1.0,)}, "has 2 modes"),
        ({"weights": (0.0,) + (1.0,) * 7}, "finite and > 0"),
        ({"apart": 0.0}, "factor > 0"),
        ({"samples": 100}, "multiple of 16 from 256"),
        ({"noise": 0.0}, "deviation > 0"),
        ({"noise": 1e-3}, "write more noise"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        mixture(Points(**options))


def test_points_have_no_conditions_no_other_data_and_no_prior():
    spec = ModelSpec.model_construct(
        network=Denoiser(classes=2), path=None, hidden_size=None, keep_layers=None
    )
    with pytest.raises(ValueError, match="no labels"):
        Points().load(spec, 0)
    with pytest.raises(ValueError, match="data 'truth'"):
        Points().examples("noisy", 4, NEW())
    with pytest.raises(ValueError, match="no classes"):
        Points().log_prior(Points().held_out(None))


# -- runs -------------------------------------------------------------------------------------------------

TRAIN = {"steps": 20, "batch_size": 64, "learning_rate": 0.003, "log_every": 4, "checkpoint_every": 6}
RECIPE = {
    "name": "tiny-points",
    "task": 'Points("two modes", samples=256)',
    "reference": {
        "model": {"network": "Denoiser(width=16, blocks=1, sigma_data=3.0)"},
        "data": "truth",
        "train": TRAIN | {"average": 0.9},
    },
    "student": "reference",
    "method": "FDistill(JS(0.5), every=2, critic=Critic(sigma_data=3.0))",
    "divergences": ["JS(0.5)"],
    "train": TRAIN | {"betas": [0, 0.99], "weight_decay": 0},
}


class Killed(Exception):
    pass


def test_a_distillation_that_was_killed_goes_on_bit_for_bit(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    whole = Run(load(path), 0, tmp_path / "out")
    (member,) = members(whole.recipe)

    def kill(step, steps, loss):
        if loss is not None and step == 16:
            raise Killed

    train_reference(whole)
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    train_member(whole, member)
    with pytest.raises(Killed):
        train_member(Run(whole.recipe, 0, tmp_path / "cut", kill), member)
    cut = Run(whole.recipe, 0, tmp_path / "cut")
    train_member(cut, member)
    one, two = (run.member_folder(member) for run in (whole, cut))
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    found = [json.loads((folder / "evaluation.json").read_text()) for folder in (one, two)]
    assert {n: v for n, v in found[0]["scalars"].items() if n != "ms a sample"} == {
        n: v for n, v in found[1]["scalars"].items() if n != "ms a sample"
    }
    assert found[0]["drawn"] == found[1]["drawn"] and found[0]["scalars"]["network calls"] == 1
