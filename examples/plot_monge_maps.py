"""
Learning the shortest map between two clouds
============================================

Many maps carry one cloud onto another, and a network that is trained to arrive finds any of them. The Monge
gap of a map is how much longer its points travel than they had to, to be where they arrive: with it in the
loss the network learns the shortest map, and need not be the gradient of a convex function by construction.

Both clouds are Gaussian, so that the shortest map is known. Prints a table (means over three seeds, with
their standard error) and writes `monge_maps.png`. Four minutes on one core.
"""

import sys
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment

from fdiv import MongeGap, Sinkhorn
from fdiv.transport.costs import squared_distance

STEPS, BATCH, TEST, SEEDS = 500, 128, 512, 3
STRENGTHS = (0.0, 0.01, 0.1, 1.0)  # of the gap in the loss
MEAN = torch.tensor([3.5, 1.0])
ROOT = torch.tensor([[1.1, 0.5], [0.5, 0.6]])  # positive definite: its square is the covariance of the target
ARRIVE, SHORT = Sinkhorn(blur=0.2, tolerance=1e-3), MongeGap(0.02, relative=True)


def source(number, generator):
    return torch.randn(number, 2, generator=generator)


def shortest(x):
    """The Monge map of N(0, I) to N(MEAN, ROOT^2)."""
    return x @ ROOT + MEAN


def network(seed):
    torch.manual_seed(seed)
    hidden = [torch.nn.Linear(2, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU()]
    return torch.nn.Sequential(*hidden, torch.nn.Linear(64, 2))


def train(strength, seed):
    """A plain network that is to arrive at the target, by a short way."""
    carry, generator = network(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(carry.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x, y = source(BATCH, generator), shortest(source(BATCH, generator))
        moved = carry(x)
        loss = ARRIVE.between(moved, y)
        if strength:
            loss = loss + strength * SHORT(x, moved)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return carry


@torch.no_grad()
def measure(carry, seed):
    """How far from the target it arrives, how much too long its way is, and how far the shortest map is."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x, y = source(TEST, generator), shortest(source(TEST, generator))
    moved = carry(x)
    costs = squared_distance(x, moved)
    gap = costs.diagonal().mean() - costs[linear_sum_assignment(costs.numpy())].mean()  # without entropy
    return torch.stack([ARRIVE.between(moved, y), gap, (moved - shortest(x)).square().sum(-1).mean()])


def main(folder="."):
    maps: dict[str, list] = {f"{s:g}": [train(s, seed) for seed in range(SEEDS)] for s in STRENGTHS}
    maps["the shortest map"] = [shortest] * SEEDS
    print(
        "strength of the gap".ljust(22), *(f"{name:>17}" for name in ("arrival", "gap", "off the shortest"))
    )
    for name, learnt in maps.items():
        table = torch.stack([measure(carry, seed) for seed, carry in enumerate(learnt)])
        cells = zip(table.mean(0), table.std(0) / SEEDS**0.5, strict=True)
        print(name.ljust(22), *(f"{mean:8.4f} ± {error:6.4f}" for mean, error in cells))
    draw([maps["0"][0], maps["0.1"][0], shortest], Path(folder) / "monge_maps.png")


@torch.no_grad()
def draw(maps, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    x = source(40, torch.Generator().manual_seed(7))
    target = shortest(source(400, torch.Generator().manual_seed(8)))
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 2.3), layout="constrained", sharex=True, sharey=True)
    for place, carry, title in zip(
        axes, maps, ("arrival alone", "with the gap", "the shortest map"), strict=True
    ):
        way = carry(x) - x
        place.scatter(*target.T, s=4, color="0.8", linewidths=0)
        place.quiver(*x.T, *way.T, angles="xy", scale_units="xy", scale=1, width=0.003, color="tab:blue")
        place.scatter(*x.T, s=6, color="tab:orange", zorder=3, linewidths=0)
        place.set(title=title, aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
