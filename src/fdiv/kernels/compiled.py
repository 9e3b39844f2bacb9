"""torch.compile with a way back: what does not compile runs eagerly, and says so once."""

import types
import warnings
from collections.abc import Callable

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

# Fused multiply-adds, which are faster and round less.
OPTIONS: dict = {"cpp.enable_floating_point_contract_flag": "fast"}


class Compiled:
    """`function` compiled for any shape, or as it is where its compilation fails.

    Both give the same numbers up to rounding; `what` names the function in the warning.
    """

    def __init__(self, function: Callable, what: str):
        self.eager, self.what, self.failed = function, what, False
        self.fast = torch.compile(_with_its_own_code(function), dynamic=True, options=OPTIONS)

    def __call__(self, *args):
        if self.failed:
            return self.eager(*args)
        try:
            return self.fast(*args)
        except (TorchDynamoException, InductorError) as error:
            self.failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"{self.what} does not compile here and runs eagerly: the same numbers, much slower. "
                f"torch.compile said: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.eager(*args)


def _with_its_own_code(function: Callable) -> Callable:
    """A copy with a code object of its own: torch.compile counts its limit of 8 recompilations per code."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
