"""Time, memory and error of a callable that does one whole step and returns what it computed."""

import ctypes
import gc
import json
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], Any]
MEMORY_SHARE = 0.6  # of what the machine has free: the most that one candidate may take
M_MMAP_THRESHOLD, PR_SET_PDEATHSIG = -3, 1  # of malloc.h and prctl.h
PATIENCE = 300  # seconds that a candidate may spend on the measurement of its memory


class Absent(Exception):
    """A candidate cannot run here: its package is not installed, or it does not cover the setting."""


class Ratio(NamedTuple):
    """Median and range of paired ratios."""

    median: float
    low: float
    high: float


def alternate(steps: Mapping[str, Step], rounds: int, repeat: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each step in each round, in the order A B C A B C: all see the same neighbours."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(cpu_seconds(step, repeat))
    return seconds


def cpu_seconds(step: Step, repeat: int = 1) -> float:
    """Process time and not wall time: on a shared machine only this is the step's own."""
    gc.collect()
    started = time.process_time()
    for _ in range(repeat):
        step()
    return (time.process_time() - started) / repeat


def paired_ratio(of: list[float], to: list[float]) -> Ratio:
    """of / to, round by round: what slows a whole round down cancels."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||, in the precision of `exact`."""
    return ((value.to(exact.dtype) - exact).norm() / exact.norm()).item()


def peak_megabytes(step: Step) -> float:
    """How far resident memory rises above what is held before `step`; what it returns is included.

    In a forked child, so that nothing is left behind and exceeding the limit ends the child alone. The
    child runs the step once before, for a fork starts without the pages of the libraries that it uses.
    """
    gc.collect()
    _give_back_freed_memory()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _report_peak(step, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        reasons = {int(signal.SIGALRM): f"longer than {PATIENCE} s", int(signal.SIGKILL): "killed"}
        raise MemoryError(reasons.get(os.WTERMSIG(status), f"ended with status {status}"))
    result = json.loads(answer)
    if "error" in result:
        raise MemoryError(result["error"])
    return result["megabytes"]


def _report_peak(step: Step, writer: int) -> None:
    """The child's part: it never returns."""
    try:
        ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphan that holds gigabytes
        signal.alarm(PATIENCE)
        allowed = _limit_memory()
        try:
            result: dict[str, Any] = {"megabytes": _rise_in_an_empty_heap(step)}
        except (RuntimeError, MemoryError) as error:
            short = "memory" in str(error) or isinstance(error, MemoryError)
            result = {"error": f"needs more than {allowed:.0f} MB" if short else one_line(error)}
        os.write(writer, json.dumps(result).encode())
    finally:
        os._exit(0)


def _rise_in_an_empty_heap(step: Step) -> float:
    """Large blocks come from the system and leave at once: the peak does not depend on what ran before.

    By default glibc moves the size from which that holds, and serves large blocks from the heap while it has
    gaps left by earlier steps. A new thread has a heap of its own.
    """
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**20)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        return thread.submit(_rise, step).result()


def _rise(step: Step) -> float:
    step()
    gc.collect()
    _give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present VmRSS
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _limit_memory() -> float:
    """Make allocations beyond a share of the free memory fail; returns that share in MB."""
    free = _field("/proc/meminfo", "MemAvailable") / 1024
    allowed = MEMORY_SHARE * free
    limit = int((_status("VmSize") + allowed) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return allowed


def _give_back_freed_memory() -> None:
    """Without this a second run finds the first one's pages and reads 0 MB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(name: str) -> float:
    return _field("/proc/self/status", name) / 1024


def _field(file: str, name: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])  # in kB


def one_line(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"[:90]
