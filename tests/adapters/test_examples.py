"""Every example runs to its end, where it asserts that something fell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny_world")
NEEDS = {
    "trl_distillation": "trl",
    "trl_dpo": "trl",
    "trl_grpo": "trl",
    "lightning_distillation": "lightning",
    "transformers_trainer": "accelerate",
    "plot_decision_boundaries": "sklearn",
    "plot_in_context_bandit": "matplotlib",
    "plot_monge_maps": "matplotlib",
    "plot_reward_hacking": "gymnasium",
    "plot_robust_put": "matplotlib",
    "plot_sparse_outputs": "matplotlib",
    "plot_transport_plans": "matplotlib",
    "plot_unlearning_digits": "sklearn",
    "warm_start": "gymnasium",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path):
    pytest.importorskip(NEEDS[name])
    run = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,  # pictures are written where one is
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()
