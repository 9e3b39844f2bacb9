"""
One Gaussian for two modes
==========================

A generator that is too small for its data has to leave something out, and the divergence says what. Here it
can make one Gaussian and nothing else, and the data have two modes. Under reverse KL, JS or Hellinger the
best is the heavier mode, drawn exactly; under KL and Pearson's chi-square it is a wide Gaussian over both,
most of whose samples look like nothing in the data. Jeffreys, the sum of both KL, lies between.

Each Gaussian is the nearest of all, found by descent from twelve starts on the exact divergence. Prints a
table and writes `generators.png`. Ten seconds on one core.
"""

import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from fdiv import JS, KL, TV, Jeffreys, Neyman, Pearson, ReverseKL, SquaredHellinger
from fdiv.diffusion.mixture import Mixture

TARGET = Mixture(((-3.0,), (3.0,)), (0.6, 0.6), (0.65, 0.35))
DIVERGENCES = {
    "Neyman": Neyman(),
    "reverse KL": ReverseKL(),
    "Hellinger": SquaredHellinger(),
    "JS": JS(0.5),
    "TV": TV(),
    "Jeffreys": Jeffreys(),
    "KL": KL(),
    "Pearson": Pearson(),
}
X = torch.linspace(-14, 14, 561, dtype=torch.float64)
STARTS = torch.cartesian_prod(torch.tensor([-3.0, -1.0, 0.0, 3.0]), torch.tensor([0.6, 1.5, 3.0])).double()
STEPS, RATE = 300, 0.05
SEEKING, BETWEEN, COVERING, DATA = "#1f4e9c", "#7a3b8f", "#c4511d", "#c9ced4"


def log_density(mean, scale):
    """Of Gaussians, on the grid: [starts, X]."""
    z = (X - mean.unsqueeze(-1)) / scale.unsqueeze(-1)
    return -z.square() / 2 - (scale * math.sqrt(2 * math.pi)).log().unsqueeze(-1)


def nearest(divergence):
    """(mean, scale, divergence) of the Gaussian nearest to the target."""
    cell = (X[1] - X[0]).log()
    log_p = (TARGET.log_prob(X.unsqueeze(-1)) + cell).expand(len(STARTS), -1)
    mean, log_scale = (column.clone().requires_grad_(True) for column in (STARTS[:, 0], STARTS[:, 1].log()))
    optimizer = torch.optim.Adam([mean, log_scale], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        divergence(log_p, log_density(mean, log_scale.exp()) + cell).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        values = divergence(log_p, log_density(mean, log_scale.exp()) + cell)
        best = values.argmin()
        return mean[best].item(), log_scale[best].exp().item(), values[best].item()


def draw(found):
    """A panel each, in order of how wide the student is."""
    order = sorted(found, key=lambda name: (round(found[name][1], 2), list(DIVERGENCES).index(name)))
    figure = Figure(figsize=(10, 4.7), layout="constrained")
    p = TARGET.log_prob(X.unsqueeze(-1)).exp()
    for panel, name in zip(figure.subplots(2, 4, sharex=True, sharey=True).flat, order, strict=True):
        mean, scale, _ = found[name]
        q = log_density(torch.tensor([mean]), torch.tensor([scale]))[0].exp()
        colour = SEEKING if scale < 1 else BETWEEN if scale < 2 else COVERING
        panel.fill_between(X, p, color=DATA, lw=0)
        panel.plot(X, q, color=colour, lw=2.2)
        panel.set_title(name, color=colour, fontsize=13, fontweight="bold")
        panel.set(xlim=(-8, 8), ylim=(0, 0.72), yticks=[], xticks=[-3, 3])
        panel.spines[["top", "left", "right"]].set_visible(False)
    figure.suptitle(
        "One Gaussian (line) for data with two modes (grey): what each divergence asks for\n"
        "blue: one mode      purple: between      orange: over both",
        fontsize=12,
    )
    return figure


def main(folder="."):
    found = {name: nearest(divergence) for name, divergence in DIVERGENCES.items()}
    print("divergence    mean   deviation   value")
    for name, (mean, scale, value) in found.items():
        print(f"{name:11} {mean:6.2f} {scale:11.2f} {value:7.3f}")
    draw(found).savefig(Path(folder) / "generators.png", dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
