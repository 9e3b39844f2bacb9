"""The contract of an estimator: what it sees, and what it promises."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

Sees = Literal["logits", "heads", "log_probs", "critic", "points"]


@dataclass(frozen=True)
class Guarantee:
    """What an estimate says about the true divergence.

    bias: of the value ("none", or in words).
    bound: "exact", "lower" (never above the truth), "unbiased" (right on average) or "none".
    support: which atoms are looked at.
    """

    bias: str
    bound: Literal["exact", "lower", "unbiased", "none"]
    support: str


@runtime_checkable
class Estimator(Protocol):
    """A frozen dataclass, called as estimator(divergence, *evidence) -> one number a row.

    `evidence` names the tensors in their order; a method passes them by these names. Rows are never
    reduced: a method does that, over the valid tokens of the global batch.
    """

    sees: ClassVar[Sees]

    @property
    def evidence(self) -> tuple[str, ...]:
        """The names of the tensors that follow the divergence."""
        ...

    @property
    def guarantee(self) -> Guarantee:
        """Bias, direction of bound and support."""
        ...

    def check(self, divergence: object) -> None:
        """Raise TypeError, saying what to write instead, if `divergence` cannot be estimated this way."""
        ...

    # (divergence, *evidence) -> [rows]; written as an attribute, for each names its own evidence
    __call__: Callable[..., Tensor]
