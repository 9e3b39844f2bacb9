"""Reward hacking, and what a penalty on actions and one on places do about it: a table and a picture.

python examples/plot_reward_hacking.py [folder]        about 4 minutes on one thread, no downloads

A gardener is trained by PPO on a proxy: how many plants look wet. In the shed all of them do. The penalties
keep to a decent gardener that hardly ever goes there; coefficients are in standard deviations of the proxy.
Each row: 3 seeds of PPO, and the optimum that exact gradients find for the same objective.
"""

import sys
from pathlib import Path

import torch
from matplotlib.lines import Line2D

import fdiv
from fdiv.environments.networks import OfState, OfStateAndAction
from fdiv.environments.occupancy import Follower, OccupancyPenalty
from fdiv.environments.on_policy import PPO, ActionPenalty, collect, started
from fdiv.environments.simulation import Simulations
from fdiv.environments.tabular import correlation, spread
from fdiv.environments.tomatoes import Tomatoes
from fdiv.evaluate.canvas import drawing, legend_below, save
from fdiv.evaluate.intervals import student_interval
from fdiv.evaluate.palette import DASHES, HUES, MARKERS
from fdiv.methods.rl.occupancy import OccupancyReward

SEEDS, ENVIRONMENTS, ITERATIONS = (0, 1, 2), 64, 150
METHOD = PPO(lr=5e-3)
GRID = {
    "none": (0.0,),
    "action KL": (10.0, 5.0, 2.0),
    "occupancy KL": (1.0, 0.5, 0.2),
    "occupancy chi2": (0.5, 0.2, 0.1),
}

GARDEN = Tomatoes()
MDP, FEATURES, _ = GARDEN.tables()
REFERENCE = GARDEN.gardener()
OCCUPANCY = MDP.occupancy(REFERENCE)
LOG_P = OCCUPANCY.log().flatten()
SCALE = spread(OCCUPANCY, MDP.reward).item()
COLUMNS = ("true", "proxy", "chi2", "chi2 seen")


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    r = correlation(OCCUPANCY, MDP.reward, MDP.true_reward).item()
    print(f"{ITERATIONS} iterations of {ENVIRONMENTS * METHOD.steps} steps; mean ± 95% interval over 3 seeds")
    print(f"proxy and true reward: r = {r:.3f} over the reference, sqrt(1 - r^2) = {(1 - r * r) ** 0.5:.2f}")
    heads = "".join(f"{name:>10}{'':9}" for name in COLUMNS) + f"{'exact true':>10}{'proxy':>8}"
    print(f"{'penalty':<16}{'beta':>5}{heads}")
    at_reference = measured(REFERENCE)
    print(f"{'(reference)':<21}" + "".join(f"{at_reference[name]:>10.3f}{'':9}" for name in COLUMNS[:3]))
    rows = {kind: [row(kind, beta) for beta in betas] for kind, betas in GRID.items()}
    with_places = max(sampled["true"].mean for _, sampled, *_ in rows["occupancy chi2"])
    with_actions = max(sampled["true"].mean for _, sampled, *_ in rows["action KL"])
    print(f"picture: {draw(rows, at_reference, folder)}")
    assert rows["none"][0][1]["true"].mean < at_reference["true"] < with_places, "it should hack, and not"
    assert with_actions < with_places


def row(kind, beta):
    """(beta, {column: interval over seeds}, what exact gradients find, the seeds), printed."""
    runs = [trained(kind, beta, seed) for seed in SEEDS]
    sampled = {name: student_interval([run[name] for run in runs]) for name in COLUMNS}
    exact = measured(MDP.optimise(objective(kind, beta), REFERENCE, steps=150))
    cells = "".join(
        f"{value.mean:>10.3f} ± {value.half:<6.2f}" if value.half is not None else f"{'-':>10}{'':9}"
        for value in sampled.values()
    )
    print(f"{kind:<16}{beta:>5g}{cells}{exact['true']:>10.3f}{exact['proxy']:>8.3f}", flush=True)
    return beta, sampled, exact, runs


def trained(kind, beta, seed):
    """What the policy of one run is worth, exactly, and the last chi-square that its discriminator saw."""
    samples = reference_samples(seed)
    torch.manual_seed(seed)
    policy, critic = OfState(FEATURES, 5, REFERENCE.log(), 32), OfState(FEATURES, 1, width=32)
    made = penalty(kind, beta * SCALE, seed, samples)
    logged = METHOD.train(Simulations(MDP, ENVIRONMENTS), policy, critic, ITERATIONS, seed, made)
    seen = logged[-1].get("chi_square", float("nan"))
    return measured(policy.table().softmax(-1)) | {"chi2 seen": seen}


def penalty(kind, beta, seed, samples):
    if kind == "none":
        return None
    if kind == "action KL":
        log_p = REFERENCE.log().float()
        return ActionPenalty(fdiv.ReverseKL(), beta, lambda states: log_p[states])
    prices = OccupancyReward() if kind == "occupancy chi2" else OccupancyReward(fdiv.ReverseKL(), root=False)
    return OccupancyPenalty(prices, beta, Follower(OfStateAndAction(FEATURES, 5), samples, seed))


def reference_samples(seed):
    """(states, actions) of the reference after its start is forgotten."""
    generator = torch.Generator().manual_seed(1000 + seed)
    envs, start = Simulations(MDP, ENVIRONMENTS), OfState(FEATURES, 5, REFERENCE.log(), 1)
    _, states = collect(envs, start, started(envs, 1000 + seed), 128, generator)
    rollout, _ = collect(envs, start, states, 1024, generator)
    return rollout.observation.flatten(), rollout.action.flatten()


def objective(kind, beta):
    """What the penalty stands for, of exact occupancies."""
    divergences = {
        "none": lambda q, policy: 0.0,
        "action KL": lambda q, policy: q.sum(-1) @ fdiv.ReverseKL()(REFERENCE.log(), policy.log()),
        "occupancy KL": lambda q, policy: fdiv.ReverseKL()(LOG_P, q.log().flatten()),
        "occupancy chi2": lambda q, policy: (fdiv.Neyman()(LOG_P, q.log().flatten()) + 1e-9).sqrt(),
    }
    return lambda q, policy: (q * MDP.reward).sum() - beta * SCALE * divergences[kind](q, policy)


def measured(policy):
    q = MDP.occupancy(policy)
    return {
        "true": (q * MDP.true_reward).sum().item(),
        "proxy": (q * MDP.reward).sum().item(),
        "chi2": fdiv.Neyman()(LOG_P, q.log().flatten()).item(),
    }


def draw(rows, at_reference, folder):
    with drawing(width=5.2, height=4.0) as figure:
        area, handles = figure.subplots(), []
        area.axhline(at_reference["true"], color="#8c959e", lw=0.8, ls=DASHES[1])
        area.plot(at_reference["proxy"], at_reference["true"], "*", color="#1d2733", ms=13, zorder=5)
        handles.append(Line2D([], [], color="#1d2733", marker="*", ls="", ms=11, label="reference"))
        for (kind, found), hue, marker in zip(rows.items(), HUES, MARKERS, strict=False):
            area.plot(
                [exact["proxy"] for _, _, exact, _ in found], [exact["true"] for _, _, exact, _ in found],
                color=hue, marker=marker, mfc="white", ls=DASHES[2], lw=1, alpha=0.7,
            )  # fmt: skip
            for beta, sampled, _, runs in found:
                x, y = sampled["proxy"], sampled["true"]
                area.plot([r["proxy"] for r in runs], [r["true"] for r in runs], ".", color=hue, alpha=0.5)
                area.errorbar(x.mean, y.mean, y.half, x.half, fmt=marker, color=hue, elinewidth=1, zorder=4)
                area.annotate(f"{beta:g}", (x.mean, y.mean), (5, 4), textcoords="offset points", fontsize=8)
            handles.append(Line2D([], [], color=hue, marker=marker, ls="", label=kind))
        handles.append(
            Line2D([], [], color="#6b7580", marker="o", mfc="white", ls=DASHES[2], label="exact gradients")
        )
        area.set(xlabel="proxy reward of an average step", ylabel="true reward of an average step")
        area.set(xlim=(0.58, 1.0), ylim=(0.0, 0.9))  # an interval of three seeds may be wider
        legend_below(figure, handles)
        save(figure, folder, "reward_hacking")
    return folder / "reward_hacking.png"


if __name__ == "__main__":
    main()
