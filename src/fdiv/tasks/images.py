"""Small images or signals of several classes, to be made out of noise."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.classifier import Classifier
from fdiv.divergences.energy import Energy
from fdiv.divergences.kernels import Gaussian
from fdiv.divergences.mmd import MMD
from fdiv.methods.generate.denoising import Denoising
from fdiv.methods.generate.levels import LogNormal
from fdiv.networks._network import Architecture
from fdiv.networks.cnn import CNN
from fdiv.networks.denoiser import Denoiser
from fdiv.tasks.generation import Drawn, drawn, grouped
from fdiv.tasks.images_measurement import Judged, classes_missed, frechet, inside, judge, judged
from fdiv.tasks.labelled import Labelled, Split, loaded, opened, reopened, separated
from fdiv.tasks.labelled_measurement import error

SHOWN = 30
Numbers = dict[str, tuple[float, float | None]]


@dataclass(frozen=True)
class Images:
    """Examples of `source` (see fdiv.tasks.labelled) in [-1, 1], with their classes.

    A network that states classes or a context is told the class of what it makes, as often as each occurs.
    blocks: an example is made in so many equal pieces, one after another, by one network that is told its
    class, the place and all pieces before it: `context` numbers, see fdiv.methods.generate. test: the share
    that is held out, by the seed `split`. judge: the classifier whose features samples are compared in,
    trained on the same examples. neighbours: of precision and recall. denoising: how a reference is trained
    and sampled, None for what suits the examples' deviation.
    """

    source: str = "digits"
    blocks: int = 1
    test: float = 0.22
    split: int = 0
    judge: Architecture = CNN(width=16, blocks=2)
    neighbours: int = 5
    denoising: Denoising | None = None

    def __post_init__(self):
        if not 0 < self.test < 1:
            raise ValueError(f"test is a share of the examples, between 0 and 1, got {self.test!r}")
        for name, size in {"blocks": self.blocks, "neighbours": self.neighbours}.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} is a whole number >= 1, got {size!r}")

    # -- models -------------------------------------------------------------------------------------------

    @property
    def default_method(self) -> Denoising:
        """What a reference is trained by, and sampled if it is not trained."""
        deviation = _sides(self).training.inputs.std().item()
        levels = LogNormal(math.log(deviation) - 0.6, 1.2)
        suits = Denoising(deviation, levels, least=deviation / 40, most=25 * deviation)
        return self.denoising or suits

    def load(self, spec, seed: int, reference: Path | None = None) -> Classifier:
        self._require_condition(spec.network)
        return opened(spec, self.shape, self.shape.numel(), seed)

    def reopen(self, path: str | Path, spec, seed: int) -> Classifier:
        return reopened(path, spec)

    @property
    def shape(self) -> torch.Size:
        """Of what a network makes in one go."""
        whole = _sides(self).training.inputs.shape[1:]
        return whole if self.blocks == 1 else torch.Size([self.size])

    @property
    def size(self) -> int:
        """Numbers in a block."""
        whole = _sides(self).training.inputs.shape[1:].numel()
        if whole % self.blocks:
            raise ValueError(f"{whole} numbers do not make {self.blocks} equal blocks")
        return whole // self.blocks

    @property
    def classes(self) -> int:
        return int(_sides(self).training.labels.max()) + 1

    @property
    def context(self) -> int:
        """Numbers that a network is told of a block: the pieces before it, its place and its class."""
        return (self.blocks - 1) * self.size + self.blocks + self.classes

    def _require_condition(self, network: Any) -> None:
        classes, context = getattr(network, "classes", 0), getattr(network, "context", 0)
        wanted = [(0, self.context)] if self.blocks > 1 else [(0, 0), (self.classes, 0)]
        if isinstance(network, Denoiser) and (classes, context) not in wanted:
            written = f"context={self.context}" if self.blocks > 1 else f"classes={self.classes}, or none"
            raise ValueError(f"of {self!r} a network is told {written}; got {network!r}")

    # -- data ---------------------------------------------------------------------------------------------

    def examples(self, kind: str | None, count: int, generator: torch.Generator) -> Labelled:
        """At most `count` training examples, or blocks of them."""
        if kind not in (None, "truth"):
            raise ValueError(f"Images has data 'truth', got {kind!r}")
        data = self._cut(_sides(self).training)
        if count >= len(data.inputs):
            return data
        return data.rows(torch.randperm(len(data.inputs), generator=generator)[:count])

    def held_out(self, kind: str | None) -> Labelled:
        return self._cut(_sides(self).test)

    def log_prior(self, data: Labelled) -> Tensor:
        raise ValueError("a generator guesses no classes, so there is no log_prior")

    def _cut(self, data: Labelled) -> Labelled:
        """Every block of every example, with what a network is told of it."""
        if self.blocks == 1:
            return data
        pieces = data.inputs.flatten(1).unflatten(1, (self.blocks, self.size))
        told = [self._told(pieces[:, :n], data.labels) for n in range(self.blocks)]
        return Labelled(pieces.flatten(0, 1), torch.stack(told, 1).flatten(0, 1))

    def _told(self, before: Tensor, labels: Tensor) -> Tensor:
        """[N, context] of the pieces before [N, n, size] and the class [N]; pieces to come are 0."""
        count, place = before.shape[:2]
        pieces = before.new_zeros(count, self.blocks - 1, self.size)
        pieces[:, :place] = before
        at = torch.eye(self.blocks)[place].expand(count, -1)
        return torch.cat([pieces.flatten(1), at, torch.eye(self.classes)[labels]], -1)

    # -- evaluation ---------------------------------------------------------------------------------------

    def evaluate(
        self, model: Classifier, reference: Classifier | None, measures: dict[str, Divergence], seed: int
    ) -> dict[str, Any]:
        """As many samples as training examples, against these. `measures` need densities: none is known."""
        real = _sides(self).training
        labels = real.labels
        made = self.sampled(model, labels, seed)
        told = getattr(model.model, "conditional", False)
        numbers = _of_features(self, made.points, labels if told else None) | _of_pixels(self, made.points)
        sides = {"images": made.points, "target": real.inputs}
        numbers |= {"network calls": (made.evaluations, None), "ms a sample": (1e3 * made.seconds, None)}
        return {
            "exact": False,
            "scalars": {name: value for name, (value, _) in numbers.items()},
            "scalar_errors": {name: miss for name, (_, miss) in numbers.items() if miss is not None},
            "divergences": {},
            "calibration": {},
            "curves": {},
            "samples": [],
            "drawn": {n: _shades(side[_a_few(labels)]) for n, side in sides.items()},
        }

    def sampled(self, model: Classifier, labels: Tensor, seed: int) -> Drawn:
        """An example for each label, out of noise that depends on the seed alone."""
        shape = _sides(self).training.inputs.shape[1:]
        noise = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
        if self.blocks == 1:
            return drawn(model, self.default_method, noise, labels)
        pieces = noise.flatten(1).unflatten(1, (self.blocks, self.size))
        before, calls, seconds = pieces[:, :0], 0.0, 0.0
        for place in range(self.blocks):
            told = self._told(before, labels)
            made = drawn(model, self.default_method, pieces[:, place], told)
            before = torch.cat([before, made.points.unsqueeze(1)], 1)
            calls, seconds = calls + made.evaluations, seconds + made.seconds
        return Drawn(before.reshape(noise.shape), calls, seconds)


def _of_features(task: Images, images: Tensor, labels: Tensor | None) -> Numbers:
    real, fake = _judged(task), judged(_judge(task), images)
    probability, guess = fake.log_probs.exp().max(-1)
    precision = inside(fake.features, real.features, task.neighbours).double().numpy()
    recall = inside(real.features, fake.features, task.neighbours).double().numpy()
    shares = _sides(task).training.labels.bincount().double()
    shares, guesses = (shares / shares.sum()).numpy(), guess.double().numpy()

    def apart(features: np.ndarray) -> float:
        return frechet(torch.from_numpy(features), real.features)

    def classes(guesses: np.ndarray) -> float:
        return classes_missed(guesses, shares)

    numbers: Numbers = {
        "frechet distance": (apart(fake.features.numpy()), error(fake.features.numpy(), apart)),
        "precision": (float(precision.mean()), error(precision)),
        "recall": (float(recall.mean()), error(recall)),
        "class tv": (classes(guesses), error(guesses, classes)),
        "confidence": (probability.mean().item(), error(probability.numpy())),
    }
    if labels is not None:
        right = (guess == labels).double().numpy()
        numbers["class accuracy"] = (float(right.mean()), error(right))
    return numbers


def _of_pixels(task: Images, images: Tensor) -> Numbers:
    real = _sides(task).training.inputs
    middle = torch.pdist(real[:500].flatten(1)).median().item()  # the usual bandwidth
    clouds = {"mmd": MMD(Gaussian(middle), unbiased=True), "energy distance": Energy(unbiased=True)}
    found: Numbers = {name: grouped(measure.between, real, images) for name, measure in clouds.items()}
    return found | {"pixel variance": (images.var(0).mean().item(), None)}


def _a_few(labels: Tensor) -> Tensor:
    """The first examples of each class, a class after another."""
    classes = labels.unique().tolist()
    each = max(1, SHOWN // len(classes))
    return torch.cat([(labels == label).nonzero()[:each, 0] for label in classes][:SHOWN])


def _shades(images: Tensor) -> list:
    """[N][rows][columns] whole numbers from 0 to 255, of the first channel."""
    rows = images[:, 0] if images.ndim == 4 else images.flatten(1).unsqueeze(1)
    return ((rows.clamp(-1, 1) + 1) * 127.5).round().int().tolist()


@lru_cache(maxsize=8)
def _sides(task: Images) -> Split:
    """Training and test examples, so that the training ones fill [-1, 1]."""
    split = separated(loaded(task.source, None, numeric=False), task.test, task.split)
    low, high = split.training.inputs.min(), split.training.inputs.max()
    if not low < high:
        raise ValueError(f"{task.source} has the same number everywhere: nothing is to be learnt")
    return Split(*(Labelled(2 * (s.inputs - low) / (high - low) - 1, s.labels) for s in split))


@lru_cache(maxsize=8)
def _judge(task: Images) -> Classifier:
    return judge(task.judge, _sides(task).training, task.classes)


@lru_cache(maxsize=8)
def _judged(task: Images) -> Judged:
    return judged(_judge(task), _sides(task).training.inputs)
