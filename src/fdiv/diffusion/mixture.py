"""Mixtures of round Gaussians: all that a diffusion model learns is known of them in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """sum_k w_k N(m_k, s_k^2 I): means [K, d], scales [K], weights [K], which are divided by their sum.

    A scale of 0 is a point mass, so that a finite set of data is a mixture too. sigma, of the noise added, is
    a number or has the leading dimensions of x [..., d]; under it the scales are sqrt(s^2 + sigma^2). All is
    computed in the dtype and on the device of x, from logarithms of the shares.
    """

    means: tuple[tuple[float, ...], ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        sizes = {len(self.means), len(self.scales), len(self.weights)}
        if len(sizes) > 1 or not self.means or len({len(mean) for mean in self.means}) > 1:
            raise ValueError(f"a mixture has K means of one size, K scales and K weights, got {self!r}")
        if not all(0 <= scale < math.inf for scale in self.scales):
            raise ValueError(f"scales are finite and >= 0, got {self.scales!r}")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights are finite and > 0, got {self.weights!r}; leave empty components out")

    @property
    def dim(self) -> int:
        return len(self.means[0])

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log p_sigma(x) [...]."""
        return self._log_joint(x, self._variance(x, sigma)).logsumexp(-1)

    def log_shares(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log of the probability that x comes from each component, [..., K]."""
        return self._log_joint(x, self._variance(x, sigma)).log_softmax(-1)

    def score(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """grad log p_sigma(x) [..., d]."""
        variance = self._variance(x, sigma)
        pull = self._log_joint(x, variance).softmax(-1) / variance  # [..., K]
        return pull @ self._means(x) - pull.sum(-1, keepdim=True) * x

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x0 + sigma noise = x] [..., d]: a denoiser."""
        variance = self._variance(x, sigma)
        shares = self._log_joint(x, variance).softmax(-1)
        kept = shares * x.new_tensor(self.scales).square() / variance  # of x itself; the rest is the means'
        return (shares - kept) @ self._means(x) + kept.sum(-1, keepdim=True) * x

    def sample(self, count: int, generator: torch.Generator | None = None, sigma: float = 0.0) -> Tensor:
        """[count, d] float32 draws, on the generator's device."""
        device = "cpu" if generator is None else generator.device
        weights = torch.tensor(self.weights, dtype=torch.float64, device=device)
        component = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, device=device, generator=generator)
        scales = torch.tensor(self.scales, device=device)[component].square().add(sigma**2).sqrt()
        return torch.tensor(self.means, device=device)[component] + scales.unsqueeze(-1) * noise

    def _means(self, x: Tensor) -> Tensor:
        return x.new_tensor(self.means)

    def _variance(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """[..., K], of a coordinate."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[:-1])
        variance = x.new_tensor(self.scales).square() + sigma.square().unsqueeze(-1)
        if min(self.scales) == 0 and not bool((variance > 0).all()):
            raise ValueError("a point mass has no density without noise: sigma is > 0 where a scale is 0")
        return variance

    def _log_joint(self, x: Tensor, variance: Tensor) -> Tensor:
        """log of weight times density, component by component [..., K]."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"points have {self.dim} coordinates, got {tuple(x.shape)}")
        distance = (x.unsqueeze(-2) - self._means(x)).square().sum(-1)
        log_weight = x.new_tensor(self.weights).log().log_softmax(-1)
        return log_weight - distance / (2 * variance) - self.dim / 2 * (2 * math.pi * variance).log()
