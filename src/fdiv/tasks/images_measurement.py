"""What a generator of images is measured by: features of a small classifier, and clouds of pixels.

The Frechet distance is between Gaussians of the features' moments (Heusel et al., arXiv 1706.08500);
precision and recall are shares of points that lie in a ball about one of the other cloud, as far as its k-th
nearest neighbour there (Kynkaanniemi et al., arXiv 1904.06991).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fdiv.adapters.classifier import Classifier
from fdiv.methods.robust.attacks import evaluated
from fdiv.networks._network import Architecture
from fdiv.tasks.labelled import Labelled
from fdiv.transport.gaussian import wasserstein

RIDGE = 1e-6  # on the variance of features, of which some never fire
STEPS, BATCH, RATE = 400, 64, 3e-3  # of the judge's training


class Judged(NamedTuple):
    """Features [N, width] float64 and log-probabilities of the classes [N, C]."""

    features: Tensor
    log_probs: Tensor


def judge(architecture: Architecture, data: Labelled, classes: int) -> Classifier:
    """A classifier of the data, the same whenever it is trained again."""
    made = Classifier.fresh(architecture, data.inputs.shape[1:], classes, seed=0)
    network, generator = made.model.train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    for _ in range(STEPS):
        rows = data.rows(torch.randint(len(data.inputs), (BATCH,), generator=generator))
        with torch.enable_grad():
            cross_entropy(network(rows.inputs), rows.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval().requires_grad_(False)
    return made


@torch.no_grad()
def judged(model: Classifier, images: Tensor) -> Judged:
    network: Any = model.model
    with evaluated(network):
        features = network.features(images)
    return Judged(features.double(), network.head(features).double().log_softmax(-1))


def frechet(x: Tensor, y: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^1/2) of features [N, d] and [M, d]."""
    sides = [(t.mean(0), t.T.cov() + RIDGE * torch.eye(t.shape[1]).to(t)) for t in (x, y)]
    return wasserstein(*sides[0], *sides[1]).item()


def inside(points: Tensor, cloud: Tensor, neighbours: int) -> Tensor:
    """Whether each point [N, d] is as near to one of the cloud [M, d] as that one's k-th neighbour there."""
    radii = torch.cdist(cloud, cloud).kthvalue(neighbours + 1).values  # the first is the point itself
    return (torch.cdist(points, cloud) <= radii).any(1)


def classes_missed(guesses: np.ndarray, shares: np.ndarray) -> float:
    """Total variation between the shares of the classes in samples, as they are judged, and in the data."""
    found = np.bincount(guesses.astype(int), minlength=len(shares)) / len(guesses)
    return float(np.abs(found - shares).sum() / 2)
