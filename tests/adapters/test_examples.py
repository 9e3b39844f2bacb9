"""Every example runs to its end, where it asserts that something fell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny_world")
NEEDS = {"trl": "trl", "lightning": "lightning", "transformers": "accelerate"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name):
    pytest.importorskip(NEEDS[name.split("_")[0]])
    run = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "step" in run.stdout
