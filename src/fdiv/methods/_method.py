"""The contract of a method, and the one reduction they share."""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fdiv._divergence import Divergence

Consumes = Literal["tokens", "responses", "pairs", "rollouts"]


class Out(NamedTuple):
    """A scalar loss to call backward on, and numbers to log (detached)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@runtime_checkable
class Method(Protocol):
    """One paper: a frozen dataclass with a divergence, called with named tensors.

    `consumes` says what a step is made of: "tokens" (text with labels), "responses" (and a teacher),
    "pairs" (chosen and rejected), "rollouts" (sampled groups with rewards).
    """

    consumes: ClassVar[Consumes]

    @property
    def divergence(self) -> Divergence: ...

    __call__: Callable[..., Out]


def mean_over_tokens(rows: Tensor, mask: Tensor | None = None, count: Tensor | float | None = None) -> Tensor:
    """Sum of the rows where `mask` is true, over `count`: the tokens of the *global* batch.

    `count` defaults to the tokens of this call. Masked rows are selected away, not multiplied by 0; with no
    token at all the loss is 0 and its graph intact.
    """
    if mask is not None:
        check_mask(mask, rows.shape)
        rows = torch.where(mask, rows, 0.0)
        count = mask.sum() if count is None else count
    count = rows.numel() if count is None else count
    return rows.sum() / torch.as_tensor(count, device=rows.device).clamp(min=1)


def blank(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor` with zeros where `mask` is false, whose shape is that of its leading dimensions.

    A mask on a loss alone is too late: a gradient of 0 that passes through an infinity becomes nan.
    """
    check_mask(mask, tensor.shape[: mask.ndim])
    return torch.where(mask.reshape(mask.shape + (1,) * (tensor.ndim - mask.ndim)), tensor, 0.0)


def named(evidence: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    """The tensors of these names, in this order; nothing may be missing, or given and ignored."""
    if evidence.keys() != set(names):
        got = ", ".join(evidence) or "nothing"
        raise TypeError(f"the estimator reads {', '.join(names)}; got {got}")
    return [evidence[name] for name in names]


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raise unless `mask` is boolean and of this shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is boolean, got {mask.dtype}; write mask.bool()")
    if mask.shape != shape:
        raise ValueError(f"mask {tuple(mask.shape)} and rows {tuple(shape)} differ in shape")
