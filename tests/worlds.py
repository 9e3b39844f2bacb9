"""Worlds small enough to enumerate: a sum over everything that can happen is the oracle.

All in float64. p is fixed; q is the softmax of parameters `theta`.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

import fdiv

torch.set_num_threads(1)  # tensors of a few numbers: more threads only cost


def kl_and_twice_its_reverse(log_ratio: Tensor) -> Tensor:
    """A user's f(u), not in standard form."""
    return log_ratio.exp() * log_ratio - 2 * log_ratio


DIVERGENCES = (
    fdiv.KL(),
    fdiv.ReverseKL(),
    fdiv.Jeffreys(),
    fdiv.JS(0.1),
    fdiv.JS(0.7),
    fdiv.SkewKL(0.1),
    fdiv.SkewReverseKL(0.1),
    fdiv.Alpha(0.3),
    fdiv.Alpha(-0.5),
    fdiv.Alpha(1.7),
    fdiv.SquaredHellinger(),
    fdiv.Pearson(),
    fdiv.Neyman(),
    fdiv.TV(),
    fdiv.Triangular(),
    fdiv.SoftenedKL(),
    fdiv.SoftenedReverseKL(),
    fdiv.ChiKL(0.5),
    0.7 * fdiv.KL() + 0.3 * fdiv.TV(),
    fdiv.Generator(kl_and_twice_its_reverse),
)
NOT_F_DIVERGENCES = (fdiv.Renyi(2.0), fdiv.AlphaBeta(0.5, 0.7), "KL", fdiv.KL)

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
each_smooth_divergence = pytest.mark.parametrize(
    "divergence", [d for d in DIVERGENCES if d.is_smooth], ids=repr
)
each_other_object = pytest.mark.parametrize("other", NOT_F_DIVERGENCES, ids=repr)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to `tolerance`, relative to the largest expected entry."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(scale, 1e-3))


def gradient(loss: Tensor, *parameters: Tensor) -> Tensor:
    """d loss / d parameters, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


# -- one draw from six symbols -------------------------------------------------------------------------

LOG_P = torch.tensor([0.31, 0.24, 0.18, 0.13, 0.09, 0.05], dtype=torch.float64).log()
LOG_BEHAVIOUR = torch.tensor([0.05, 0.15, 0.25, 0.25, 0.2, 0.1], dtype=torch.float64).log()


def six_symbols() -> tuple[Tensor, Tensor]:
    """(theta, log_q), each [6]."""
    theta = torch.tensor([-0.7, 0.4, 0.9, -0.2, 0.6, -1.1], dtype=torch.float64, requires_grad=True)
    return theta, theta.log_softmax(-1)


def random_rows(rows: int, symbols: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    """Random log-densities [rows, symbols]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, symbols, generator=generator, dtype=torch.float64)
    return (scale * logits).log_softmax(-1)


# -- three tokens from three symbols, one after another ------------------------------------------------

TRAJECTORIES = torch.tensor(list(product(range(3), repeat=3)))  # [27, 3]
# The prefix before each token: 1 empty, 3 of one token, 9 of two.
PREFIXES = torch.stack(
    [
        torch.zeros(27, dtype=torch.long),
        1 + TRAJECTORIES[:, 0],
        4 + TRAJECTORIES[:, :2] @ torch.tensor([3, 1]),
    ],
    dim=1,
)


def prefix_table(seed: int) -> Tensor:
    """Logits after each of the 13 prefixes, [13, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(13, 3, generator=generator, dtype=torch.float64)


def along_trajectories(table: Tensor) -> Tensor:
    """Log-probabilities of all symbols at each place of each trajectory, [27, 3, 3]."""
    return table.log_softmax(-1)[PREFIXES]


def of_tokens(conditionals: Tensor) -> Tensor:
    """Log-probabilities of the trajectories' own tokens, [27, 3]."""
    return conditionals.gather(-1, TRAJECTORIES.unsqueeze(-1)).squeeze(-1)
