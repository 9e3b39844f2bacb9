"""The Cauchy-Schwarz divergence of two kernel density estimates."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._metric import MetricDivergence, weighted_points
from fdiv.divergences.kernels import distances, require_positive


@dataclass(frozen=True)
class CauchySchwarz(MetricDivergence):
    """log K_xx + log K_yy - 2 log K_xy >= 0, K_xy = sum a b exp(-|x - y|^2 / (2 bandwidth^2)).

    -2 log of the cosine of the two densities, each smoothed by a Gaussian of width
    bandwidth / sqrt 2; blind to total mass. Far clouds still pull: it grows with their squared
    distance, where MMD is flat. Memory batch x N x M.
    Source: Principe, "Information Theoretic Learning" (2010).
    """

    bandwidth: float

    def __post_init__(self):
        require_positive(self.bandwidth, "CauchySchwarz(bandwidth)")

    def between(
        self, x: Tensor, y: Tensor, log_a: Tensor | None = None, log_b: Tensor | None = None
    ) -> Tensor:
        x, y, a, b = weighted_points(x, y, log_a, log_b)
        log_a = a.log() if log_a is None else log_a.to(a.dtype)
        log_b = b.log() if log_b is None else log_b.to(b.dtype)
        within = self._log_gram(x, x, log_a, log_a) + self._log_gram(y, y, log_b, log_b)
        return within - 2 * self._log_gram(x, y, log_a, log_b)

    def _log_gram(self, x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        """log K_xy, by logsumexp: K itself underflows a few dozen bandwidths away."""
        log_kernel = -(distances(x, y) / self.bandwidth).square() / 2
        nearest = log_kernel.detach().amax((-2, -1), keepdim=True)  # rounds the weights if left in
        weights = log_a.unsqueeze(-1) + log_b.unsqueeze(-2)
        return (log_kernel - nearest + weights).logsumexp((-2, -1)) + nearest.squeeze(-1).squeeze(-1)
