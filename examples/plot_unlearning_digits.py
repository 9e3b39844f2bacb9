"""
Unlearning handwritten digits by datamodel matching
===================================================

Small networks are trained on random halves of 150 digits, and linear datamodels are fitted to their logits.
They predict what a network would say that had not seen five of the digits; networks trained on all are then
fine-tuned to say so. Other ways to forget are compared by KLoM: at each example, the KL divergence from the
margins of the unlearned networks to those of networks that were really trained without the five.

Prints a table and writes `unlearning_digits.png`. Needs scikit-learn; a minute on one core.
"""

import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from fdiv.adapters.datamodels import fit_datamodels
from fdiv.methods.unlearn.datamodel_matching import DatamodelMatching, klom, margins

TRAINING, TEST, FORGET, HIDDEN = 150, 150, 5, 24
SUBSETS, MODELS, SEEDS = 600, 100, 3
GROUPS = ("forget", "retain", "test")


class Networks(torch.nn.Module):
    """Many networks of one hidden layer, trained side by side: all parameters have the models first."""

    def __init__(self, models, generator):
        super().__init__()
        shapes = ((models, 64, HIDDEN), (models, 1, HIDDEN), (models, HIDDEN, 10), (models, 1, 10))
        self.parts = torch.nn.ParameterList(
            torch.randn(shape, generator=generator) / shape[1] ** 0.5 * (shape[1] > 1) for shape in shapes
        )

    def forward(self, x):
        """Logits [models, examples, classes] of x [examples, 64] or [models, examples, 64]."""
        first, offset, second, level = self.parts
        return (x @ first + offset).relu() @ second + level

    def copy(self):
        other = Networks(len(self.parts[0]), None)
        other.load_state_dict(self.state_dict())
        return other


def minimise(networks, loss, steps, rate):
    """Adam on the sum over the models, each of which sees its own loss."""
    optimiser = torch.optim.Adam(networks.parameters(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    return networks


def trained(x, y, included, generator, steps=200, decay=3e-3):
    """Networks on the examples of x [n, 64] that their row of included [models, n] marks."""
    networks = Networks(len(included), generator)
    kept = included / included.sum(1, keepdim=True)

    def loss():
        error = -networks(x).log_softmax(-1)[:, torch.arange(len(y)), y]
        size = sum(part.square().sum() for part in networks.parts)
        return (kept * error).sum() + decay / 2 * size

    return minimise(networks, loss, steps, 0.01)


def matched(networks, x, target, rows, method, steps=100, rate=0.002):
    """The networks, fine-tuned to target [models, n, classes] at the rows."""
    copy = networks.copy()
    return minimise(
        copy, lambda: len(target) * method(target=target[:, rows], logits=copy(x[rows])).loss, steps, rate
    )


def ascended(networks, x, y, rows, steps, rate=0.002):
    copy = networks.copy()
    labels = y[rows]

    def loss():
        return copy(x[rows]).log_softmax(-1)[:, torch.arange(len(rows)), labels].mean(1).sum()

    return minimise(copy, loss, steps, rate)


def digits(seed):
    """(x, y) of training and test examples; the first FORGET are of one class, near one another."""
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: TRAINING + TEST]
    x, y = images[order].float() / 16, labels[order]
    near = (x[:TRAINING] - x[0]).square().sum(-1) + 1e3 * (y[:TRAINING] != y[0])
    order = torch.cat([near.argsort(), torch.arange(TRAINING, TRAINING + TEST)])
    return x[order], y[order]


def experiment(seed):
    """{name: KLoM [examples]} of each way to forget."""
    x, y = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    train_x, train_y = x[:TRAINING], y[:TRAINING]
    forget = torch.arange(FORGET)
    everything = torch.ones(MODELS, TRAINING)
    without = everything.clone()
    without[:, forget] = 0
    full, retrained, again = (
        trained(train_x, train_y, included, generator) for included in (everything, without, without)
    )
    halves = (torch.rand(SUBSETS, TRAINING, generator=generator) < 0.5).float()
    of_halves = trained(train_x, train_y, halves, generator)
    with torch.no_grad():
        outputs = of_halves(train_x)
        outputs = outputs - outputs.mean(-1, keepdim=True)  # the level of logits means nothing
        predicted = fit_datamodels(halves, outputs).without(full(train_x), forget)
        oracle = again(train_x)
    method = DatamodelMatching(retained=20)
    rows = method.rows(forget, TRAINING, generator)
    candidates = {
        "do nothing": full,
        "gradient ascent, 5 steps": ascended(full, train_x, train_y, forget, 5),
        "gradient ascent, 20 steps": ascended(full, train_x, train_y, forget, 20),
        "datamodel matching": matched(full, train_x, predicted, rows, method),
        "oracle matching": matched(full, train_x, oracle, rows, method),
        "retrained": again,
    }
    with torch.no_grad():
        target = margins(retrained(x), y)
        return {name: klom(margins(networks(x), y), target) for name, networks in candidates.items()}


def main(folder="."):
    start = time.perf_counter()
    runs = [experiment(seed) for seed in range(SEEDS)]
    parts = dict(zip(GROUPS, (slice(0, FORGET), slice(FORGET, TRAINING), slice(TRAINING, None)), strict=True))
    table = {
        name: torch.tensor([[run[name][part].mean() for part in parts.values()] for run in runs])
        for name in runs[0]
    }
    print("KLoM, mean over".ljust(26), *(group.rjust(15) for group in GROUPS))
    for name, rows in table.items():
        cells = [f"{m:7.3f} ± {s:5.3f}" for m, s in zip(rows.mean(0), rows.std(0), strict=True)]
        print(name.ljust(26), *cells)
    print(f"{SEEDS} seeds, {time.perf_counter() - start:.0f} s")
    draw(table, Path(folder) / "unlearning_digits.png")


def draw(table, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for i, group in enumerate(GROUPS):
        means = torch.stack([rows[:, i] for rows in table.values()])
        places = torch.arange(len(table)) + 0.2 * (i - 1)
        axes.errorbar(means.mean(1), places, xerr=means.std(1), fmt="o", markersize=4, capsize=2, label=group)
    axes.set_yticks(range(len(table)), table)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="KL of margins from networks trained without the forget set")
    axes.legend(frameon=False, title="examples", loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
