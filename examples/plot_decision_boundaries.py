"""
Decision boundaries of four losses
==================================

Two moons, one of them rare: 300 blue points and 30 orange ones, and a small network trained on all of them
by cross-entropy, by the worst mean loss in a KL ball (DRO), by the sparsemax loss (Fenchel-Young, alpha = 2),
and by TRADES, which keeps the prediction the same in a ball around each point.

Prints a table over test points of equally frequent classes (means over five seeds, with their standard
error), and writes `decision_boundaries.png`: black is where both classes have the same chance, dotted where
one has nine times the other's. Half a minute on one core.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import make_moons

from fdiv import DRO, TRADES, Alpha, Attack
from fdiv.methods.robust.attacks import evaluated
from fdiv.methods.supervise.fenchel_young import FenchelYoung

SEEDS, STEPS, COMMON, RARE, NOISE = 5, 150, 300, 30, 0.2
ATTACK = Attack(epsilon=0.2, steps=10, norm="l2", bounds=None)
CLOSE = Attack(epsilon=0.2, steps=4, norm="l2", bounds=None, start="normal", noise=0.01)
METHODS = {
    "cross-entropy": DRO(rho=0.0),  # no ball: equal weights
    "DRO, KL ball of 0.3": DRO(rho=0.3),
    "Fenchel-Young, alpha = 2": FenchelYoung(Alpha(2.0)),
    "TRADES, ball of 0.2": TRADES(
        beta=1.0, attack=Attack(0.2, 4, norm="l2", bounds=None, start="normal", noise=0.01)
    ),
}


def moons(counts, seed):
    """(points [N, 2], classes [N])."""
    points, labels = make_moons(counts, noise=NOISE, random_state=seed)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


def train(method, seed):
    points, labels = moons((COMMON, RARE), seed)
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(STEPS):
        known = {"logits": network(points), "labels": labels, "inputs": points, "network": network}
        out = method(**{name: known[name] for name in getattr(method, "reads", ("logits", "labels"))})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return network


def log_probs(method, logits):
    return method.log_probs(logits) if hasattr(method, "log_probs") else logits.log_softmax(-1)


def measured(network, seed):
    """(accuracy of the common class, of the rare one, of both under attack)."""
    points, labels = moons((1000, 1000), 1000 + seed)
    right = network(points).argmax(-1) == labels
    torch.manual_seed(seed)
    with evaluated(network):
        moved = ATTACK(
            points, lambda x: torch.nn.functional.cross_entropy(network(x), labels, reduction="none")
        )
    robust = network(moved).argmax(-1) == labels
    return [rows.float().mean().item() for rows in (right[labels == 0], right[labels == 1], robust)]


def main(folder="."):
    table, first = torch.zeros(len(METHODS), SEEDS, 3), []
    for i, method in enumerate(METHODS.values()):
        for seed in range(SEEDS):
            network = train(method, seed)
            table[i, seed] = torch.tensor(measured(network, seed))
            first += [network] if seed == 0 else []
    print("".ljust(26), "common class", "  rare class", "under attack")
    for name, row in zip(METHODS, table, strict=True):
        cells = zip(row.mean(0), row.std(0) / SEEDS**0.5, strict=True)
        print(name.ljust(26), *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells))
    draw(first, Path(folder) / "decision_boundaries.png")


def draw(networks, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("sides", ["#3b6ea8", "#f4f2ee", "#d9742b"])
    x, y = torch.meshgrid(torch.linspace(-2.0, 3.0, 300), torch.linspace(-1.5, 2.0, 210), indexing="xy")
    points, labels = moons((COMMON, RARE), 0)
    figure, panels = plt.subplots(1, 4, figsize=(13, 2.7), layout="constrained", sharex=True, sharey=True)
    for panel, (name, method), network in zip(panels, METHODS.items(), networks, strict=True):
        with torch.no_grad():
            chance = log_probs(method, network(torch.stack([x, y], -1).reshape(-1, 2)))[:, 1].exp()
        chance = chance.reshape(x.shape)
        image = panel.pcolormesh(x, y, chance, cmap=colours, vmin=0, vmax=1, rasterized=True)
        panel.contour(x, y, chance, [0.5], colors="black", linewidths=1.2)
        panel.contour(x, y, chance, [0.1, 0.9], colors="black", linewidths=0.6, linestyles="dotted")
        for label, colour in enumerate(("#24507f", "#b3540f")):
            some = points[labels == label]
            panel.scatter(some[:, 0], some[:, 1], s=7, color=colour, edgecolors="white", linewidths=0.3)
        panel.set_title(name, fontsize=10)
        panel.set(xticks=[], yticks=[], aspect="equal")
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01)
    bar.set_label("probability of the rare class", labelpad=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
