"""The compiled elementwise half gives the numbers of the eager one, for every divergence, and a way back."""

import math
import warnings

import pytest
import torch
from tests.test_divergences import ROWS
from tests.thinned import thinned
from tests.worlds import close

import fdiv
from fdiv.kernels.cell import cell
from fdiv.kernels.compiled import Compiled
from fdiv.kernels.graph import cell_graph
from fdiv.kernels.rows import Wants, rows

ALL = [row.divergence for row in ROWS]


def atoms(dtype):
    """(log_p, log_q, gap): close, far, very far, and with empty masses."""
    generator = torch.Generator().manual_seed(0)
    log_p = 6 * torch.randn(400, generator=generator, dtype=torch.float64) - 8
    gap = torch.randn(400, generator=generator, dtype=torch.float64)
    gap = gap * torch.tensor([1e-3, 0.1, 1.0, 10.0], dtype=torch.float64).repeat(100)
    log_q = log_p - gap
    log_p[:4], log_q[2:6] = -math.inf, -math.inf
    return tuple(t.to(dtype) for t in (log_p, log_q, torch.where(torch.arange(400) < 6, log_p - log_q, gap)))


@pytest.mark.parametrize("divergence", thinned(ALL), ids=repr)
def test_the_graph_of_the_cell_is_the_cell(divergence):
    expected = cell(divergence, *atoms(torch.float64))
    actual = cell_graph(divergence, torch.float64, (True, True, True))(*atoms(torch.float64))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        finite = theirs.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-7, atol=1e-25)


@pytest.mark.parametrize("divergence", thinned(d for d in ALL if not isinstance(d, fdiv.Generator)), ids=repr)
def test_the_lowered_graph_keeps_the_digits_of_float32(divergence):
    """Without the series, which stand for expm1 and log1p, nothing is left of them near 0."""
    single = atoms(torch.float32)
    expected = cell(divergence, *(t.double() for t in single))
    for ours, theirs in zip(
        cell_graph(divergence, torch.float32, (True,) * 3)(*single), expected, strict=True
    ):
        seen = theirs.isfinite() & (theirs.abs() > 1e-25) & (theirs.abs() < 1e30)
        torch.testing.assert_close(ours[seen].double(), theirs[seen], rtol=1e-4, atol=0.0)


def test_a_graph_computes_what_is_asked_for_alone():
    value, slope = (
        sum(n.op == "call_function" for n in cell_graph(fdiv.JS(0.3), torch.float32, wanted).graph.nodes)
        for wanted in ((True, False, False), (True, False, True))
    )
    assert value < slope


@pytest.mark.slow  # a compilation each; the graphs that are compiled are tested above
@pytest.mark.parametrize("divergence", [fdiv.KL(), fdiv.JS(0.3)], ids=repr)
def test_inductor_gives_the_eager_numbers_for_any_shape(divergence):
    for shape in ((5, 701), (3, 1009)):
        generator = torch.Generator().manual_seed(0)
        p_logits = 4 * torch.randn(shape, generator=generator)
        q_logits = p_logits + 0.01 * torch.randn(shape, generator=generator)
        p_logits[:, :9] = -math.inf
        q_logits[:, :9] = -math.inf
        q_logits[-1] = p_logits[-1]  # the models agree on this row
        wants, upstream = Wants(True, True, True), torch.linspace(1, 2, shape[0])
        eager, compiled = (
            rows(divergence, p_logits.clone(), q_logits.clone(), wants, upstream=upstream, compiled=compiled)
            for compiled in (False, True)
        )
        for ours, theirs in zip(compiled, eager, strict=True):
            close(ours, theirs, 2e-6)
            assert not ours.isnan().any()
        assert compiled.value[-1] == 0 and not compiled.q_slope[-1].any() and not compiled.p_slope[-1].any()


def test_what_does_not_compile_runs_eagerly_and_says_so_once(monkeypatch):
    def reads_a_number(x):
        if x.sum().item() > 0:  # a branch that no graph can hold
            torch._dynamo.graph_break()
        return x + 1

    function = Compiled(reads_a_number, "KL()")
    monkeypatch.setattr(function, "fast", torch.compile(reads_a_number, fullgraph=True, backend="eager"))
    with pytest.warns(RuntimeWarning, match=r"KL\(\) does not compile here and runs eagerly"):
        assert function(torch.zeros(2)).tolist() == [1.0, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function(torch.ones(2)).tolist() == [2.0, 2.0]


def test_every_divergence_has_recompilations_of_its_own():
    """torch.compile counts them by code object; the ninth divergence would silently run eagerly."""

    def times(factor):
        return Compiled(lambda x: x * factor, "times")

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for factor in range(2, 14):
            function = times(factor)
            function.fast = torch.compile(function.fast._torchdynamo_orig_callable, backend="eager")
            assert function(torch.ones(3)).tolist() == [float(factor)] * 3
            assert not function.failed
