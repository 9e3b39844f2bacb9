"""Under DDP a step is that of one process on the whole batch, though its tokens are dealt out unevenly."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("trl")

from tests.adapters import two_processes


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "tests.adapters.two_processes", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    one, two = two_processes.moved(tmp_path, 1), torch.load(tmp_path / "steps.pt")
    for name, step in one.items():
        torch.testing.assert_close(two[name], step, rtol=1e-4, atol=1e-4 * step.abs().max().item(), msg=name)
        torch.testing.assert_close(step, one["trainer"], rtol=1e-4, atol=1e-6, msg=name)
