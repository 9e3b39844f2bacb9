"""One notation for code, YAML, the command line and logs: `parse(repr(x)) == x`.

A text is a Python expression of calls, literals, `inf`, tuples and lists, plus the arithmetic of divergences
(`0.5 * KL() + TV()`) and `.reverse`. It is read, never evaluated. Names are the classes that fdiv exports
and those of the packages given as `plugins`; a class name alone means its default: `KL` is `KL()`.
"""

import ast
import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

ATTRIBUTES = {"reverse"}
PLUGIN = "fdiv_plugin_"  # before the name of a recipe's own file, as a module


def parse(text: str, plugins: Iterable[str] = ()) -> object:
    """The object that `text` describes.

    >>> parse("JS(beta=0.3)")
    JS(beta=0.3)

    Raises ValueError with the nearest known name, and TypeError for arguments the class does not take.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"cannot read {text!r}: {error.msg}; write it as in Python, 'JS(beta=0.5)'"
        ) from None
    return _instance(_Reader(text, _names(plugins)).read(tree))


def function_named(text: str) -> Callable[..., Any]:
    """The function that "module:name" says; a recipe's plugin `rewards.py` is the module `rewards`.

    Raises ValueError where there is none.
    """
    module, colon, name = text.partition(":")
    plugin = sys.modules.get(PLUGIN + module)
    try:
        found = getattr(plugin or importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r} cannot be found: {error}; write 'module:function'") from None
    if not callable(found):
        raise ValueError(f"{text!r} is no function; write 'module:function'")
    return found


def _instance(value: Any) -> Any:
    """A bare class name stands for its default."""
    return value() if inspect.isclass(value) else value


def _names(plugins: Iterable[str]) -> dict[str, object]:
    names: dict[str, object] = {}
    for package in ("fdiv", *plugins):
        module = importlib.import_module(package)
        names |= {k: v for k, v in vars(module).items() if inspect.isclass(v) and not k.startswith("_")}
    return names


class _Reader:
    def __init__(self, text: str, names: dict[str, object]):
        self.text, self.names = text, names

    def read(self, node: ast.expr) -> Any:
        method = getattr(self, "read_" + type(node).__name__.lower(), None)
        if method is None:
            raise ValueError(
                f"cannot read {ast.unparse(node)!r} in {self.text!r}: only names, calls, literals, "
                "w * D, D + D and D.reverse are allowed"
            )
        return method(node)

    def read_constant(self, node: ast.Constant) -> object:
        return node.value

    def read_tuple(self, node: ast.Tuple) -> tuple:
        return tuple(_instance(self.read(element)) for element in node.elts)

    def read_list(self, node: ast.List) -> list:
        return [_instance(self.read(element)) for element in node.elts]

    def read_unaryop(self, node: ast.UnaryOp) -> object:
        value = self.read(node.operand)
        if not (isinstance(node.op, ast.USub) and isinstance(value, int | float)):
            raise ValueError(f"cannot read {ast.unparse(node)!r} in {self.text!r}: only numbers take a minus")
        return -value

    def read_binop(self, node: ast.BinOp) -> object:
        left, right = _instance(self.read(node.left)), _instance(self.read(node.right))
        if not isinstance(node.op, ast.Add | ast.Mult):
            raise ValueError(f"cannot read {ast.unparse(node)!r} in {self.text!r}: only * and + are allowed")
        try:
            return left + right if isinstance(node.op, ast.Add) else left * right
        except TypeError as error:
            raise TypeError(f"{ast.unparse(node)!r}: {error}; write w * D or D + D") from None

    def read_name(self, node: ast.Name) -> object:
        if node.id == "inf":
            return math.inf
        if node.id not in self.names:
            close = difflib.get_close_matches(node.id, self.names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; `fdiv list` shows what there is"
            raise ValueError(f"unknown name {node.id!r} in {self.text!r}{hint}")
        return self.names[node.id]

    def read_attribute(self, node: ast.Attribute) -> object:
        owner = self.read(node.value)
        if node.attr in ATTRIBUTES:
            owner = _instance(owner)
        if inspect.isclass(owner):  # a named constructor, Alpha.trl(0.3)
            constructor = inspect.getattr_static(owner, node.attr, None)
            if not isinstance(constructor, classmethod) or node.attr.startswith("_"):
                raise ValueError(f"{owner.__name__} has no named constructor {node.attr!r}, in {self.text!r}")
        elif node.attr not in ATTRIBUTES:
            raise ValueError(f"cannot read .{node.attr} in {self.text!r}: only .reverse is allowed")
        return getattr(owner, node.attr)

    def read_call(self, node: ast.Call) -> object:
        function = self.read(node.func)
        if not (inspect.isclass(function) or inspect.ismethod(function)):
            raise ValueError(f"{ast.unparse(node.func)!r} in {self.text!r} cannot be called")
        arguments = [_instance(self.read(argument)) for argument in node.args]
        keywords: dict[Any, Any] = {k.arg: _instance(self.read(k.value)) for k in node.keywords}
        if None in keywords or len(keywords) < len(node.keywords):
            raise ValueError(f"cannot read {ast.unparse(node)!r}: write every keyword once, and no **")
        try:
            inspect.signature(function).bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{ast.unparse(node)!r}: {error}; it is {_signature(function)}") from None
        return function(*arguments, **keywords)


def _signature(function) -> str:
    return f"{function.__qualname__}{inspect.signature(function)}"
