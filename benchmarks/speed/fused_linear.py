"""FusedLinear against the composite that people write by hand, side by side in one run.

    python -m benchmarks.speed.fused_linear

The peer makes both models' logits for all rows, then log_softmax and the divergence (for KL, torch's own
kl_div). Ours and the peer alternate; a ratio is the median of paired ratios of process time, with its range.
The error is that of the gradient against float64.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import kl_div

from fdiv import JS, KL, FusedLinear, ReverseKL

ROWS, WIDTH, VOCAB, ROUNDS = 256, 256, 32000, 3
DIVERGENCES = {"KL()": KL(), "ReverseKL()": ReverseKL(), "JS(0.5)": JS(0.5)}
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(dtype: torch.dtype = torch.float32) -> Tensors:
    """p_hidden, p_weight, q_hidden, q_weight; the student's two take gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, WIDTH), (VOCAB, WIDTH)] * 2
    p_hidden, p_weight, q_hidden, q_weight = (
        torch.randn(shape, generator=generator).mul(WIDTH**-0.25).to(dtype) for shape in shapes
    )
    return p_hidden, p_weight, q_hidden.requires_grad_(), q_weight.requires_grad_()


def fused(name: str, tensors: Tensors) -> Tensor:
    return FusedLinear()(DIVERGENCES[name], *tensors).mean()


def composite(name: str, tensors: Tensors) -> Tensor:
    p_hidden, p_weight, q_hidden, q_weight = tensors
    log_p = (p_hidden @ p_weight.T).log_softmax(-1)
    log_q = (q_hidden @ q_weight.T).log_softmax(-1)
    if name == "KL()":
        return kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return DIVERGENCES[name](log_p, log_q).mean()


def seconds(candidate: Callable, name: str, tensors: Tensors) -> float:
    started = time.process_time()
    candidate(name, tensors).backward()
    return time.process_time() - started


def gradient_error(candidate: Callable, name: str) -> float:
    """Relative error of the gradient of q_hidden against float64."""
    grads = []
    for dtype in (torch.float64, torch.float32):
        tensors = problem(dtype)
        (composite if dtype == torch.float64 else candidate)(name, tensors).backward()
        grads.append(tensors[2].grad.double())
    return ((grads[1] - grads[0]).norm() / grads[0].norm()).item()


def main() -> None:
    torch.set_num_threads(1)
    table = Table(
        "divergence", "time ours / peer", "range", "gradient error ours", "peer",
        title=f"{ROWS} rows, width {WIDTH}, vocabulary {VOCAB}, float32, 1 thread, {ROUNDS} rounds",
    )  # fmt: skip
    for name in DIVERGENCES:
        tensors = problem()
        ratios = [seconds(fused, name, tensors) / seconds(composite, name, tensors) for _ in range(ROUNDS)]
        table.add_row(
            name,
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            *(f"{gradient_error(c, name):.1e}" for c in (fused, composite)),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
