"""Images: distances between features, balls about neighbours, and images that are made block by block."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml

from fdiv.networks.all import CNN, Affine, Denoiser
from fdiv.recipe import ModelSpec, load, members
from fdiv.tasks.images import Images, _judge, _of_features, _sides
from fdiv.tasks.images_measurement import classes_missed, frechet, inside, judge, judged
from fdiv.train import Run, train_member, train_reference

NEW = torch.Generator
CLASSES = 3


@pytest.fixture(scope="module")
def blobs(tmp_path_factory) -> str:
    """Images of 4 x 4 that are bright in one of three corners: as easy as digits, and quick."""
    random = np.random.default_rng(0)
    labels = np.arange(240) % CLASSES
    images = 0.1 * random.random((240, 1, 4, 4))
    for label, (row, column) in enumerate([(0, 0), (0, 2), (2, 0)]):
        images[labels == label, :, row : row + 2, column : column + 2] += 0.8
    path = tmp_path_factory.mktemp("blobs") / "blobs.npz"
    np.savez(path, inputs=images.astype(np.float32), labels=labels)
    return str(path)


def task(blobs: str, **options) -> Images:
    return Images(blobs, judge=CNN(width=4, blocks=1), **options)


def spec(network) -> ModelSpec:
    return ModelSpec.model_construct(network=network, path=None, hidden_size=None, keep_layers=None)


@dataclass(frozen=True)
class Replay:
    """Returns training examples, of the classes that are asked for; `wrong`: of the next class."""

    task: Images
    wrong: bool = False

    def sample(self, network, noise, condition=None):
        data, made = _sides(self.task).training, torch.empty_like(noise)
        for label in range(self.task.classes):
            rows = condition == (label + self.wrong) % self.task.classes
            of_class, count = data.inputs[data.labels == label], int(rows.sum())
            made[rows] = of_class[torch.arange(count) % len(of_class)]
        return made


def measured(blobs: str, wrong: bool = False) -> dict:
    of = task(blobs)
    model = of.load(spec(Denoiser(8, 1, classes=CLASSES)), 0)
    model.method = Replay(of, wrong)
    return of.evaluate(model, None, {}, seed=0)["scalars"]


# -- measures ---------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_gaussians_is_its_closed_form():
    """Diagonal covariances: |m - m'|^2 + sum of (s - s')^2, of samples that have these moments exactly."""
    z = torch.randn(500, 3, generator=NEW().manual_seed(0)).double()
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).mT
    a, b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([2.0, 1.0, 0.5]).double()
    found = frechet(a * z, b * z + torch.tensor([0.0, 3.0, 0.0]))
    assert found == pytest.approx(9 + 1 + 1, abs=1e-4)
    assert frechet(z, z) == pytest.approx(0, abs=1e-9)


def test_features_that_never_fire_do_no_harm():
    z = torch.randn(50, 3, generator=NEW().manual_seed(0)).double() * torch.tensor([1.0, 0.0, 0.0])
    assert frechet(z, z) == pytest.approx(0, abs=1e-9) and math.isfinite(frechet(z, 0 * z))


def test_a_point_is_inside_where_it_is_nearer_than_the_k_th_neighbour():
    cloud = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    points = torch.tensor([[-1.0], [-1.1], [5.0], [16.9], [17.1]])
    # nearest neighbours lie at 1, 1, 2 and 7
    assert inside(points, cloud, 1).tolist() == [True, False, True, True, False]
    assert inside(points, cloud, 2).tolist() == [True, True, True, True, True]


def test_the_classes_that_are_missed_are_a_total_variation():
    shares = np.array([0.5, 0.3, 0.2])
    assert classes_missed(np.array([0] * 5 + [1] * 3 + [2] * 2), shares) == pytest.approx(0)
    assert classes_missed(np.zeros(10), shares) == pytest.approx(0.5)


def test_the_judge_is_the_same_each_time_and_knows_its_classes(blobs):
    data = _sides(task(blobs)).training
    one, two = _judge(task(blobs)), judge(CNN(width=4, blocks=1), data, CLASSES)
    assert one.fingerprint() == two.fingerprint()
    held = _sides(task(blobs)).test
    assert (judged(one, held.inputs).log_probs.argmax(1) == held.labels).all()
    assert not any(p.requires_grad for p in one.model.parameters())


def test_a_student_that_replays_the_data_is_perfect_and_one_that_mixes_up_classes_is_told(blobs):
    right, wrong = measured(blobs), measured(blobs, wrong=True)
    assert right["frechet distance"] == pytest.approx(0, abs=1e-6)
    assert right["precision"] == right["recall"] == right["class accuracy"] == 1 and right["class tv"] == 0
    assert right["energy distance"] < 0.02 and right["pixel variance"] > 0.1
    assert wrong["class accuracy"] == 0 and wrong["class tv"] < 0.02


def test_one_class_alone_has_precision_and_no_recall(blobs):
    of = task(blobs)
    data = _sides(of).training
    share = (data.labels == 0).double().mean().item()
    found = _of_features(of, data.inputs[data.labels == 0], None)
    assert found["precision"][0] == 1 and found["recall"][0] == pytest.approx(share, abs=0.02)
    assert found["class tv"][0] == pytest.approx(1 - share) and "class accuracy" not in found


# -- data -------------------------------------------------------------------------------------------------


def test_digits_fill_the_interval_and_a_fifth_is_held_out():
    data, held = Images().examples(None, 10**6, NEW()), Images().held_out(None)
    assert data.inputs.shape == (1401, 1, 8, 8) and len(held.inputs) == 396
    assert (data.inputs.min().item(), data.inputs.max().item()) == (-1, 1)
    assert data.inputs.std().item() == pytest.approx(0.752, abs=0.001)
    assert len(Images().examples("truth", 50, NEW().manual_seed(0)).inputs) == 50


def test_signals_of_another_package_are_a_task_too():
    of = Images("mnist1d")
    assert of.shape == (1, 40) and of.classes == 10
    assert of.examples(None, 10**6, NEW()).inputs.abs().max().item() == 1


def test_blocks_are_rows_with_what_is_known_of_them(blobs):
    of, whole = task(blobs, blocks=4), _sides(task(blobs, blocks=4)).training
    assert of.shape == (4,) and of.context == 3 * 4 + 4 + CLASSES
    cut = of.examples(None, 10**6, NEW())
    assert cut.inputs.shape == (4 * len(whole.inputs), 4)
    example = whole.inputs[5, 0].flatten()
    for place in range(4):
        told = cut.labels[4 * 5 + place]
        assert torch.equal(cut.inputs[4 * 5 + place], example[4 * place : 4 * place + 4])
        assert torch.equal(told[: 4 * place], example[: 4 * place]) and not told[4 * place : 12].any()
        assert told[12:16].argmax() == place and told[16:].argmax() == whole.labels[5]


@dataclass(frozen=True)
class Counting:
    """A block is the mean of the one before it, plus one."""

    def sample(self, network, noise, condition):
        place = condition[:, 12:16].argmax(1)
        before = torch.where(
            place > 0, condition[torch.arange(len(noise)), (4 * place - 4).clamp(min=0)], 0.0
        )
        network(noise, 1.0, condition)
        return (before + 1).unsqueeze(1).expand_as(noise)


def test_blocks_are_rolled_out_each_from_those_before_it(blobs):
    of = task(blobs, blocks=4)
    model = of.load(spec(Denoiser(8, 1, context=of.context)), 0)
    model.method = Counting()
    made = of.sampled(model, torch.zeros(5, dtype=torch.int64), seed=0)
    assert made.points.shape == (5, 1, 4, 4) and made.evaluations == 4
    expected = torch.arange(1.0, 5.0).reshape(1, 1, 4, 1).expand(5, 1, 4, 4)
    assert torch.equal(made.points, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda b: Images(test=1.0), "between 0 and 1"),
        (lambda b: Images(blocks=0), "blocks is a whole number"),
        (lambda b: Images(neighbours=0), "neighbours is a whole number"),
        (lambda b: task(b, blocks=3).shape, "do not make 3 equal blocks"),
        (lambda b: task(b).load(spec(Denoiser(classes=7)), 0), "classes=3, or none"),
        (lambda b: task(b, blocks=4).load(spec(Denoiser(classes=3)), 0), "context=19"),
        (lambda b: task(b).load(spec(Affine()), 0), "for points"),
        (lambda b: task(b).examples("noisy", 4, NEW()), "data 'truth'"),
        (lambda b: task(b).log_prior(task(b).held_out(None)), "guesses no classes"),
    ],
)
def test_what_cannot_be_is_refused(make, words, blobs):
    with pytest.raises(ValueError, match=words):
        make(blobs)


def test_images_that_are_all_alike_teach_nothing(tmp_path):
    np.savez(tmp_path / "grey.npz", inputs=np.ones((8, 1, 4, 4)), labels=np.arange(8) % 2)
    with pytest.raises(ValueError, match="same number everywhere"):
        task(str(tmp_path / "grey.npz"), test=0.5).examples(None, 9, NEW())


# -- runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_teacher_learns_the_images_and_its_student_makes_them_in_one_call(blobs, tmp_path, blocks):
    told = "classes=3" if blocks == 1 else f"context={task(blobs, blocks=4).context}"
    train = {"steps": 150, "batch_size": 64, "examples": 1024, "learning_rate": 0.003, "weight_decay": 0}
    recipe = {
        "name": "tiny-images",
        "task": f"Images({blobs!r}, blocks={blocks}, judge=CNN(width=4, blocks=1))",
        "reference": {
            "model": {"network": f"Denoiser(width=48, blocks=1, sigma_data=0.75, {told})"},
            "data": "truth",
            "train": train | {"average": 0.99},
        },
        "student": "reference",
        "method": "FDistill(ReverseKL(), every=2, gan=0.0, critic=Critic(sigma_data=0.75))",
        "divergences": ["ReverseKL()"],
        "train": train | {"steps": 20, "betas": [0, 0.99]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run = Run(load(path), 0, tmp_path / "out")
    train_reference(run)
    (member,) = members(run.recipe)
    train_member(run, member)
    teacher, student = (
        json.loads((folder / "evaluation.json").read_text())
        for folder in (run.reference_folder, run.member_folder(member))
    )
    assert teacher["scalars"]["class accuracy"] > 0.45  # a third is chance
    assert teacher["scalars"]["network calls"] == 35 * blocks
    assert student["scalars"]["network calls"] == blocks
    pictures = np.array(student["drawn"]["images"])
    assert pictures.shape == (30, 4, 4) and pictures.min() >= 0 and pictures.max() <= 255
