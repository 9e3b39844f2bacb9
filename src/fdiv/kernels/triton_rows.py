"""The elementwise half of the fused estimators on a GPU: one program a row, in Triton.

A row of logits is swept three times: normalisers and entropies; the sums of value and slopes; the gradient

    dD/dz = s - softmax(z) sum(s),        s = q dg/dq (of the student) or p dg/dp (of the teacher).

The cell of the divergence (see fdiv.kernels.cell) is compiled into the kernel, whichever it is. Products and
sums are not fused unless written so, that equal logits may give a value and a gradient of exactly 0.
"""

# Kernels are Python in syntax only: what `tl` says of its types holds outside of them.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import hashlib
import linecache
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.kernels.graph import cell_graph
from fdiv.kernels.triton_source import translate

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the CUDA kernels are written in Triton: pip install 'fdiv[triton]'") from error

FAR = tl.constexpr(-1e4)  # its exponential is 0 in every precision, and 0 times it is 0, unlike with -inf
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LOG2_E = tl.constexpr(math.log2(math.e))
INF = tl.constexpr(float("inf"))


class Rows(NamedTuple):
    """value [rows]; the gradients in the logits [rows, vocab] or None; the entropies in nats [rows]."""

    value: Tensor
    dz_p: Tensor | None
    dz_q: Tensor | None
    p_entropy: Tensor
    q_entropy: Tensor


class Selected(NamedTuple):
    """log q of the selected atom and the entropy of q, [rows]; the gradient in z [rows, vocab] or None."""

    log_prob: Tensor
    entropy: Tensor
    dz: Tensor | None


def rows(
    divergence: FDivergence,
    z_p: Tensor,
    z_q: Tensor,
    *,
    wants: tuple[bool, bool] = (False, True),
    out_dtype: torch.dtype | None = None,
    upstream: Tensor | None = None,
) -> Rows:
    """D(softmax(z_p), softmax(z_q)) a row, from logits [rows, vocab] of any floating dtype.

    `wants`: the gradient in z_p, in z_q, weighted by `upstream` [rows]. `out_dtype` is theirs: bfloat16, or
    what is computed in, float32 (float64 if either input is). A row without a finite value gets gradient 0.
    Quickest where vocabulary and row strides are divisible by 16. Raises NotImplementedError, naming the
    operation, for a cell that has no Triton form; see `available`.
    """
    if z_p.ndim != 2 or z_p.shape != z_q.shape:
        raise ValueError(f"logits are [rows, vocab] twice, got {tuple(z_p.shape)} and {tuple(z_q.shape)}")
    dtype = _working_dtype(z_p, z_q)
    z_p, z_q = _with_dense_rows(z_p), _with_dense_rows(z_q)
    value, p_entropy, q_entropy = (z_q.new_empty(len(z_q), dtype=dtype) for _ in range(3))
    dz_p, dz_q = (
        torch.empty(z.shape, dtype=_gradient_dtype(out_dtype, dtype), device=z.device) if wanted else None
        for z, wanted in zip((z_p, z_q), wants, strict=True)
    )
    if len(z_q):
        with torch.cuda.device_of(z_q):
            fdiv_rows[(len(z_q),)](
                z_p, z_q, value, dz_p, dz_q, p_entropy, q_entropy, upstream,
                z_q.shape[1], z_p.stride(0), z_q.stride(0),
                CELL=jit_cell(divergence, dtype), **launch(z_q.shape[1], dtype),
            )  # fmt: skip
    return Rows(value, dz_p, dz_q, p_entropy, q_entropy)


def selected(
    z: Tensor,
    index: Tensor,
    *,
    upstream: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Selected:
    """log softmax(z) at `index` [rows] and the entropy of softmax(z), from logits [rows, vocab].

    With `upstream`, the gradients [rows] in both, also dz = g_l (onehot - q) - g_H q (log q + H). An index
    outside the vocabulary gives nan and no gradient of its log-probability; so does an atom of mass 0 (-inf).
    """
    if z.ndim != 2 or index.shape != z.shape[:1]:
        raise ValueError(f"z is [rows, vocab] and index [rows], got {tuple(z.shape)}, {tuple(index.shape)}")
    dtype = _working_dtype(z)
    z = _with_dense_rows(z)
    log_prob, entropy = (z.new_empty(len(z), dtype=dtype) for _ in range(2))
    dz = None
    if upstream is not None:
        dz = torch.empty(z.shape, dtype=_gradient_dtype(out_dtype, dtype), device=z.device)
    if len(z):
        with torch.cuda.device_of(z):
            selected_rows[(len(z),)](
                z, index, log_prob, entropy, dz, *(upstream or (None, None)),
                z.shape[1], z.stride(0), **launch(z.shape[1], dtype),
            )  # fmt: skip
    return Selected(log_prob, entropy, dz)


def available(divergence: FDivergence, device: torch.device | str) -> bool:
    """Whether `rows` runs there: on CUDA devices, for a cell made of operations that have a Triton form."""
    return torch.device(device).type == "cuda" and _translates(divergence)


@lru_cache(maxsize=1024)
def _translates(divergence: FDivergence) -> bool:
    try:
        jit_cell(divergence, torch.float32)
    except NotImplementedError:
        return False
    return True


@lru_cache(maxsize=256)
def jit_cell(divergence: FDivergence, dtype: torch.dtype) -> Any:
    """The divergence's cell, (value, slope_p, slope_q) from (log_p, log_q, gap), as a Triton function.

    Triton reads the source of what it compiles, through `inspect`. An entry in `linecache` is all that takes,
    as `doctest` does it; a file would have to be placed, guarded against other users, and cleaned up. The
    compiled kernel is kept on disk by Triton, under a hash of the cell's text.
    """
    text = translate(cell_graph(divergence, dtype, (True, True, True)), dtype)
    name = f"<fdiv cell {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"tl": tl, "exponential": exponential, "__name__": __name__}
    exec(compile(text, name, "exec"), scope)
    return triton.jit(scope["cell"])


def _working_dtype(*logits: Tensor) -> torch.dtype:
    return torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32


def _gradient_dtype(wanted: torch.dtype | None, working: torch.dtype) -> torch.dtype:
    # float16 has not the range for the gradient of a small probability.
    if wanted not in (None, working, torch.bfloat16):
        raise ValueError(f"out_dtype is None, {working} or torch.bfloat16, got {wanted}")
    return wanted or working


def _with_dense_rows(z: Tensor) -> Tensor:
    return z if z.stride(1) == 1 else z.contiguous()


def launch(vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """What either kernel is compiled for: 8 numbers a thread at a time (4 of float64), 8 warps at most."""
    numbers = 4 if dtype == torch.float64 else 8
    block = min(256 * numbers, max(32 * numbers, triton.next_power_of_2(vocab)))
    return {
        "BLOCK": block,
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": block // (32 * numbers),
        "enable_fp_fusion": False,
    }


@triton.jit
def exponential(x):
    """exp(x); in float32 as a power of 2, whose instruction flushes denormal results to 0 at no cost."""
    return tl.exp2(x * LOG2_E) if x.dtype == tl.float32 else tl.exp(x)


@triton.jit
def fdiv_rows(
    z_p, z_q, value, dz_p, dz_q, p_entropy, q_entropy, upstream,
    vocab, p_stride, q_stride,
    CELL: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One row. The gradients that are None are not computed; `upstream` None is 1."""
    row = tl.program_id(0).to(tl.int64)  # rows x vocab exceeds 2^31
    z_p += row * p_stride
    z_q += row * q_stride
    lanes = tl.arange(0, BLOCK)

    p_top, p_mass, p_moment = _nothing(BLOCK, DTYPE)
    q_top, q_mass, q_moment = _nothing(BLOCK, DTYPE)
    for start in range(0, vocab, BLOCK):
        p, q = _logits(z_p, start + lanes, vocab, DTYPE), _logits(z_q, start + lanes, vocab, DTYPE)
        p_top, p_mass, p_moment = _with_one_more(p, p_top, p_mass, p_moment)
        q_top, q_mass, q_moment = _with_one_more(q, q_top, q_mass, q_moment)
    p_max, p_log, p_spread = _over_lanes(p_top, p_mass, p_moment)
    q_max, q_log, q_spread = _over_lanes(q_top, q_mass, q_moment)
    tl.store(p_entropy + row, p_spread)
    tl.store(q_entropy + row, q_spread)

    # In two terms: where the models are close the gap is made of the last digits of both.
    shift = (p_max - q_max) + (p_log - q_log)
    shift_high = shift.to(DTYPE)
    shift_low = (shift - shift_high).to(DTYPE)
    p_max, q_max, p_log, q_log = p_max.to(DTYPE), q_max.to(DTYPE), p_log.to(DTYPE), q_log.to(DTYPE)

    total = tl.zeros((BLOCK,), DTYPE)
    p_total = tl.zeros((BLOCK,), DTYPE)
    q_total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, vocab, BLOCK):
        p, q = _logits(z_p, start + lanes, vocab, DTYPE), _logits(z_q, start + lanes, vocab, DTYPE)
        gap = (p - q) - shift_high - shift_low
        atom, p_slope, q_slope = CELL((p - p_max) - p_log, (q - q_max) - q_log, gap)
        total += atom
        if dz_p is not None:
            p_total += p_slope
        if dz_q is not None:
            q_total += q_slope
    total = _sum(total).to(DTYPE)
    # A row of logits that has no softmax (nan, +inf, -inf throughout) has no value.
    total = tl.where(tl.abs(shift) < INF, total, float("nan"))
    tl.store(value + row, total)

    if dz_p is not None or dz_q is not None:
        p_total, q_total = _sum(p_total).to(DTYPE), _sum(q_total).to(DTYPE)
        finite = tl.abs(total) < INF
        weight = 1.0
        if upstream is not None:
            weight = tl.load(upstream + row).to(DTYPE)
        for start in range(0, vocab, BLOCK):
            p, q = _logits(z_p, start + lanes, vocab, DTYPE), _logits(z_q, start + lanes, vocab, DTYPE)
            log_p, log_q = (p - p_max) - p_log, (q - q_max) - q_log
            gap = (p - q) - shift_high - shift_low
            _, p_slope, q_slope = CELL(log_p, log_q, gap)
            if dz_p is not None:
                gradient = tl.where(finite, (p_slope - exponential(log_p) * p_total) * weight, 0.0)
                _write(dz_p + row * vocab, start + lanes, vocab, gradient)
            if dz_q is not None:
                gradient = tl.where(finite, (q_slope - exponential(log_q) * q_total) * weight, 0.0)
                _write(dz_q + row * vocab, start + lanes, vocab, gradient)


@triton.jit
def selected_rows(
    z, index, log_prob, entropy, dz, log_prob_upstream, entropy_upstream,
    vocab, stride,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One row: log q of one atom, the entropy of q, and where dz is not None the gradient of both."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    lanes = tl.arange(0, BLOCK)

    top, mass, moment = _nothing(BLOCK, DTYPE)
    for start in range(0, vocab, BLOCK):
        top, mass, moment = _with_one_more(_logits(z, start + lanes, vocab, DTYPE), top, mass, moment)
    highest, log_mass, spread = _over_lanes(top, mass, moment)
    tl.store(entropy + row, spread)

    atom = tl.load(index + row)
    exists = (atom >= 0) & (atom < vocab)
    chosen = tl.load(z + atom, exists, other=float("nan")).to(tl.float64)
    chosen = ((chosen - highest) - log_mass).to(DTYPE)
    tl.store(log_prob + row, chosen)

    if dz is not None:
        to_log_prob = tl.where(tl.abs(chosen) < INF, tl.load(log_prob_upstream + row).to(DTYPE), 0.0)
        to_entropy = tl.load(entropy_upstream + row).to(DTYPE)
        highest, log_mass, spread = highest.to(DTYPE), log_mass.to(DTYPE), spread.to(DTYPE)
        for start in range(0, vocab, BLOCK):
            columns = start + lanes
            log_q = (_logits(z, columns, vocab, DTYPE) - highest) - log_mass
            q = exponential(log_q)
            surprise = tl.where(q > 0, q * (log_q + spread), 0.0)  # 0 log 0 = 0
            gradient = to_log_prob * (tl.where(columns == atom, 1.0, 0.0) - q) - to_entropy * surprise
            _write(dz + row * vocab, columns, vocab, gradient)


@triton.jit
def _logits(row, columns, vocab, DTYPE: tl.constexpr):
    """A block of logits; -inf, an atom without mass, beyond the end."""
    return tl.load(row + columns, columns < vocab, other=-float("inf")).to(DTYPE)


@triton.jit
def _write(row, columns, vocab, gradient):
    tl.store(row + columns, gradient.to(row.dtype.element_ty), columns < vocab)


@triton.jit
def _nothing(BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """(highest logit, mass, moment) of no logit, in each lane."""
    return tl.full((BLOCK,), LOWEST, DTYPE), tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)


@triton.jit
def _with_one_more(z, top, mass, moment):
    """Of the logits so far of a lane and one more: t = max z, sum e^(z - t) and sum (z - t) e^(z - t)."""
    step = z - top
    step = tl.where(step < FAR, FAR, step)
    less = exponential(-tl.abs(step))  # of the two exponentials of a running maximum one is 1
    rises = step > 0
    moment = tl.where(rises, tl.fma(-mass, step, moment) * less, tl.fma(less, step, moment))
    mass = tl.where(rises, tl.fma(mass, less, 1.0), mass + less)
    return tl.where(rises, z, top), mass, moment


@triton.jit
def _over_lanes(top, mass, moment):
    """(max z, log sum e^(z - max), entropy) of the row, float64: both models' have to be told apart."""
    highest = tl.max(top, 0)
    step = top - highest
    step = tl.where(step < FAR, FAR, step)
    less = exponential(step)
    total = _sum(mass * less)
    log_total = tl.log(total)
    return highest.to(tl.float64), log_total, log_total - _sum((moment + mass * step) * less) / total


@triton.jit
def _sum(lanes):
    return tl.sum(lanes.to(tl.float64), 0)
