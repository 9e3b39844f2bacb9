"""How fast problems converge, and by how much their steps are therefore stretched."""

import math

import torch
from torch import Tensor

from fdiv.transport._run import STATE, Mirror, Run

ROUGH, MOST = 0.3, 1.98  # the error below which steps may be stretched, and how far


class Pace:
    """What is known of the rates.

    Steps f + w (T f - f) with w > 1 converge at the rate r with (r + w - 1)^2 = r w^2 l, where l is the rate
    of plain steps; the best w is 2 / (1 + sqrt(1 - l)). A problem whose error has grown goes back to where it
    was, takes plain steps for a while, and shorter ones from then on: else convergence would be local only.
    Source: Lehmann, von Renesse, Sambale, Uschmajew, "A note on overrelaxation in the Sinkhorn algorithm"
    (arXiv 2012.12562).
    """

    def __init__(self, run: Run):
        self.most = torch.full_like(run.a[:, :1], MOST)
        self.relaxation: Tensor | None = None
        self.steps, self.error = run.steps, None
        self.saved: dict[str, Tensor] = {}
        self.has_gone_back = False

    def look(self, run: Run, error: Tensor, tolerance: Tensor) -> Tensor:
        """Set the relaxation of the next steps; returns how many are still to go at the present rate."""
        togo = torch.full_like(error, math.inf)
        self.has_gone_back = False
        if self.error is not None and not isinstance(run, Mirror):
            grew = ~(error < self.error)
            rate = (error / self.error) ** (1 / (run.steps - self.steps))
            togo = torch.where(grew, math.inf, (tolerance / error).log() / rate.log())
            self._relax(rate.unsqueeze(-1), error.unsqueeze(-1), grew.unsqueeze(-1))
            if bool(grew.any()) and self.relaxation is not None:
                self._go_back(run, grew.unsqueeze(-1))
                error = torch.where(grew, self.error, error)
        self.steps, self.error = run.steps, error
        self.saved = {name: getattr(run, name) for name in STATE}
        return togo

    def _relax(self, rate: Tensor, error: Tensor, grew: Tensor) -> None:
        now = torch.ones_like(rate) if self.relaxation is None else self.relaxation
        self.most = torch.where(grew & (now > 1), 1 + (self.most - 1) / 2, self.most)
        plain = ((rate + now - 1).square() / (rate * now.square())).clamp(max=1.0)
        best = torch.minimum(2 / (1 + (1 - plain).sqrt()), self.most)
        self.relaxation = torch.where(grew | (error > ROUGH), 1.0, best)

    def _go_back(self, run: Run, grew: Tensor) -> None:
        for name, saved in self.saved.items():
            setattr(run, name, torch.where(grew, saved, getattr(run, name)))
        self.has_gone_back = True

    def take(self, index: Tensor) -> None:
        self.most = self.most[index]
        self.relaxation = None if self.relaxation is None else self.relaxation[index]
        self.error = None if self.error is None else self.error[index]
        self.saved = {name: saved[index] for name, saved in self.saved.items()}
