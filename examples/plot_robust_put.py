"""
An American put option under other markets than that of the data
================================================================

Offline data come from a market that goes up or down by 2 % with equal chances. A policy says when to exercise
a put option within 20 steps; it is then used where prices go up more often, or less. R2PVI plans against
dynamics that a divergence keeps near those of the data; at an infinite price `lam` of moving them it is the
nominal algorithm. The bound knows the market, and is found by dynamic programming on the tree of prices.

Prints a table (means over seeds, with their standard error) and writes `robust_put.png`. Seconds on one core.
"""

import math
import sys
from pathlib import Path

import torch

from fdiv import KL, TV, Pearson
from fdiv.methods.robust.r2pvi import R2PVI

STRIKE, UP, DOWN, HORIZON = 100.0, 1.02, 0.98, 20
TRAJECTORIES, ANCHORS, SEEDS, TESTS = 100, 30, 10, 2000
CHANCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of going up, in the market that the policy meets
PLANS = {
    "nominal": R2PVI(KL(), math.inf, beta=0.1, ridge=1.0, reward_max=STRIKE),
    "KL, lam = 5": R2PVI(KL(), 5.0, beta=0.1, ridge=1.0, reward_max=STRIKE),
    "chi-square, lam = 1": R2PVI(Pearson(), 1.0, beta=0.1, ridge=1.0, reward_max=STRIKE),
    "TV, lam = 5": R2PVI(TV(), 5.0, beta=0.1, ridge=1.0, reward_max=STRIKE),
}


def prices(chance, number, generator):
    """Paths [number, HORIZON] that begin between 95 and 105."""
    start = 95 + 10 * torch.rand(number, 1, generator=generator, dtype=torch.float64)
    up = torch.rand(number, HORIZON - 1, generator=generator, dtype=torch.float64) < chance
    steps = torch.where(up, UP, DOWN).double().cumprod(-1)
    return torch.cat([start, start * steps], -1)


def payoff(price):
    return (STRIKE - price).clamp(min=0.0)


def features(price):
    """Hat functions on anchors from 60 to 160, which sum to one; [..., ANCHORS]."""
    place = ((price - 60) / 100 * (ANCHORS - 1)).clamp(0, ANCHORS - 1).unsqueeze(-1)
    return (1 - (place - torch.arange(ANCHORS)).abs()).clamp(min=0.0)


def plan(method, data):
    """To go on is the one action; to exercise has a known return."""
    phi = features(data).transpose(0, 1)  # [steps, trajectories, anchors]
    return method(phi, phi[1:].unsqueeze(2), next_stop=payoff(data[:, 1:]).T)


def mean_return(method, planned, paths):
    """What the policy earns: it exercises as soon as that is worth more than to go on."""
    stops = torch.stack(
        [
            payoff(paths[:, h]) > method.action_values(planned, h, features(paths[:, h]))
            for h in range(HORIZON)
        ],
        -1,
    )
    first = torch.where(stops.any(-1), stops.double().argmax(-1), 0)
    earned = payoff(paths.gather(-1, first.unsqueeze(-1))).squeeze(-1)
    return torch.where(stops.any(-1), earned, 0.0).mean().item()


def best_return(chance, paths):
    """Of the policy that knows the chance: backward over the numbers of steps up, from each start."""
    start = paths[:, :1]
    ups = torch.arange(HORIZON, dtype=torch.float64)
    value = torch.zeros(len(start), HORIZON + 1, dtype=torch.float64)
    for h in range(HORIZON - 1, -1, -1):
        n = ups[: h + 1]
        going_on = chance * value[:, 1 : h + 2] + (1 - chance) * value[:, : h + 1]
        value = payoff(start * UP**n * DOWN ** (h - n)).maximum(going_on)
    return value.mean().item()


def experiment():
    """Returns [plans + 1, chances, seeds]; the last plan knows the market."""
    table = torch.zeros(len(PLANS) + 1, len(CHANCES), SEEDS)
    for seed in range(SEEDS):
        data = prices(0.5, TRAJECTORIES, torch.Generator().manual_seed(seed))
        plans = [plan(method, data) for method in PLANS.values()]
        for j, chance in enumerate(CHANCES):
            paths = prices(chance, TESTS, torch.Generator().manual_seed(1000 + seed))
            for i, method in enumerate(PLANS.values()):
                table[i, j, seed] = mean_return(method, plans[i], paths)
            table[-1, j, seed] = best_return(chance, paths)
    return table


def main(folder="."):
    table = experiment()
    names = [*PLANS, "knows the market"]
    print("up with chance".ljust(20), *(f"{chance:>13.1f}" for chance in CHANCES))
    for name, row in zip(names, table, strict=True):
        cells = [f"{cell.mean():6.2f} ± {cell.std() / SEEDS**0.5:4.2f}" for cell in row]
        print(name.ljust(20), *cells)
    draw(names, table, Path(folder) / "robust_put.png")


def draw(names, table, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, row in zip(names[:-1], table[:-1] / table[-1], strict=True):
        error = row.std(-1) / SEEDS**0.5
        axes.errorbar(CHANCES, row.mean(-1), error, label=name, marker="o", markersize=3, capsize=2)
    axes.axvline(0.5, color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="chance of going up (0.5 in the data)", ylabel="share of the return that knowledge earns")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
