"""A made-up run folder in the shape that training writes, for the report's tests.

To look at the report: `python tests/evaluate/conftest.py FOLDER`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

NAMES = (
    "KL()",
    "ReverseKL()",
    "JS(beta=0.5)",
    "SkewKL(skew=0.1)",
    "SkewReverseKL(skew=0.1)",
    "TV()",
    "SquaredHellinger()",
    "Alpha(alpha=0.5)",
)
KS = [1, 2, 4, 8, 16, 32, 64]


def slug(label):
    return "".join(c if c.isalnum() else "-" for c in label.lower()).strip("-")


def distill_recipe():
    return {
        "name": "distil",
        "title": "Distilling a narrow student",
        "kind": "distill",
        "question": "Which answers does a student keep when it cannot keep all of the teacher's?",
        "about": "A small student learns a teacher; only the divergence differs.",
        "target": "the teacher's distribution over answers",
        "frontier": {
            "x": "coverage@64",
            "y": "pass@1",
            "x_label": "coverage@64",
            "y_label": "pass@1",
        },
        "table": ["pass@1", "pass@64", "coverage@64", "modes", "entropy", "ece", "ece_null"],
        "matrix": True,
        "sweep": None,
        "references": ["teacher", "base"],
        "notes": ["The world is synthetic and small.", "One student size."],
        "expect": [
            {
                "claim": "Reverse KL is more precise than KL",
                "left": ["ReverseKL()", "pass@1"],
                "right": ["KL()", "pass@1"],
                "margin": 0.05,
            },
            {
                "claim": "KL covers more than reverse KL",
                "left": ["KL()", "coverage@64"],
                "right": ["ReverseKL()", "coverage@64"],
                "margin": 0.0,
            },
            {
                "claim": "TV covers more than KL",
                "left": ["TV()", "coverage@64"],
                "right": ["KL()", "coverage@64"],
                "margin": 0.0,
            },
            {
                "claim": "JS keeps more than two modes",
                "left": ["JS(beta=0.5)", "modes"],
                "right": 2.0,
            },
            {
                "claim": "Rényi beats KL",
                "left": ["Renyi(alpha=2)", "pass@1"],
                "right": ["KL()", "pass@1"],
            },
        ],
    }


def sweep_recipe():
    return {
        "name": "rl",
        "title": "Reward against distance",
        "kind": "rl",
        "question": "What does a unit of reward cost in distance from the reference?",
        "target": "the reference policy tilted by the reward",
        "frontier": {
            "x": "kl to reference",
            "y": "reward",
            "x_label": "KL to the reference (nats)",
            "y_label": "mean reward",
        },
        "table": ["reward", "kl to reference", "entropy", "distinct-2"],
        "matrix": False,
        "sweep": {"x": "kl to reference", "y": "reward", "parameter": "beta"},
        "references": ["reference policy"],
        "notes": [],
        "expect": [],
    }


def write_chapter(folder, recipe, records, seeds=(0, 1, 2)):
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "python": "3.11.7",
        "torch": "2.13.0",
        "transformers": "5.0",
        "fdiv": "0.1.0",
        "platform": "Linux x86_64",
        "threads": 2,
        "command": f"fdiv run {recipe['name']}",
        "seeds": list(seeds),
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "environment.json").write_text(json.dumps(environment))
    for record, metrics in records:
        run = folder / f"seed-{record['seed']}" / record["slug"]
        run.mkdir(parents=True)
        (run / "evaluation.json").write_text(json.dumps(record))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


def distill_record(index, label, role, seed):
    """A member's numbers on an imagined line from covering (KL) to seeking (reverse KL)."""
    random = np.random.default_rng([index, seed])
    seeking = {"KL()": 0.1, "ReverseKL()": 0.95, "teacher": 0.3, "base": -0.4}.get(label, 0.2 + 0.09 * index)
    p = np.clip(0.45 + 0.3 * seeking + random.normal(0, 0.012), 0, 1)
    coverage = 9 - 5 * seeking + random.normal(0, 0.2)
    bins = [
        {
            "confidence": c,
            "accuracy": float(np.clip(c - 0.15 * seeking * c + random.normal(0, 0.03), 0, 1)),
            "weight": 0.1,
        }
        for c in np.linspace(0.05, 0.95, 10)
    ]
    ece = float(sum(b["weight"] * abs(b["confidence"] - b["accuracy"]) for b in bins))
    scalars = {
        "pass@1": p,
        "pass@64": 1 - (1 - p) ** (6 - 4 * seeking),
        "coverage@64": coverage,
        "modes": coverage / 2,
        "entropy": 2.4 - 1.6 * seeking,
        "ece": ece,
        "ece_null": 0.018 + 0.002 * random.random(),
    }
    divergences = {
        n: float(0.2 + abs(index - j) * 0.11 + random.normal(0, 0.01)) * (1 + 3 * (j == 6))
        for j, n in enumerate(NAMES)
    }
    return {
        "label": label,
        "slug": slug(label),
        "role": role,
        "divergence": label if role == "member" else None,
        "method": f"GKD(divergence={label})" if role == "member" else "",
        "group": None,
        "parameter": None,
        "seed": seed,
        "exact": True,
        "seconds": 5.1,
        "parameters": 872,
        "steps": 1000,
        "scalars": {k: float(v) for k, v in scalars.items()},
        "curves": {
            "pass@k (held-out prompts)": {
                "x": KS,
                "y": [float(1 - (1 - p) ** (1 + (k - 1) * (0.6 - 0.5 * seeking))) for k in KS],
            }
        },
        "divergences": divergences,
        "calibration": {"ece": ece, "ece_null": 0.018, "bins": bins},
        "samples": [
            {
                "prompt": f"{a} + {a} =",
                "outputs": [str(2 * a), str(2 * a + index % 3), f"{2 * a} because"],
                "valid": [True, index % 3 == 0, False],
            }
            for a in range(2, 6)
        ],
    }


def training_rows(index, seed, steps=1000, every=10):
    random = np.random.default_rng([index, seed, 1])
    for step in range(0, steps, every):
        decay = np.exp(-step / (150 + 40 * index))
        loss = (1 + index) * (0.15 + decay) * np.exp(random.normal(0, 0.08))
        yield {
            "step": step,
            "loss": float(loss),
            "entropy": float(1 + 2 * decay + 0.1 * index),
            "lr": 1e-3,
        }


def distill(folder, names=NAMES, seeds=(0, 1, 2)):
    labels = [(n, "member") for n in names] + [("teacher", "reference"), ("base", "reference")]
    records = [
        (distill_record(i, label, role, s), list(training_rows(i, s)) if role == "member" else [])
        for i, (label, role) in enumerate(labels)
        for s in seeds
    ]
    return write_chapter(folder, distill_recipe(), records, seeds)


def sweep(
    folder,
    groups=("KL()", "ReverseKL()", "JS(beta=0.5)", "Alpha(alpha=0.5)"),
    betas=(0.03, 0.1, 0.3, 1.0),
):
    records = []
    for i, group in enumerate(groups):
        for beta in betas:
            for seed in (0, 1, 2):
                random = np.random.default_rng([i, seed, int(100 * beta)])
                far = 1.2 / (0.2 + beta) * (1 - 0.1 * i)
                label = f"{group} beta={beta:g}"
                scalars = {
                    "reward": 1 - np.exp(-far * (0.5 + 0.1 * i)) + random.normal(0, 0.01),
                    "kl to reference": far + random.normal(0, 0.05),
                    "entropy": 3 - 0.3 * far,
                    "distinct-2": 0.8 - 0.08 * far,
                }
                rows = [
                    {**row, "loss": -row["loss"], "reward": 1 - row["loss"] / 9}
                    for row in training_rows(i, seed)
                ]
                record = {
                    "label": label,
                    "slug": slug(label),
                    "role": "member",
                    "divergence": group,
                    "group": group,
                }
                record |= {
                    "parameter": {"beta": beta},
                    "seed": seed,
                    "scalars": {k: float(v) for k, v in scalars.items()},
                    "exact": False,
                }
                records.append((record, rows))
    reference = {"reward": 0.2, "kl to reference": 0.0, "entropy": 3.1}
    records.append(
        (
            {
                "label": "reference policy",
                "slug": "reference",
                "role": "reference",
                "seed": 0,
                "scalars": reference,
            },
            [],
        )
    )
    return write_chapter(folder, sweep_recipe(), records)


@pytest.fixture
def write_distill():
    """The generator itself, for tests that change a run folder or want fewer seeds."""
    return distill


@pytest.fixture(scope="session")
def distill_folder(tmp_path_factory):
    return distill(tmp_path_factory.mktemp("runs") / "distil")


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("runs") / "rl")


if __name__ == "__main__":
    from fdiv.evaluate.report import write_report

    out = Path(sys.argv[1])
    chapters = [distill(out / "runs" / "distil"), sweep(out / "runs" / "rl")]
    (out / "runs" / "distil" / "seed-2" / "tv" / "evaluation.json").unlink()
    print(write_report(chapters, out / "report"))
