"""A cell's graph, written as the source of a Triton function.

One line an operation. What has no line here has no Triton kernel: `translate` says which operation it is, and
the divergence runs through torch.compile.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def translate(graph: GraphModule, dtype: torch.dtype) -> str:
    """The source of `cell(log_p, log_q, gap)`, which returns the graph's outputs as a tuple.

    Its globals are `tl` (triton.language) and `exponential`; its arguments are blocks of `dtype`. Raises
    NotImplementedError, naming the operation, if there is one that has no Triton form here.
    """
    text = _Text(dtype)
    (output,) = graph.graph.find_nodes(op="output")
    needed = _needed(output)
    inputs = iter(("log_p", "log_q", "gap"))
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            text.names[node] = next(inputs)
        elif node in needed:
            text.add(node)
    results = ", ".join(text.operand(x) for x in output.args[0])
    body = [*text.constants.values(), *text.lines, f"return {results}"]
    return "\n".join(["def cell(log_p, log_q, gap):", *(f"    {line}" for line in body), ""])


class _Text:
    """The lines so far, the name of each value, and which names stand for true or false."""

    def __init__(self, dtype: torch.dtype):
        self.torch_dtype = dtype
        self.dtype = {torch.float32: "tl.float32", torch.float64: "tl.float64"}[dtype]
        self.names: dict[Node, str] = {}
        self.known: dict[Node, float] = {}  # values that are the same for every atom
        self.logical: set[str] = set()
        self.constants: dict[float | str, str] = {}
        self.lines: list[str] = []
        self.written: dict[str, str] = {}

    def add(self, node: Node) -> None:
        value = self.value_of(node)
        if value is not None:
            self.known[node] = value
            return
        expression, logical = self.expression(node)
        if expression not in self.written:
            name = self.written[expression] = f"x{len(self.written)}"
            self.lines.append(f"{name} = {expression}")
            if logical:
                self.logical.add(name)
        self.names[node] = self.written[expression]

    def value_of(self, node: Node) -> float | None:
        """The number that `node` is for every atom, None if it depends on the atom."""
        if node.target in CONSTANTS:
            return float(CONSTANTS[node.target](*node.args))
        if node.target not in ARITHMETIC or any(x not in self.known for x in node.all_input_nodes):
            return None
        operation: Any = node.target
        arguments = [
            torch.tensor(self.known[x], dtype=self.torch_dtype) if isinstance(x, Node) else x
            for x in node.args
        ]
        return operation(*arguments, **node.kwargs).item()

    def expression(self, node: Node) -> tuple[str, bool]:
        """The operation as Triton, and whether it is true or false rather than a number."""
        target: Any = node.target
        arguments: tuple[Any, ...] = node.args
        if (factors := _horner_step(node)) is not None:
            return f"tl.fma({', '.join(self.operand(x) for x in (*factors, arguments[1]))})", False
        if target == aten.mul.Tensor and all(self.is_logical(x) for x in arguments):
            target = aten.logical_and.default  # how isfinite is traced
        if node.kwargs or target not in EXPRESSIBLE:
            options = f" with {dict(node.kwargs)}" if node.kwargs else ""
            raise NotImplementedError(
                f"{target}{options} has no Triton form in fdiv.kernels.triton_source; "
                "the compiled torch path is used instead"
            )
        if target in CONNECTIVES:
            return CONNECTIVES[target](*(self.condition(x) for x in arguments)), True
        if target == aten.where.self:
            condition, yes, no = arguments
            return f"tl.where({self.condition(condition)}, {self.operand(yes)}, {self.operand(no)})", False
        if target == aten.pow.Tensor_Scalar:
            return self.power(*arguments), False
        operands = [self.operand(x) for x in arguments]
        if target in COMPARISONS:
            return COMPARISONS[target](*operands), True
        return ARITHMETIC[target](*operands), False

    def operand(self, x: Node | float | None) -> str:
        """A name, that of a number where `x` is true or false."""
        if x is None:
            return "None"
        if not isinstance(x, Node):
            return self.constant(float(x))
        if x in self.known:
            return self.constant(self.known[x])
        return f"{self.names[x]}.to({self.dtype})" if self.is_logical(x) else self.names[x]

    def condition(self, x: Node) -> str:
        return self.names[x] if self.is_logical(x) else f"({self.operand(x)} != 0)"

    def is_logical(self, x: Node | float) -> bool:
        return isinstance(x, Node) and self.names.get(x) in self.logical

    def constant(self, x: float) -> str:
        """The name of a number: a bare literal would be rounded to float32 in some places."""
        literal = repr(x) if abs(x) < float("inf") else f"float('{x}')"
        name = f"c{len(self.constants)}"
        line = self.constants.setdefault(literal, f"{name} = tl.full((), {literal}, {self.dtype})")
        return line.split(" ")[0]

    def power(self, x: Node, exponent: float) -> str:
        base, n = self.operand(x), float(exponent)
        if n.is_integer() and 1 <= abs(n) <= 8:
            product = " * ".join([base] * int(abs(n)))
            return product if n > 0 else f"1.0 / ({product})"
        if abs(n) == 0.5:
            return f"tl.sqrt({base})" if n > 0 else f"1.0 / tl.sqrt({base})"
        return f"exponential({self.constant(n)} * tl.log({base}))"  # nan for x < 0, as it should be


def _needed(output: Node) -> set[Node]:
    """The nodes that are written: not those which another's line takes in."""
    needed, waiting = set(), [output]
    while waiting:
        for node in _inputs(waiting.pop()):
            if node not in needed:
                needed.add(node)
                waiting.append(node)
    return needed


def _inputs(node: Node) -> list[Node]:
    if (factors := _horner_step(node)) is not None:
        return [x for x in factors if isinstance(x, Node)]
    return node.all_input_nodes


def _horner_step(node: Node) -> tuple | None:
    """(x, y) of x y + number, taken in one instruction.

    Kernels are compiled without fusion, which would round a b - c d differently from c d - a b, and equal
    models no longer to 0. Beside a number nothing cancels by symmetry, and half of a cell is polynomials.
    """
    if node.target != aten.add.Tensor or node.kwargs:
        return None
    product, number = node.args
    if not isinstance(product, Node) or product.target != aten.mul.Tensor or isinstance(number, Node):
        return None
    x, y = product.args
    # A factor that is a number comes second, whoever wrote the series: equal steps are then written once.
    return (y, x) if isinstance(x, Node) and x.target in CONSTANTS else (x, y)


def _infix(sign: str) -> Callable[[str, str], str]:
    return lambda a, b: f"{a} {sign} {b}"


def _call(function: str) -> Callable[..., str]:
    return lambda *x: f"tl.{function}({', '.join(x)})"


def _clamp(x: str, low: str = "None", high: str = "None") -> str:
    x = x if low == "None" else f"tl.maximum({x}, {low})"
    return x if high == "None" else f"tl.minimum({x}, {high})"


def _sign(x: str) -> str:
    return f"tl.where({x} > 0, 1.0, tl.where({x} < 0, -1.0, {x}))"


Rule = Callable[..., str]
ARITHMETIC: dict[Any, Rule] = {
    aten.add.Tensor: _infix("+"),
    aten.add.Scalar: _infix("+"),
    aten.sub.Tensor: _infix("-"),
    aten.sub.Scalar: _infix("-"),
    aten.rsub.Scalar: lambda a, b: f"{b} - {a}",
    aten.mul.Tensor: _infix("*"),
    aten.mul.Scalar: _infix("*"),
    aten.div.Tensor: _infix("/"),
    aten.div.Scalar: _infix("/"),
    aten.neg.default: lambda x: f"-{x}",
    aten.reciprocal.default: lambda x: f"1.0 / {x}",
    aten.abs.default: _call("abs"),
    aten.exp.default: lambda x: f"exponential({x})",
    aten.log.default: _call("log"),
    aten.sqrt.default: _call("sqrt"),
    aten.rsqrt.default: _call("rsqrt"),
    aten.sigmoid.default: lambda x: f"1.0 / (1.0 + exponential(-{x}))",
    aten.sgn.default: _sign,
    aten.sign.default: _sign,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda x, high: _clamp(x, high=high),
    aten.maximum.default: _call("maximum"),
    aten.minimum.default: _call("minimum"),
}
COMPARISONS: dict[Any, Rule] = {
    getattr(getattr(aten, name), kind): _infix(sign)
    for name, sign in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items()
    for kind in ("Scalar", "Tensor")
} | {
    aten.isinf.default: lambda x: f"tl.abs({x}) == float('inf')",
    aten.isnan.default: lambda x: f"{x} != {x}",
}
CONNECTIVES: dict[Any, Rule] = {
    aten.bitwise_and.Tensor: _infix("&"),
    aten.bitwise_or.Tensor: _infix("|"),
    aten.bitwise_not.default: lambda x: f"~{x}",
    aten.logical_and.default: _infix("&"),
    aten.logical_or.default: _infix("|"),
    aten.logical_not.default: lambda x: f"~{x}",
}
CONSTANTS: dict[Any, Callable[..., float]] = {
    aten.scalar_tensor.default: lambda value: value,
    aten.full_like.default: lambda _, value: value,
    aten.ones_like.default: lambda _: 1.0,
    aten.zeros_like.default: lambda _: 0.0,
}
EXPRESSIBLE = {*ARITHMETIC, *COMPARISONS, *CONNECTIVES, aten.where.self, aten.pow.Tensor_Scalar}
