"""Transport between Gaussians under the cost |x - y|^2, in closed form: what solvers are tested against.

Means are [..., D], covariances [..., D, D], positive definite. Values are differentiable in both: traces and
determinants of matrix functions need eigenvalues only, whose derivatives do not mind that some are equal.
Source of the entropic formulas: Janati, Muzellec, Peyre, Cuturi, "Entropic Optimal Transport between
Unbalanced Gaussian Measures has a Closed Form" (arXiv 2006.02572); here eps = 2 sigma^2.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._math import in_working_precision


def bures(cov_a: Tensor, cov_b: Tensor) -> Tensor:
    """tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, the squared Bures distance."""
    return _trace(cov_a) + _trace(cov_b) - 2 * _product(cov_a, cov_b).sqrt().sum(-1)


def wasserstein(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """W_2^2: between the means, and the squared Bures distance."""
    return (mean_a - mean_b).square().sum(-1) + bures(cov_a, cov_b)


def entropic(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor, eps: float) -> Tensor:
    """min over plans P of E_P |x - y|^2 + eps KL(P, a x b): W_2^2 at eps = 0."""
    squared = eps / 2
    widths = _product(cov_a, cov_b)
    root = (4 * widths + squared**2).sqrt()  # eigenvalues of D = (4 A^1/2 B A^1/2 + sigma^4 I)^1/2
    spread = _trace(cov_a) + _trace(cov_b) - root.sum(-1)
    entropy = (1 - math.log(2 * squared) + (root + squared).log()).sum(-1)
    return (mean_a - mean_b).square().sum(-1) + spread + squared * entropy


def debiased(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor, eps: float) -> Tensor:
    """The Sinkhorn divergence of that."""
    selves = entropic(mean_a, cov_a, mean_a, cov_a, eps) + entropic(mean_b, cov_b, mean_b, cov_b, eps)
    return entropic(mean_a, cov_a, mean_b, cov_b, eps) - selves / 2


def cross_covariance(cov_a: Tensor, cov_b: Tensor, eps: float) -> Tensor:
    """Cov(x, y) [..., D, D] under the optimal plan, which is Gaussian: (A^1/2 D A^-1/2 - sigma^2 I) / 2."""
    squared = eps / 2
    lower, inner = _reduced(cov_a, cov_b)
    eye = torch.eye(cov_a.shape[-1], dtype=inner.dtype, device=inner.device)
    root = _root(4 * inner + squared**2 * eye)
    return (lower @ torch.linalg.solve_triangular(lower, root, upper=False, left=False) - squared * eye) / 2


class Affine(NamedTuple):
    """x -> matrix (x - origin) + target, for points [..., N, D]."""

    matrix: Tensor
    origin: Tensor
    target: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.origin.unsqueeze(-2)) @ self.matrix.mT + self.target.unsqueeze(-2)


def monge_map(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor, eps: float = 0.0) -> Affine:
    """The optimal map, A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2; with eps > 0 the plan's mean of y given x."""
    if eps > 0:
        matrix = torch.cholesky_solve(cross_covariance(cov_a, cov_b, eps), torch.linalg.cholesky(cov_a)).mT
    else:
        lower, inner = _reduced(cov_a, cov_b)
        left = torch.linalg.solve_triangular(lower.mT, _root(inner), upper=True)
        matrix = torch.linalg.solve_triangular(lower, left, upper=False, left=False)
    return Affine(matrix, mean_a, mean_b)


def _reduced(cov_a: Tensor, cov_b: Tensor) -> tuple[Tensor, Tensor]:
    """(L, L' B L) with A = L L': similar to A^1/2 B A^1/2, without a root of A."""
    cov_a, cov_b = in_working_precision(cov_a, cov_b)
    lower, failed = torch.linalg.cholesky_ex(cov_a)
    if bool((failed > 0).any()):
        raise ValueError(
            "covariances are positive definite; add a small multiple of the identity to that of a"
        )
    inner = lower.mT @ cov_b @ lower
    return lower, (inner + inner.mT) / 2


def _product(cov_a: Tensor, cov_b: Tensor) -> Tensor:
    """The eigenvalues of A^1/2 B A^1/2."""
    return torch.linalg.eigvalsh(_reduced(cov_a, cov_b)[1]).clamp(min=0.0)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)) @ vectors.mT


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
