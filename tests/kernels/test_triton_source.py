"""The translation of cells to Triton: its text, run on a stand-in for triton.language made of torch."""

import types

import pytest
import torch
from tests.test_divergences import ROWS
from tests.thinned import thinned
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fdiv
from fdiv.kernels.graph import cell_graph
from fdiv.kernels.triton_source import translate

INF, NAN = float("inf"), float("nan")
TL = types.SimpleNamespace(
    float32=torch.float32,
    float64=torch.float64,
    full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
    where=lambda condition, yes, no: torch.where(
        condition, *torch.broadcast_tensors(_tensor(yes), _tensor(no))
    ),
    fma=lambda x, y, z: x * y + z,
    **{name: getattr(torch, name) for name in ("abs", "log", "sqrt", "rsqrt", "maximum", "minimum")},
)


def _tensor(x: Tensor | float) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x)


def run(text: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    scope = {"tl": TL, "exponential": torch.exp}
    exec(text, scope)
    out = scope["cell"](*inputs)
    return tuple(x.expand(inputs[0].shape) for x in (out if isinstance(out, tuple) else (out,)))


def atoms(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(log_p, log_q, gap) of all kinds: near, far, peaked, without mass on either side or both."""
    generator = torch.Generator().manual_seed(0)
    log_p = 6 * torch.randn(400, generator=generator, dtype=torch.float64) - 8
    step = torch.randn(400, generator=generator, dtype=torch.float64)
    gap = step * torch.tensor([0.0, 1e-3, 0.1, 1.0, 10.0], dtype=torch.float64).repeat(80)
    log_q = log_p - gap
    log_p[:8], log_q[4:12] = -INF, -INF
    return log_p.to(dtype), log_q.to(dtype), torch.where(log_p == log_q, gap, log_p - log_q).to(dtype)


@pytest.mark.parametrize("row", thinned(ROWS), ids=str)
def test_the_cell_of_every_divergence_is_translated_and_computes_what_its_graph_does(row):
    graph = cell_graph(row.divergence, torch.float32, (True, True, True))
    inputs = atoms(torch.float32)
    for actual, expected in zip(run(translate(graph, torch.float32), *inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("divergence", [fdiv.KL(), fdiv.JS(0.1), fdiv.Alpha(0.3)], ids=repr)
def test_float64_keeps_its_digits(divergence):
    graph = cell_graph(divergence, torch.float64, (True, False, True))
    text, inputs = translate(graph, torch.float64), atoms(torch.float64)
    assert "tl.float32" not in text
    for actual, expected in zip(run(text, *inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-300)


def logic(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    one = (a > 0) & ~(b <= c) | (c != b)
    other = torch.logical_or(a == b, torch.logical_not(a < 1)) & torch.logical_and(b >= 0, a.isfinite())
    return (
        torch.where(one, 1.0, 2.0) + torch.where(other, a, 3.0) + (a > b) * b + (a >= 2.5) + a.isinf() * 1.0
    )


OPERATIONS = {
    "arithmetic": lambda a, b, c: (a + b * 2 - c / 3) / (1 + b.abs()) - (2 - a) + a.neg() * 0.1,
    "logic": logic,
    "comparisons with tensors": lambda a, b, c: (a < b) * 1.0 + (a >= c) * 2.0 + (b.isnan() | (a != c)) * 4.0,
    "bounds": lambda a, b, c: a.clamp(-1, 1) + b.clamp(min=0.3) + c.clamp(max=0.2) + a.clamp_min(0.1),
    "larger and smaller": lambda a, b, c: torch.maximum(a, b) - torch.minimum(b, c) + c.clamp_max(0.5),
    "powers": lambda a, b, c: a**2 + b**3 - 1 / (a.abs() + 1) ** 2 + (b.abs() + 0.1) ** 1.7 + a.square(),
    "roots": lambda a, b, c: a.abs() ** 0.5 + (b.abs() + 1) ** -0.5 + c.abs().sqrt() + (a * a + 1).rsqrt(),
    "exponentials": lambda a, b, c: a.exp() + (b.abs() + 1).log() + c.sigmoid() + (a.abs() + 1).reciprocal(),
    "signs": lambda a, b, c: torch.sign(a) - torch.sign(c) + b.sgn() * 2 + 3 * torch.sgn(b * 0),
    "constants": lambda a, b, c: torch.ones_like(a) * 0.9 * b + torch.zeros_like(a) - torch.full_like(a, 0.1),
    "a constant alone": lambda a, b, c: torch.full_like(a, 0.7).square() / 3,
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation(name):
    generator = torch.Generator().manual_seed(1)
    inputs = [2 * torch.randn(50, generator=generator) for _ in range(3)]
    inputs[0][:3] = torch.tensor([0.0, INF, 2.5])
    inputs[1][3:6] = inputs[0][3:6]
    examples = [torch.zeros(()) for _ in range(3)]
    graph = make_fx(lambda a, b, c: [OPERATIONS[name](a, b, c)])(*examples)
    (actual,) = run(translate(graph, torch.float32), *inputs)
    torch.testing.assert_close(actual, OPERATIONS[name](*inputs), rtol=2e-6, atol=1e-6, equal_nan=True)


def test_what_has_no_triton_form_is_named_with_what_happens_instead():
    examples = [torch.zeros(()) for _ in range(3)]
    graph = make_fx(lambda a, b, c: [a * torch.erfinv(b)])(*examples)
    with pytest.raises(
        NotImplementedError, match=r"aten\.erfinv\.default has no Triton form.*compiled torch path"
    ):
        translate(graph, torch.float32)
    graph = make_fx(lambda a, b, c: [torch.add(a, b, alpha=3)])(*examples)
    with pytest.raises(NotImplementedError, match=r"aten\.add\.Tensor with {'alpha': 3}"):
        translate(graph, torch.float32)


def test_steps_of_a_polynomial_are_fused_and_symmetric_products_are_not():
    examples = [torch.zeros(()) for _ in range(3)]
    graph = make_fx(lambda a, b, c: [(a * b + 0.5) * b + 2.0, a * b - b * c + a * c])(*examples)
    assert translate(graph, torch.float32).count("tl.fma") == 2
