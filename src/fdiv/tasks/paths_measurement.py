"""What a sampler of paths is measured by: whether it arrives and how, and by brute force how often it should.

Intervals are over sampled paths: what other draws might have given, not other seeds.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv._math import effective_count
from fdiv.adapters.classifier import Classifier
from fdiv.methods.paths.log_variance import log_likelihood_ratio
from fdiv.methods.robust.attacks import evaluated
from fdiv.networks.bias import Unbiased
from fdiv.tasks.paths import Paths, Rolled
from fdiv.tasks.surfaces import Surface

AT_ONCE = 20_000  # paths that are held whole
SHOWN, GRID, HIGHEST = 24, 40, 25  # transitions of a picture, places along its sides, its highest energy
CELLS = 12  # of an occupation, along each side of the window


class Transitions(NamedTuple):
    """Of paths that arrived: positions [N, K + 1, 2], and the steps of departure and of arrival [N].

    A path departs when it is last near its start before it arrives; what is between is the transition.
    """

    positions: Tensor
    departure: Tensor
    arrival: Tensor

    @property
    def inside(self) -> Tensor:
        """Which places belong to the transition, [N, K + 1]."""
        steps = torch.arange(self.positions.shape[1])
        return (steps >= self.departure.unsqueeze(-1)) & (steps <= self.arrival.unsqueeze(-1))


def transitions(surface: Surface, positions: Tensor) -> tuple[Transitions, Tensor]:
    """(those of the paths that arrived, which they are [N])."""
    steps = torch.arange(positions.shape[1])
    there = _near(positions, surface.target, surface.radius)
    arrived = there.any(1)
    positions, arrival = positions[arrived], there[arrived].int().argmax(1)
    here = _near(positions, surface.start, surface.radius) & (steps <= arrival.unsqueeze(-1))
    return Transitions(positions, torch.where(here, steps, 0).amax(1), arrival), arrived


def _near(positions: Tensor, place: tuple[float, float], radius: float) -> Tensor:
    return (positions - torch.tensor(place)).square().sum(-1) < radius**2


@lru_cache(maxsize=4)
def brute_force(task: Paths) -> Transitions:
    """The transitions among `task.brute` paths of the unbiased dynamics: one ensemble for all samplers."""
    generator, still = torch.Generator().manual_seed(0), Unbiased().build(torch.Size([2]), 2)
    found, left = [], task.brute
    while left:
        count = min(left, AT_ONCE)
        found.append(transitions(task.surface, task.rolled(still, count, generator).positions)[0])
        left -= count
    return Transitions(*(torch.cat(column) for column in zip(*found, strict=True)))


def measured(task: Paths, model: Classifier, seed: int) -> dict[str, Any]:
    """The evaluation of a sampler, in the form that the report reads.

    hit rate, rmsd (of the nearest place to the target), top energy of a transition and its deviation, the
    share that takes the upper channel; `transition probability` within the horizon, by weights dP_0/dQ up to
    the arrival, beside that of brute force, and log10 of their ratio; `effective share` of these weights;
    `occupation tv`: total variation between where transitions are, as sampled, weighted, and of one half of
    the brute-force ones to the other, below which nothing can be told.
    """
    network: Any = model.model
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with evaluated(network):
        rolled = task.rolled(network, task.samples, torch.Generator().manual_seed(seed), device=device)
        own, arrived = transitions(task.surface, rolled.positions.cpu())
        log_weight = _log_weights(task, network, rolled, arrived, own.arrival, device)
    brute = brute_force(task)
    rows = of_sampler(task, rolled.positions.cpu(), arrived) | of_transitions(task.surface, own)
    rows |= {f"{name}, brute force": row for name, row in of_transitions(task.surface, brute).items()}
    scalars = {name: _mean(row) for name, row in rows.items()}
    errors = {name: _error(row) for name, row in rows.items()}
    scalars |= against(task, own, log_weight, brute)
    probability = torch.zeros(task.samples).masked_scatter(arrived, log_weight.exp().float())
    errors |= {name: math.nan for name in scalars if name not in errors}
    errors["transition probability"] = _error(probability)
    found = {"exact": False, "scalars": scalars, "scalar_errors": errors}
    found |= {"divergences": {}, "calibration": {}, "curves": {}, "samples": []}
    return found | ({"drawn": picture(task.surface, own, brute)} if len(own.arrival) else {})


def picture(surface: Surface, own: Transitions, brute: Transitions) -> dict[str, Any]:
    """Some transitions of both over the energy, up to HIGHEST temperatures above the start."""
    sides = [torch.linspace(low, high, GRID) for low, high in surface.window]
    energy = surface.energy(torch.stack(torch.meshgrid(*sides, indexing="xy"), -1))
    top = surface.energy(torch.tensor(surface.start)) + HIGHEST * surface.temperature
    x, y, height = (_rounded(t) for t in (*sides, torch.minimum(energy, top)))
    return {
        "paths": _some(own),
        "target": _some(brute),
        "surface": {"x": x, "y": y, "energy": height},
    }


def _some(of: Transitions) -> list:
    return [
        _rounded(path[inside]) for path, inside in zip(of.positions[:SHOWN], of.inside[:SHOWN], strict=True)
    ]


def _rounded(numbers: Tensor) -> list:
    return [
        [round(n, 3) for n in row] if isinstance(row, list) else round(row, 3) for row in numbers.tolist()
    ]


@torch.no_grad()
def _log_weights(
    task: Paths, network: Any, rolled: Rolled, arrived: Tensor, arrival: Tensor, device: Any
) -> Tensor:
    """log dP_0/dQ [arrived] of each path until it arrives, which is all that its arriving depends on."""
    found = [torch.zeros(0, dtype=torch.float64)]
    chosen = arrived.nonzero().flatten()
    for index, length in zip(chosen.split(256), arrival.split(256), strict=True):
        positions, moves = (t[index.to(t.device)] for t in rolled)
        ratio = log_likelihood_ratio(
            positions, moves, task.when.to(device), task.target.to(device), task.surface.step_size,
            task.variance, network, length.to(device),
        )  # fmt: skip
        found.append(-ratio.double().cpu())
    return torch.cat(found)


def of_sampler(task: Paths, positions: Tensor, arrived: Tensor) -> dict[str, Tensor]:
    """Numbers of each path, [N]."""
    least = (positions - task.target).square().sum(-1).amin(1)
    return {"hit rate": arrived.float(), "rmsd": least.sqrt()}


def of_transitions(surface: Surface, of: Transitions) -> dict[str, Tensor]:
    """Numbers of each transition, [N]."""
    energy = torch.where(of.inside, surface.energy(of.positions), -math.inf).amax(1)
    rows = {"top energy": energy, "duration": (of.arrival - of.departure) * surface.step_size}
    if surface.divide is None or surface.channel is None:
        return rows
    off = torch.where(of.inside, surface.divide(of.positions).abs(), math.inf)
    there = of.positions[torch.arange(len(off)), off.argmin(1)]
    return rows | {"upper channel": (surface.channel(there) > 0).float()}


def against(task: Paths, own: Transitions, log_weight: Tensor, brute: Transitions) -> dict[str, float]:
    """The sampler's ensemble against that of brute force."""
    surface = task.surface
    weight, share = log_weight.exp(), len(brute.arrival) / task.brute
    probability = float(weight.sum()) / task.samples
    horizon = surface.steps * surface.step_size
    energy = of_transitions(surface, own)["top energy"]
    found = {
        "top energy deviation": float(energy.std()) if len(energy) > 1 else math.nan,
        "transition probability": probability,
        "transition probability, brute force": share,
        "rate": -math.log1p(-min(probability, 1 - 1e-12)) / horizon,
        "rate, brute force": -math.log1p(-min(share, 1 - 1e-12)) / horizon,
        "log10 of rates": math.nan,
        "effective share": 0.0,
    }
    if len(weight) and share:
        found["log10 of rates"] = math.log10(found["rate"] / found["rate, brute force"])
    if len(weight):
        found["effective share"] = float(effective_count(log_weight)) / len(weight)
    return found | _occupations(surface, own, (log_weight - log_weight.logsumexp(0)).exp(), brute)


def _occupations(surface: Surface, own: Transitions, weight: Tensor, brute: Transitions) -> dict[str, float]:
    whole = occupation(surface, brute)
    even, odd = (occupation(surface, Transitions(*(t[n::2] for t in brute))) for n in (0, 1))
    return {
        "occupation tv": _apart(occupation(surface, own), whole),
        "occupation tv, weighted": _apart(occupation(surface, own, weight), whole),
        "occupation tv, brute force": _apart(even, odd),
    }


def occupation(surface: Surface, of: Transitions, weight: Tensor | None = None) -> Tensor:
    """The share of the time in transition that is spent in each cell of the window; nan of none."""
    weight = torch.ones(len(of.arrival), dtype=torch.float64) if weight is None else weight
    (low_x, high_x), (low_y, high_y) = surface.window
    low, high = torch.tensor([low_x, low_y]), torch.tensor([high_x, high_y])
    cell = ((of.positions - low) / (high - low) * CELLS).long().clamp(0, CELLS - 1)
    number = cell[..., 0] * CELLS + cell[..., 1]
    counted = torch.zeros(CELLS * CELLS, dtype=torch.float64)
    counted.index_add_(0, number[of.inside], weight.unsqueeze(-1).expand(of.inside.shape)[of.inside])
    return counted / counted.sum()


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().sum()) / 2


def _mean(row: Tensor) -> float:
    return float(row.double().mean()) if len(row) else math.nan


def _error(row: Tensor) -> float:
    """Standard error of a mean."""
    return float(row.double().std()) / math.sqrt(len(row)) if len(row) > 1 else math.nan
