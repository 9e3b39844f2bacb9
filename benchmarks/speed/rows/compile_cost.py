"""B18: what compiling costs, in a process of its own that finds no cache on disk, then in one that does."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from benchmarks.speed import ours
from benchmarks.speed.case import Line, Outcome, Target
from benchmarks.speed.heads import Heads, Shape, heads
from benchmarks.speed.measure import Absent
from benchmarks.speed.peers import load
from fdiv import JS, KL, FDivergence

SHAPE = Shape(320, 64, 4000)  # small, so that compiling is what is seen
ROWS, TEMPERATURES = (320, 192, 96), (1.0, 1.5, 2.0)
FIRST, FURTHER = JS(0.5), KL()
PROMISED = (Target("B18", "seconds", at_most=3.0), Target("B18", "graphs", at_most=3))
NAMES = {"fdiv FusedLinear": "ours", "Liger JSD compiled": "liger"}

Found = dict[str, float]


def lines(quick: bool, rounds: int) -> Iterator[list[Line]]:
    setting = f"compiled, float32 {SHAPE}: a first call beyond a second, then 9 row counts and temperatures"
    first = next(iter(NAMES))
    # A peer's compiler alone takes half a minute.
    names = [first] if quick else list(NAMES)
    for name in names:
        yield _lines(setting, name, PROMISED if name == first else (), again=not quick)


def _lines(setting: str, name: str, targets: tuple[Target, ...], again: bool) -> list[Line]:
    with tempfile.TemporaryDirectory() as cache:
        try:
            cold = _probed(NAMES[name], cache)
            warm = _probed(NAMES[name], cache) if again else None
        except (Absent, RuntimeError) as error:
            return [Line("B18", setting, name, name, targets=targets, notes=[str(error)])]
    steps = (
        ("no cache", cold, "first"),
        (f"then {FURTHER!r}", cold, "further"),
        ("cache on disk", warm, "first"),
    )
    made = [
        Line("B18", setting, f"{name}, {what}", f"{name}, {what}", seconds=found[f"{which}_cpu"])
        for what, found, which in steps
        if found
    ]
    made[0].targets, made[0].graphs = targets, int(cold["graphs"])
    made[0].notes.append(f"{cold['first_wall']:.1f} s of wall time")
    return made


def _probed(who: str, cache: str) -> Found:
    done = subprocess.run(
        [sys.executable, "-m", __name__, who],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:80]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "absent" in found:
        raise Absent(found["absent"])
    return found


def probe(who: str) -> Found:
    """CPU seconds (children included) and wall seconds of first calls beyond second ones; graphs."""
    torch.set_num_threads(1)
    given, step = heads(SHAPE), _step(who)
    cpu, wall = _first_call(partial(step, FIRST, given))
    for rows, temperature in product(ROWS, TEMPERATURES):
        step(FIRST, _scaled(given, rows, temperature))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    further_cpu, _ = _first_call(partial(step, FURTHER, given))
    return {"first_cpu": cpu, "first_wall": wall, "further_cpu": further_cpu, "graphs": graphs}


def _step(who: str) -> Callable[[FDivergence, Heads], Outcome]:
    if who == "ours":
        return partial(ours.fused_linear, compiled=True)
    return partial(load("liger").fused_linear_jsd, compiled=True)


def _scaled(given: Heads, rows: int, temperature: float) -> Heads:
    """The first rows at a temperature, which divides the hidden states."""
    p_hidden, q_hidden = (t.detach()[:rows] / temperature for t in (given.p_hidden, given.q_hidden))
    return Heads(p_hidden, given.p_weight, q_hidden.requires_grad_(), given.q_weight)


def _first_call(step: Callable[[], object]) -> tuple[float, float]:
    (cpu, wall), (later_cpu, later_wall) = _clocked(step), _clocked(step)
    return cpu - later_cpu, wall - later_wall


def _clocked(step: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = _cpu(), time.perf_counter()
    step()
    return _cpu() - cpu, time.perf_counter() - wall


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def main() -> None:
    try:
        print(json.dumps(probe(sys.argv[1])))
    except Absent as absent:
        print(json.dumps({"absent": str(absent)}))


if __name__ == "__main__":
    main()
