"""The Triton kernels on a GPU: right, and how fast beside the peers and the device's own limits.

    python -m benchmarks.speed.gpu

prints the tables of docs/kernels.md as Markdown. It ends with status 1 if a number is wrong, or in one line
where there is no CUDA device.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fdiv
from benchmarks.speed.case import Outcome
from benchmarks.speed.heads import Heads, Shape, differentiate, heads
from benchmarks.speed.measure import Absent, one_line, relative_error
from benchmarks.speed.ours import fused_linear
from benchmarks.speed.peers import beta_of, peer
from fdiv import Exact, FDivergence

DIVERGENCES: tuple[FDivergence, ...] = (
    fdiv.KL(),
    fdiv.ReverseKL(),
    fdiv.Jeffreys(),
    fdiv.JS(0.5),
    fdiv.JS(0.1),
    fdiv.SkewKL(0.1),
    fdiv.SkewReverseKL(0.1),
    fdiv.Alpha(0.5),
    fdiv.Alpha(-0.5),
    fdiv.SquaredHellinger(),
    fdiv.Pearson(),
    fdiv.Neyman(),
    fdiv.TV(),
    fdiv.Triangular(),
    fdiv.SoftenedKL(),
    fdiv.ChiKL(0.5),
    0.5 * fdiv.KL() + 0.5 * fdiv.TV(),
)
COVERED_BY_PEERS = (fdiv.KL(), fdiv.JS(0.5))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float64: 1e-12}
CHECKED = (64, 4099)  # rows and a prime vocabulary
TIMED = (1024, 151936)
SHAPES = (Shape(8192, 4096, 151936), Shape(8192, 1024, 151936))
COPIED = 1 << 30  # bytes

Time = Callable[[Callable[[], object]], float]  # milliseconds of a call


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: the Triton kernels are timed on a GPU alone")
    import triton.testing

    def time(step: Callable[[], object]) -> float:
        return float(triton.testing.do_bench(step, return_mode="median"))

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
    right = correctness("cuda")
    bandwidth = kernel("cuda", time)
    whole("cuda", time, bandwidth)
    if not right:
        sys.exit("some numbers are wrong: see the first table")


def correctness(device: str) -> bool:
    """Errors against float64, and what equal logits give; whether all of it is as it should be."""
    from fdiv.kernels import triton_rows

    head("divergence", "dtype", "value", "teacher's gradient", "student's gradient", "equal logits", "")
    verdicts = []
    for divergence in DIVERGENCES:
        for dtype, tolerance in TOLERANCE.items():
            z_p, z_q = logits(CHECKED, dtype, device)
            out = triton_rows.rows(divergence, z_p, z_q, wants=(True, True))
            errors = [relative_error(a, e) for a, e in zip(out[:3], exact(divergence, z_p, z_q), strict=True)]
            equal = triton_rows.rows(divergence, z_p, z_p.clone(), wants=(True, True))
            zero = not any(t.any() for t in equal[:3])
            verdicts.append(zero and all(e < tolerance for e in errors))  # nan is not less than anything
            shown = [f"{e:.0e}" for e in errors]
            line(divergence, dtype, *shown, "exactly 0" if zero else "not 0", "" if verdicts[-1] else "WRONG")
    print()
    return all(verdicts)


def kernel(device: str, time: Time) -> float:
    """fdiv_rows alone; returns the bandwidth of a copy in bytes a second."""
    from fdiv.kernels import triton_rows

    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPIED / (time(lambda: target.copy_(source)) / 1e3)
    print(f"copy: {bandwidth / 1e12:.2f} TB/s\n")
    head("divergence", "logits", "ms", "ps a pair", "bytes a pair", "share of the copy's bandwidth")
    pairs = TIMED[0] * TIMED[1]
    for divergence in DIVERGENCES:
        for dtype in (torch.float32, torch.bfloat16):
            z_p, z_q = logits(TIMED, dtype, device)
            ms = time(partial(triton_rows.rows, divergence, z_p, z_q, out_dtype=torch.bfloat16))
            moved = 3 * 2 * z_q.element_size() + 2  # three sweeps of two rows, one gradient
            share = moved * pairs / (ms / 1e3) / bandwidth
            line(divergence, dtype, f"{ms:.2f}", f"{ms * 1e9 / pairs:.1f}", moved, f"{share:.0%}")
    print()
    return bandwidth


def whole(device: str, time: Time, bandwidth: float) -> None:
    """The fused estimator and its peers, beside the products that both are made of."""
    head("shape", "divergence", "who", "ms", "floor / time", "GB at the peak", "error of dh")
    for shape in SHAPES:
        given = on_device(heads(shape, torch.bfloat16), device)
        floor = time(partial(products, given))
        for divergence in COVERED_BY_PEERS:
            expected = first_rows(divergence, given)
            for who, step in candidates(divergence, given):
                try:
                    error = relative_error(step().gradients[0][: len(expected)], expected)
                    ms, peak = time(step), peak_gigabytes(step)
                except (Absent, ImportError, RuntimeError) as reason:
                    line(shape, divergence, who, one_line(reason), "", "", "")
                    continue
                line(shape, divergence, who, f"{ms:.1f}", f"{floor / ms:.0%}", f"{peak:.1f}", f"{error:.0e}")
        line(shape, "", "four bare products", f"{floor:.1f}", "100%", "", "")
        del given
    flops = flops_a_second(device, time)
    print(f"\nroofline: {bandwidth / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s in bfloat16")


def candidates(divergence: FDivergence, given: Heads) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    yield "fdiv", lambda: fused_linear(divergence, given)
    yield "TRL chunked", peer("trl", "chunked_divergence", divergence, given)
    yield "Liger fused JSD", lambda: liger_fused(divergence, given)


def liger_fused(divergence: FDivergence, given: Heads) -> Outcome:
    """Liger's Triton version; the rows of the CPU benchmark take its torch version."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    p_hidden, p_weight, q_hidden, q_weight = given
    value = LigerFusedLinearJSDFunction.apply(
        q_hidden, q_weight, p_hidden, p_weight, None, beta_of(divergence)
    )
    return differentiate(value, given.trained)


def first_rows(divergence: FDivergence, given: Heads) -> Tensor:
    """The student's exact gradient for a few hidden states, of the mean over all rows."""
    few = [t[:16].detach().double() for t in (given.p_hidden, given.q_hidden)]
    p_weight, q_weight = given.p_weight.detach().double(), given.q_weight.detach().double()
    q_hidden = few[1].requires_grad_()
    value = divergence((few[0] @ p_weight.T).log_softmax(-1), (q_hidden @ q_weight.T).log_softmax(-1))
    return torch.autograd.grad(value.sum() / len(given.p_hidden), q_hidden)[0]


def products(given: Heads) -> None:
    """The four products that training a head against another takes, 2048 rows at a time."""
    with torch.no_grad():
        for p, q in zip(given.p_hidden.split(2048), given.q_hidden.split(2048), strict=True):
            p @ given.p_weight.T
            z = q @ given.q_weight.T
            z @ given.q_weight
            z.T @ q


def flops_a_second(device: str, time: Time) -> float:
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / (time(lambda: a @ a) / 1e3)


def peak_gigabytes(step: Callable[[], object]) -> float:
    """Above what is held before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def logits(size: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_p = torch.randn(size, generator=generator)
    z_q = z_p + 0.5 * torch.randn(size, generator=generator)
    return (3 * z_p).to(device, dtype), (3 * z_q).to(device, dtype)


def exact(divergence: FDivergence, z_p: Tensor, z_q: Tensor) -> tuple[Tensor, ...]:
    z_p, z_q = (z.double().requires_grad_() for z in (z_p, z_q))
    value = Exact()(divergence, z_p.log_softmax(-1), z_q.log_softmax(-1))
    return value.detach(), *torch.autograd.grad(value.sum(), (z_p, z_q))


def on_device(given: Heads, device: str) -> Heads:
    return Heads(*(t.detach().to(device).requires_grad_(t.requires_grad) for t in given))


def head(*names: str) -> None:
    line(*names)
    print("|" + "---|" * len(names))


def line(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
