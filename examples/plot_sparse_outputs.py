"""
Outputs with zeros: what each divergence makes of the same scores
=================================================================

Left, the probability of one of three classes while its score rises, under several divergences at q = 1. Those
whose slope f'(0) is finite reach 0 and 1, the latter at the margin of their Fenchel-Young loss; others only
approach them, at unlike speeds. Right, the plane of two scores (the third is 0), coloured by how many classes
have any probability (under KL all three, everywhere), with lines where the best class has 0.5, 0.7 and 0.9.

Prints where the first class takes all, and writes `sparse_outputs.png`. Seconds on one core.
"""

import sys
from pathlib import Path

import torch

from fdiv import JS, KL, Alpha, ReverseKL, SquaredHellinger, f_softargmax

PATHS = {
    "KL (softmax)": KL(),
    "Alpha(1.5) (1.5-entmax)": Alpha(1.5),
    "Alpha(2) (sparsemax)": Alpha(2.0),
    "2 JS(0.5)": 2 * JS(0.5),
    "2 SquaredHellinger": 2 * SquaredHellinger(),
    "ReverseKL": ReverseKL(),
}
PLANES = {"Alpha(1.25)": Alpha(1.25), "Alpha(1.5)": Alpha(1.5), "Alpha(2)": Alpha(2.0)}
SCORES = torch.linspace(-6, 6, 481, dtype=torch.float64)


def path(divergence):
    """x_1 at the scores (s, 0, -1)."""
    rest = torch.tensor([0.0, -1.0], dtype=torch.float64).expand(len(SCORES), 2)
    return f_softargmax(torch.cat([SCORES[:, None], rest], -1), divergence)[:, 0]


def plane(divergence):
    """f_softargmax at the scores (a, b, 0), [b, a, 3]."""
    a, b = torch.meshgrid(SCORES, SCORES, indexing="xy")
    return f_softargmax(torch.stack([a, b, torch.zeros_like(a)], -1), divergence)


def main(folder="."):
    for name, divergence in PATHS.items():
        x = path(divergence)
        margin = divergence.phi(torch.zeros((), dtype=torch.float64)) - divergence.slope_at_zero
        print(f"{name:<26}x_1 at s = 2: {x[320]:.4f}   1 from s = {margin:.4g}")
    draw(Path(folder) / "sparse_outputs.png")


def draw(file):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained", width_ratios=[1.5, 1, 1, 1])
    for name, divergence in PATHS.items():
        axes[0].plot(SCORES, path(divergence), label=name, linewidth=1.4)
    axes[0].set(xlabel="score s of class 1; the others' are 0 and -1", ylabel="probability of class 1")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    for axis, (name, divergence) in zip(axes[1:], PLANES.items(), strict=True):
        x = plane(divergence)
        axis.contourf(
            SCORES, SCORES, (x > 0).sum(-1), [0.5, 1.5, 2.5, 3.5], colors=["#d9e8f5", "#f6e3b4", "#e9b7a8"]
        )
        axis.contour(SCORES, SCORES, x.amax(-1), [0.5, 0.7, 0.9], colors="0.4", linewidths=0.6)
        axis.set(title=f"{name}: classes held", xlabel="score of class 1", ylabel="score of class 2")
        axis.set_aspect("equal")
        for place, text in (((5.2, -4), "1"), ((4, 4.6), "2"), ((0.2, 0.2), "3")):
            axis.text(*place, text, ha="center", va="center", fontsize=10)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
