"""Rewrites a traced cell into operations that compilers neither round badly nor run slowly.

- expm1 and log1p become a series near 0, and exp(x) - 1 or log(1 + x) beyond: inductor writes expm1(x) as
  exp(x) - 1 everywhere, which has no right digit near 0.
- exp of less than FLOOR is taken at FLOOR, next to nothing: arithmetic on denormal numbers is a hundred times
  slower than on others.
- exp(where(c, 0, x)) becomes where(c, 1, exp(x)), so that one exponential serves for both.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
SMALL = 0.5  # the series' reach: that of fdiv._math.NEAR, whose clamps then need no branch
FLOOR = {torch.float32: -80.0, torch.float64: -700.0}


def for_compilers(module: GraphModule) -> None:
    """Lower `module` in place."""
    for node in list(module.graph.nodes):
        rule = RULES.get(node.target)
        if rule is not None:
            with module.graph.inserting_before(node):
                new = rule(_Writer(module.graph, node.meta["val"].dtype), node.args[0])
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)
    module.recompile()


class _Writer:
    """Appends operations to a graph, at its insertion point."""

    def __init__(self, graph: Graph, dtype: torch.dtype):
        self.graph, self.dtype = graph, dtype

    def __call__(self, operation: Callable, *args) -> Node:
        return self.graph.call_function(operation, args)

    def choose(self, condition: Node, yes: Node | float, no: Node | float) -> Node:
        return self(aten.where.self, condition, *(self._tensor(x) for x in (yes, no)))

    def polynomial(self, coefficients: list[float], x: Node) -> Node:
        """Horner's rule, from the highest power down to the constant."""
        total = self(aten.mul.Tensor, x, coefficients[0])
        for coefficient in coefficients[1:-1]:
            total = self(aten.mul.Tensor, self(aten.add.Tensor, total, coefficient), x)
        return self(aten.add.Tensor, total, coefficients[-1])

    def _tensor(self, x: Node | float) -> Node:
        if isinstance(x, Node):
            return x
        return self.graph.call_function(aten.scalar_tensor.default, (x,), {"dtype": self.dtype})


def _exp(write: _Writer, x: Any) -> Node:
    if x.target == aten.where.self and _is_zero(x.args[1]):
        return write.choose(x.args[0], 1.0, _exp(write, x.args[2]))
    return write(aten.exp.default, write(aten.clamp.default, x, FLOOR[write.dtype]))


def _expm1(write: _Writer, x: Node) -> Node:
    # As fdiv._math writes exp(x) - 1 - x, so that a cell with both has one series.
    terms = range(15 if write.dtype == torch.float64 else 9, 1, -1)
    series = [1 / math.factorial(k) for k in terms]

    def near(y: Node) -> Node:
        tail = write(aten.mul.Tensor, write(aten.mul.Tensor, write.polynomial(series, y), y), y)
        return write(aten.add.Tensor, tail, y)

    return _split(write, x, near, lambda y: write(aten.sub.Tensor, _exp(write, y), 1.0))


def _log1p(write: _Writer, x: Node) -> Node:
    terms = range(17 if write.dtype == torch.float64 else 9, 0, -1)
    # log(1 + y) = 2 artanh(r), r = y / (2 + y), |r| <= 1/3
    series = [2 / (2 * k - 1) for k in terms]

    def near(y: Node) -> Node:
        r = write(aten.div.Tensor, y, write(aten.add.Tensor, y, 2.0))
        return write(aten.mul.Tensor, write.polynomial(series, write(aten.mul.Tensor, r, r)), r)

    return _split(write, x, near, lambda y: write(aten.log.default, write(aten.add.Tensor, y, 1.0)))


RULES = {aten.exp.default: _exp, aten.expm1.default: _expm1, aten.log1p.default: _log1p}


def _split(write: _Writer, x: Any, near: Callable[[Node], Node], far: Callable[[Node], Node]) -> Node:
    """`near` where |x| < SMALL and `far` elsewhere; `near` alone where a clamp says that it is enough."""
    if x.target == aten.clamp.default and len(x.args) == 3 and -SMALL <= x.args[1] <= x.args[2] <= SMALL:
        return near(x)
    is_near = write(aten.lt.Scalar, write(aten.abs.default, x), SMALL)
    return write.choose(is_near, near(write(aten.clamp.default, x, -SMALL, SMALL)), far(x))


def _is_zero(node: Any) -> bool:
    return node.target == aten.scalar_tensor.default and node.args[0] == 0.0
