"""The cell of a divergence as a graph of elementwise operations, for compilers.

The cell is traced once, on single numbers. Whatever a user writes as a perspective or as a `Generator` is
compiled in the same way as what ships with the package. Imported only where something is compiled: the tracer
costs more to import than all of fdiv.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass

from fdiv._divergence import FDivergence
from fdiv.kernels import lower
from fdiv.kernels.cell import cell


@lru_cache(maxsize=1024)
def cell_graph(divergence: FDivergence, dtype: torch.dtype, outputs: tuple[bool, bool, bool]) -> GraphModule:
    """`cell` as a graph of elementwise ATen operations on (log_p, log_q, gap), any shape; `outputs` selects.

    Lowered for a compiler (see `lower`); to be run as it is only in tests.
    """

    def selected(log_p: Tensor, log_q: Tensor, gap: Tensor) -> list[Tensor]:
        all_three = cell(divergence, log_p, log_q, gap)
        return [t for t, wanted in zip(all_three, outputs, strict=True) if wanted]

    # Three tensors, not one thrice: the tracer takes equal objects for the same input.
    example = [torch.zeros((), dtype=dtype) for _ in range(3)]
    # Twice: the second trace turns what autograd does in place into pure operations.
    graph = make_fx(torch.func.functionalize(make_fx(selected)(*example)))(*example)
    lower.for_compilers(graph)
    result = CSEPass()(graph)
    graph = graph if result is None else result.graph_module
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
