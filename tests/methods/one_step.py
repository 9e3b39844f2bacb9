"""Laws that are known at every level of noise, and sums over a grid instead of draws."""

import numpy as np
import torch
from torch import Tensor

from fdiv.diffusion.mixture import Mixture
from fdiv.methods.generate._critic import Known
from fdiv.methods.generate._student import Compared
from fdiv.methods.generate.levels import Drawn
from fdiv.networks.affine import Affine, ClosedForm
from fdiv.networks.denoiser import Denoiser

F64 = torch.float64
ALL_RATIOS = (1e-300, 1e300)
LINE = torch.Size([1])


def student(mean: float, scale: float):
    """N(mean, scale^2), with a gradient in the mean and in log scale."""
    return Affine(mean, scale).build(LINE, 1).double()


def teacher(*modes: tuple[float, float, float]):
    """A mixture of (mean, scale, weight) on the line."""
    means, scales, weights = zip(*modes, strict=True)
    return ClosedForm(Mixture(tuple((m,) for m in means), scales, weights)).build(LINE, 1).double()


def normal_grid(points: int) -> tuple[Tensor, Tensor]:
    """(z [points], weights of sum 1): E f(z) = sum weights f(z), exactly for polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    weights = torch.from_numpy(weights)
    return torch.from_numpy(nodes), weights / weights.sum()


def on_a_grid(q, p, sigma: float, points: int = 80, noises: int | None = None, through: bool = False):
    """(made [B, 1], what `compared` would return, weights [B]) for all pairs of a noise z and one of x."""
    z, of_z = normal_grid(points)
    e, of_e = normal_grid(noises or points)
    z, e = (t.flatten().unsqueeze(1) for t in torch.meshgrid(z, e, indexing="ij"))
    made = q(z, 1.0)
    x, level = made + sigma * e, torch.full((len(z),), sigma, dtype=F64)
    with torch.set_grad_enabled(through):
        fake = Known().denoiser(None, q)
        seen = Compared(x, Drawn(level, level / 2), fake(x, level), p(x, level))
    return made, seen, torch.outer(of_z, of_e).flatten()


def line(reach: float = 40.0, count: int = 10_001) -> tuple[Tensor, float]:
    x = torch.linspace(-reach, reach, count, dtype=F64)
    return x.unsqueeze(1), (x[1] - x[0]).item()


def divergence_at(divergence, p, q, sigma: float) -> Tensor:
    """D_f(p_sigma, q_sigma) by quadrature, differentiable in q."""
    x, step = line()
    return divergence(p.log_prob(x, sigma), q.log_prob(x, sigma)) * step


def networks(seed: int = 0, coordinates: int = 2, **sizes):
    """(student, frozen teacher) of random weights, two small denoisers in float64."""
    torch.manual_seed(seed)
    made = [
        Denoiser(width=12, blocks=1, **sizes).build(torch.Size([coordinates]), coordinates).double()
        for _ in range(2)
    ]
    for network in made:
        for weight in network.parameters():  # their last layers start at 0
            weight.data += 0.3 * torch.randn_like(weight)
    return made[0], made[1].requires_grad_(False).eval()


def gradients(module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]
