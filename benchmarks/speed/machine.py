"""Where and with what was measured, and how the process is set up for it."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "trl", "liger-kernel", "entmax", "POT", "geomloss", "transformers", "triton")


def settle() -> None:
    """One thread, no accelerator, nothing fetched; to be called before any peer is imported."""
    torch.set_num_threads(1)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # it would be idle, and its threads stand in the way of a fork
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of processes that a forked child cannot reach
        "HF_HUB_OFFLINE": "1",
    }


def environment() -> dict[str, str]:
    """The columns that stand at the head of every line of a CSV."""
    return {
        "cpu": f"{cpu_model()}, {os.cpu_count()} CPUs",
        "threads": str(torch.get_num_threads()),
        "date": date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def short_name() -> str:
    """A file name for this kind of machine."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {os.cpu_count()} cpus".lower()).strip("-")


def cpu_model() -> str:
    """Its name; where a virtual machine hides that, family and model number tell it."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE))
    name = found.get("model name", platform.machine())
    return f"{name} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def commit() -> str:
    """The short hash of HEAD, with a mark if the tree differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{head}, changed" if git("status", "--porcelain", "--", "src", "benchmarks/speed") else head


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
