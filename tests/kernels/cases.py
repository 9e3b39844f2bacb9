"""What the Triton kernels are run on in the interpreter, by a child, and what its parent tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.worlds import kl_and_twice_its_reverse
from torch import Tensor

import fdiv

VOCAB = 2503  # a prime; more than one block of the kernel
DIVERGENCES = (
    fdiv.KL(),
    fdiv.ReverseKL(),
    fdiv.JS(0.5),
    fdiv.JS(0.1),
    fdiv.Alpha(0.5),
    fdiv.Alpha(2.0),
    fdiv.TV(),
    fdiv.SquaredHellinger(),
    fdiv.Pearson(),
    fdiv.SkewKL(0.1),
    0.7 * fdiv.KL() + 0.3 * fdiv.TV(),
    fdiv.Generator(kl_and_twice_its_reverse),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SIDED = (*DIVERGENCES[:2], fdiv.JS(0.1), fdiv.Alpha(2.0), fdiv.TV(), DIVERGENCES[-1])
FEW = (fdiv.KL(), fdiv.ReverseKL(), fdiv.JS(0.1))
NEAR = (1e-1, 1e-2, 1e-3)  # distances of the student's logits from the teacher's
INF = float("inf")


@dataclass(frozen=True)
class Case:
    """One call of `rows`."""

    divergence: fdiv.FDivergence
    z_p: Tensor
    z_q: Tensor
    options: dict[str, Any] = field(default_factory=lambda: {"wants": (True, True)})


def logits(dtype=torch.float32, rows=2, vocab=VOCAB, std=2.0, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (std * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype)


def pair(**options) -> tuple[Tensor, Tensor]:
    return logits(seed=0, **options), logits(seed=1, **options)


def nearby(distance: float) -> tuple[Tensor, Tensor]:
    z_p, step = pair(std=1.0, rows=1)
    return z_p, z_p + distance * step


def without(z: Tensor, columns: slice) -> Tensor:
    """The logits with no mass at `columns`."""
    z = z.clone()
    z[:, columns] = -INF
    return z


BOTH_EMPTY, P_EMPTY, Q_EMPTY = slice(0, None, 7), slice(3, None, 7), slice(5, None, 7)
ONE = {"rows": 1, "vocab": 509}  # one row in one block


def holes(p_empty: bool = False, q_empty: bool = False) -> tuple[Tensor, Tensor]:
    """Columns without mass on both sides, and on one."""
    z_p, z_q = (without(z, BOTH_EMPTY) for z in pair(**ONE))
    return without(z_p, P_EMPTY) if p_empty else z_p, without(z_q, Q_EMPTY) if q_empty else z_q


def spoiled(columns: slice, value: float) -> tuple[Tensor, Tensor]:
    """The second of three rows has no softmax."""
    z_p, z_q = pair(rows=3, vocab=300)
    z_q[1, columns] = value
    return z_p, z_q


SPOILED = {
    "nan": (slice(7, 8), float("nan")),
    "+inf": (slice(7, 8), INF),
    "-inf throughout": (slice(None), -INF),
}


def transposed(z: Tensor) -> Tensor:
    return z.T.contiguous().T


def padded(z: Tensor) -> Tensor:
    """A view on rows that are longer than the vocabulary."""
    return torch.nn.functional.pad(z, (0, 13), value=99.0)[:, : z.shape[1]]


WEIGHTS = torch.tensor([0.5, -3.0])
# Tracing a cell is what takes the time: float64, which has cells of its own, for half of them.
PARITY = [(d, dtype) for d in DIVERGENCES for dtype in DTYPES if dtype != torch.float64 or d in SIDED]
CASES: dict[str, Case] = {f"{d!r} {dtype}": Case(d, *pair(dtype=dtype, rows=1)) for d, dtype in PARITY}
CASES |= {f"equal {d!r}": Case(d, logits(**ONE), logits(**ONE)) for d in DIVERGENCES}
CASES |= {f"near {d!r} {far}": Case(d, *nearby(far)) for d in FEW for far in NEAR}
CASES |= {f"far from 0 {d!r}": Case(d, *(z + 1000 for z in nearby(1e-2))) for d in FEW}
CASES |= {f"peaked {d!r}": Case(d, *pair(std=30.0, rows=1)) for d in FEW}
CASES |= {f"both empty {d!r}": Case(d, *holes()) for d in SIDED}
CASES |= {f"p empty {d!r}": Case(d, *holes(p_empty=True)) for d in SIDED}
CASES |= {f"q empty {d!r}": Case(d, *holes(q_empty=True)) for d in SIDED}
CASES |= {f"vocab {n}": Case(fdiv.KL(), *pair(rows=1, vocab=n)) for n in (1, 2, 5, 257, 2048, 2049)}
# TV's cell drops a nan: but for the kernel's own rule such a row would be worth 1/2.
CASES |= {
    f"{name} {d!r}": Case(d, *spoiled(*how)) for name, how in SPOILED.items() for d in (fdiv.KL(), fdiv.TV())
}
CASES |= {
    "upstream": Case(fdiv.JS(0.1), *pair(), {"wants": (True, True), "upstream": WEIGHTS}),
    "bfloat16 gradients": Case(fdiv.JS(0.1), *pair(), {"wants": (True, True), "out_dtype": torch.bfloat16}),
    "two dtypes": Case(fdiv.KL(), logits(torch.bfloat16), logits(torch.float16, seed=1)),
    "only the student": Case(fdiv.KL(), *pair(), {}),
    "only the teacher": Case(fdiv.KL(), *pair(), {"wants": (True, False)}),
    "no gradient": Case(fdiv.KL(), *pair(), {"wants": (False, False)}),
    "no rows": Case(fdiv.KL(), *pair(rows=0)),
    "transposed": Case(fdiv.KL(), *map(transposed, pair(vocab=300))),
    "padded": Case(fdiv.KL(), *map(padded, pair(vocab=300))),
}


@dataclass(frozen=True)
class Pick:
    """One call of `selected`."""

    z: Tensor
    index: Tensor
    options: dict[str, Any] = field(default_factory=lambda: {"upstream": (WEIGHTS, WEIGHTS.flip(0) - 1)})


ATOMS = torch.tensor([11, VOCAB - 1])
PICKS: dict[str, Pick] = {f"{dtype}": Pick(logits(dtype), ATOMS) for dtype in DTYPES}
PICKS |= {
    "peaked": Pick(logits(std=30.0), ATOMS),
    "empty": Pick(without(logits(), BOTH_EMPTY), ATOMS),
    "outside": Pick(logits(), torch.tensor([-100, VOCAB])),
    "without mass": Pick(without(logits(), slice(10, 12)), ATOMS),
    "no gradient": Pick(logits(), ATOMS, {}),
    "no rows": Pick(logits(rows=0), ATOMS[:0], {}),
    "bfloat16 gradients": Pick(
        logits(), ATOMS, {"upstream": (WEIGHTS, WEIGHTS), "out_dtype": torch.bfloat16}
    ),
}


def float64_gradients(function: Callable[..., Tensor], *z: Tensor) -> tuple[Tensor, ...]:
    """function(*z) and its gradients in float64."""
    doubles = [t.double().requires_grad_() for t in z]
    value = function(*doubles)
    return value.detach(), *torch.autograd.grad(value.sum(), doubles)
