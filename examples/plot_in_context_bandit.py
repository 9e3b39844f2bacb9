"""
A transformer that learns Thompson sampling in context
======================================================

A bandit of four arms is a text of 30 words: each word is an arm and whether it paid. A small Llama reads the
history and is trained to match, at every step, what Thompson sampling would do there. On new bandits it then
explores and settles by itself, without any change of its weights. The histories are those of a context
algorithm: Thompson sampling that pulls an arm at random in half of the steps.

Prints a table of regrets and writes `in_context_bandit.png`. Needs transformers; two minutes on one core.
"""

import sys
import time
from pathlib import Path

import torch

from fdiv import KL, SquaredHellinger
from fdiv.adapters.transformers import CausalLM
from fdiv.environments.bandits import Bandits, BetaThompson, Explored, LinUCB, play, uniform
from fdiv.methods.rl.dpt import DPT, coverage, of_actions

ARMS, STEPS, BANDITS, TESTS, SEEDS, UPDATES = 4, 30, 2000, 500, 3, 250
START = 2 * ARMS  # the word before the first pull
EXPERT, CONTEXT = BetaThompson(), Explored(BetaThompson(), 0.5)


def words(history):
    """[B, t + 1]: START, then 2 arm + reward of each pull."""
    start = torch.full((len(history.actions), 1), START)
    return torch.cat([start, 2 * history.actions + history.rewards.long()], 1)


class Reader:
    """A Llama as an algorithm: the log-probabilities of the arms after a history."""

    def __init__(self, seed):
        lm = CausalLM.fresh(START + 1, hidden_size=32, layers=2, heads=2, seed=seed, positions=STEPS + 1)
        self.model = lm.model

    def everywhere(self, text):
        """[B, t, arms] of text [B, t]."""
        return self.model(input_ids=text).logits[..., :ARMS].log_softmax(-1)

    @torch.no_grad()
    def __call__(self, history):
        return self.everywhere(words(history))[:, -1]


def pretrained(method, text, log_p, seed):
    reader = Reader(seed)
    optimiser = torch.optim.Adam(reader.model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, UPDATES)
    source = torch.Generator().manual_seed(seed)
    for _ in range(UPDATES):
        rows = torch.randint(len(text), (64,), generator=source)
        optimiser.zero_grad()
        method(log_p=log_p[rows], log_q=reader.everywhere(text[rows])).loss.backward()
        optimiser.step()
        schedule.step()
    return reader


def experiment(seed):
    """({name: regret up to each step [STEPS]}, coverage)."""
    source = torch.Generator().manual_seed(seed)
    made = play(Bandits.bernoulli(BANDITS, ARMS, source), CONTEXT, STEPS, source)
    text = words(made.history)[:, :STEPS]
    log_p = made.judged_by(EXPERT)
    drawn = log_p.exp().flatten(0, 1).multinomial(1, generator=source).view(BANDITS, STEPS)
    algorithms = {
        "uniform": uniform,
        "context algorithm": CONTEXT,
        "LinUCB": LinUCB(0.5),
        "Thompson sampling": EXPERT,
        "DPT, KL": pretrained(DPT(KL()), text, log_p, seed),
        "DPT, KL to actions": pretrained(DPT(KL()), text, of_actions(drawn, ARMS), seed),
        "DPT, Hellinger": pretrained(DPT(SquaredHellinger()), text, log_p, seed),
        "DPT, Hellinger to actions": pretrained(DPT(SquaredHellinger()), text, of_actions(drawn, ARMS), seed),
    }
    bandits = Bandits.bernoulli(TESTS, ARMS, torch.Generator().manual_seed(100 + seed))
    regrets = {
        name: play(bandits, algorithm, STEPS, torch.Generator().manual_seed(seed)).regret.cumsum(-1).mean(0)
        for name, algorithm in algorithms.items()
    }
    return regrets, coverage(log_p, made.log_context, made.history.actions)


def main(folder="."):
    start = time.perf_counter()
    runs, covers = zip(*(experiment(seed) for seed in range(SEEDS)), strict=True)
    curves = {name: torch.stack([run[name] for run in runs]) for name in runs[0]}
    print(f"regret after {STEPS} steps, {ARMS} arms".ljust(34), "mean ± deviation over seeds")
    for name, rows in curves.items():
        print(name.ljust(34), f"{rows[:, -1].mean():6.2f} ± {rows[:, -1].std():4.2f}")
    log_ratio, effective, largest = (torch.stack(column) for column in zip(*covers, strict=True))
    print(
        f"log(1 + chi-square of expert and context): {log_ratio.mean():.2f}, from {effective.mean():.1%} of "
        f"the trajectories; log of the largest ratio: at most {largest.max():.1f}"
    )
    print(f"{SEEDS} seeds, {time.perf_counter() - start:.0f} s")
    draw(curves, Path(folder) / "in_context_bandit.png")


def draw(curves, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, rows in curves.items():
        style = "-" if name.startswith("DPT") else "--"
        axes.plot(range(1, STEPS + 1), rows.mean(0), style, label=name, linewidth=1.5)
    axes.set(xlabel="steps", ylabel="regret so far, mean over new bandits", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
