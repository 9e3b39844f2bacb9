"""
Transport plans under several blurs and penalties
=================================================

Three hills against two, on a line. A large eps blurs the plan, a small one leaves a curve: the optimal map.
Where marginals may be missed, any f-divergence can be the price. KL thins out everywhere, most where mass has
far to go. Total variation carries mass whole or not at all: it cuts pieces out of the hills whose way costs
more than its weight. The squared Hellinger distance, which is bounded too, thins out, and even leaves some
mass where there should be next to none.

Prints what each plan carries and costs, and writes `transport_plans.png`. A few seconds on one core.
"""

import sys
from pathlib import Path

import torch

from fdiv import KL, TV, SquaredHellinger
from fdiv.transport.costs import squared_distance
from fdiv.transport.sinkhorn import Solver, sinkhorn

GRID = torch.linspace(0, 1, 120, dtype=torch.float64)
BLURS = (0.2, 0.05, 0.01)  # eps = blur^2
ROWS = {
    "balanced": "balanced",
    "KL, weight 0.05": 0.05 * KL(),
    "TV, weight 0.05": 0.05 * TV(),
    "Hellinger, weight 0.05": 0.05 * SquaredHellinger(),
}


def hills(*bumps):
    """A probability vector on the grid, from (mass, centre, width) of each hill."""
    law = sum(mass / width * (-((GRID - at) ** 2) / (2 * width**2)).exp() for mass, at, width in bumps)
    return (law / law.sum()).log()


LOG_A = hills((0.4, 0.15, 0.04), (0.35, 0.4, 0.05), (0.25, 0.85, 0.03))
LOG_B = hills((0.5, 0.25, 0.05), (0.5, 0.55, 0.07))


def plans():
    cost = squared_distance(GRID.unsqueeze(-1), GRID.unsqueeze(-1))
    solver = Solver(tolerance=1e-7)
    return {
        (name, blur): sinkhorn(cost, LOG_A, LOG_B, blur**2, marginals=penalty, solver=solver)
        for name, penalty in ROWS.items()
        for blur in BLURS
    }


def report(found):
    print(f"{'marginals':24}{'blur':>6}{'mass':>8}{'<P, C>':>9}{'steps':>7}{'error':>9}")
    for (name, blur), plan in found.items():
        mass = plan.marginals[0].sum()
        print(f"{name:24}{blur:6g}{mass:8.3f}{plan.linear:9.4f}{plan.iterations:7d}{plan.error:9.0e}")


def draw(found, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(ROWS), len(BLURS), figsize=(8.2, 10.6), layout="constrained")
    for row, name in enumerate(ROWS):
        for column, blur in enumerate(BLURS):
            _plan(axes[row, column], found[name, blur])
            if row == 0:
                axes[row, column].set_title(f"blur {blur:g}", fontsize=10)
        axes[row, 0].set_ylabel(name, fontsize=10)
    figure.suptitle("Plans between three hills (down) and two (across)", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plan(axis, plan):
    """The plan, with the wanted marginals (grey) and its own (blue) along two sides."""
    shown = (plan.plan / plan.plan.max()).sqrt().numpy()
    axis.imshow(
        shown, cmap="Blues", origin="upper", extent=(0, 1, 1, 0), interpolation="nearest", aspect="equal"
    )
    top = max(LOG_A.exp().max(), LOG_B.exp().max()).item()
    rows, columns = (marginal.numpy() / top * 0.16 for marginal in plan.marginals)
    wanted_rows, wanted_columns = (log.exp().numpy() / top * 0.16 for log in (LOG_A, LOG_B))
    grid = GRID.numpy()
    axis.fill_betweenx(grid, -wanted_rows, 0, color="0.82", lw=0)
    axis.plot(-rows, grid, color="tab:blue", lw=1)
    axis.fill_between(grid, -wanted_columns, 0, color="0.82", lw=0)
    axis.plot(grid, -columns, color="tab:blue", lw=1)
    axis.set(xlim=(-0.24, 1), ylim=(1, -0.24), xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    results = plans()
    report(results)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    draw(results, folder / "transport_plans.png")
