"""Optimal transport along the line on which two clouds differ most."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fdiv._metric import MetricDivergence, weighted_points
from fdiv.divergences.wasserstein import along, require_count, require_exponent, unit_vectors


@dataclass(frozen=True)
class MaxSliced(MetricDivergence):
    """The largest W_p^p of the projections of points [..., N, D] on a line, over all lines.

    Between Sliced and W_p^p itself, which it equals where one cloud is the other, shifted. Found by `steps`
    of gradient ascent from each of `starts` directions, drawn once from `seed`: a lower bound where all
    miss the best line. The gradient is that along the line found. No root. Sorts starts x steps times.
    Source: Deshpande et al., "Max-Sliced Wasserstein Distance and its Use for GANs" (2019).
    """

    p: float = 2
    starts: int = 16
    steps: int = 50
    seed: int = 0

    def __post_init__(self):
        require_exponent(self.p, "MaxSliced(p)")
        require_count(self.starts, "MaxSliced(starts)")
        require_count(self.steps, "MaxSliced(steps)")
        if not isinstance(self.seed, int):
            raise ValueError(f"MaxSliced(seed) is an int, got {self.seed!r}")

    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        x, y, _, _ = weighted_points(x, y, log_a, log_b)
        fixed = (None if t is None else t.detach() for t in (x, y, log_a, log_b))
        return along(self._best(*fixed), self.p, x, y, log_a, log_b).squeeze(-1)

    def _best(self, *measures) -> Tensor:
        """The best line of each problem, [..., 1, D]."""

        def climb(lines: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                lines = lines.detach().requires_grad_()
                values = along(lines, self.p, *measures)
                (slope,) = torch.autograd.grad(values.sum(), lines)
            return values.detach(), slope - (slope * lines).sum(-1, keepdim=True) * lines

        x, y, *weights = measures
        batch = [t.shape[:-2] for t in (x, y)] + [w.shape[:-1] for w in weights if w is not None]
        shape = torch.broadcast_shapes(*batch)
        lines = unit_vectors(self.starts, x.shape[-1], self.seed, True).to(x).expand(*shape, -1, -1)
        (values, slope), step = climb(lines), lines.new_full((*shape, self.starts, 1), 0.5)
        for _ in range(self.steps):  # along the sphere; a step that does not help is taken back and halved
            tried = normalize(lines + step * normalize(slope, dim=-1), dim=-1)
            found, ahead = climb(tried)
            better = (found > values).unsqueeze(-1)
            lines, slope = torch.where(better, tried, lines), torch.where(better, ahead, slope)
            values, step = torch.maximum(found, values), torch.where(better, 1.2 * step, 0.5 * step)
        best = values.argmax(-1, keepdim=True).unsqueeze(-1)
        return lines.take_along_dim(best, -2).detach()
