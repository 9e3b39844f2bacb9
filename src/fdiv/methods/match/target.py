"""A target as a base model times scorers: P(y) = a(y) b_1(y) b_2(y) ..., known up to its sum Z.

    Target() * Accept()               a restricted to the answers that the verifier accepts
    Target() * Tilt(beta)             a e^(r/beta), the optimum of RLHF with beta KL(policy, a)
    Target() * Exponential(f, l)      a e^(l . f), the closest to a with given means of f (gdc.py finds l)

A function in a scorer is one of three: a callable f(ids [N, S], mask [N, S]) -> [N]; "module:function", which
is imported, a recipe's plugin among others; or a name without a colon, a method of the task, as "verify".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fdiv.notation import function_named

Function = str | Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Scorer(Protocol):
    """A frozen dataclass: log b(y) of each sequence, -inf where the target has no mass."""

    def log_score(self, ids: Tensor, mask: Tensor, task: Any) -> Tensor:
        """ids, mask [N, S], mask true on the answers -> [N]."""
        ...


@dataclass(frozen=True)
class Accept:
    """b = 1 where the function says 1, else 0: "verify" is the task's verifier."""

    function: Function = "verify"

    def log_score(self, ids: Tensor, mask: Tensor, task: Any) -> Tensor:
        verdict = values_of(self.function, ids, mask, task)
        if not bool(((verdict == 0) | (verdict == 1)).all()):
            wrong = verdict[(verdict != 0) & (verdict != 1)][0].item()
            raise ValueError(
                f"{self!r} reads 0 or 1, its function gave {wrong:g}; write Tilt(beta, function) for a score"
            )
        return verdict.log()


@dataclass(frozen=True)
class Tilt:
    """b = e^(r/beta). r is the function's; without one the task's `reward`, or `verify` if it has none."""

    beta: float
    function: Function | None = None

    def __post_init__(self):
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta is a finite temperature > 0, got {self.beta!r}")

    def log_score(self, ids: Tensor, mask: Tensor, task: Any) -> Tensor:
        own = "reward" if hasattr(task, "reward") else "verify"
        return values_of(own if self.function is None else self.function, ids, mask, task) / self.beta


@dataclass(frozen=True)
class Exponential:
    """b = e^(sum lambda_i f_i): the form of every target of GDC's distributional constraints."""

    features: tuple[Function, ...]
    lambdas: tuple[float, ...]

    def __post_init__(self):
        if not (isinstance(self.features, tuple) and isinstance(self.lambdas, tuple)):
            raise TypeError(
                f"features and lambdas are tuples, got {self.features!r} and {self.lambdas!r}; "
                "write Exponential(('verify',), (0.5,))"
            )
        if len(self.features) != len(self.lambdas):
            raise ValueError(f"{len(self.features)} features have {len(self.lambdas)} lambdas; one each")
        if not all(math.isfinite(number) for number in self.lambdas):
            raise ValueError(
                f"lambdas are finite, got {self.lambdas!r}; a hard constraint is Accept(function)"
            )

    def log_score(self, ids: Tensor, mask: Tensor, task: Any) -> Tensor:
        features = features_of(self.features, ids, mask, task)
        return features @ features.new_tensor(self.lambdas)


@dataclass(frozen=True)
class Target:
    """The base model times its scorers; Target() is the base model itself.

    >>> Target() * Tilt(0.1)
    Target(scorers=(Tilt(beta=0.1, function=None),))
    """

    scorers: tuple[Scorer, ...] = ()

    def __post_init__(self):
        if not isinstance(self.scorers, tuple):
            raise TypeError(f"scorers are a tuple, got {self.scorers!r}; write Target() * Accept()")
        for scorer in self.scorers:
            if isinstance(scorer, type | Target) or not isinstance(scorer, Scorer):
                raise TypeError(f"a scorer is Accept(), Tilt(beta) or Exponential(...), got {scorer!r}")

    def __mul__(self, scorer: Scorer) -> "Target":
        return Target((*self.scorers, scorer))

    @torch.no_grad()
    def log_score(self, log_base: Tensor, ids: Tensor, mask: Tensor, task: Any) -> Tensor:
        """log P of whole answers, [N] float64; log_base [N] is the base model's log-probability of each."""
        total = _checked(log_base.double(), "the base model's log-probability", len(ids))
        for scorer in self.scorers:
            score = scorer.log_score(ids, mask, task).to(total)
            total = total + _checked(score, f"the log-score of {scorer!r}", len(ids))
        return total


def values_of(function: Function, ids: Tensor, mask: Tensor, task: Any) -> Tensor:
    """What a function says of each sequence, [N] float64."""
    found = torch.as_tensor(resolved(function, task)(ids, mask)).detach().double()
    if found.shape != (len(ids),):
        raise ValueError(f"{function!r} gave {tuple(found.shape)} for {len(ids)} sequences; one number each")
    if bool(found.isnan().any()):
        raise ValueError(f"{function!r} gave nan for a sequence")
    return found


def features_of(features: tuple[Function, ...], ids: Tensor, mask: Tensor, task: Any) -> Tensor:
    """What each function says of each sequence, [N, features] float64, finite."""
    columns = [values_of(function, ids, mask, task) for function in features]
    for function, column in zip(features, columns, strict=True):
        if not bool(column.isfinite().all()):
            raise ValueError(f"the feature {function!r} is infinite for a sequence; Accept() rejects those")
    return torch.stack(columns, 1) if columns else torch.zeros(len(ids), 0, dtype=torch.float64)


def resolved(function: Function, task: Any) -> Callable[..., Any]:
    """The callable that a function's text names."""
    if not isinstance(function, str):
        return function
    if ":" in function:
        return function_named(function)
    found = getattr(task, function, None)
    if not callable(found):
        raise ValueError(
            f"{type(task).__name__} has no method {function!r}; write one that it has, or "
            "'module:function' for a function of your own"
        )
    return found


def _checked(score: Tensor, what: str, count: int) -> Tensor:
    """Refuses what no log of a finite mass is."""
    if score.shape != (count,):
        raise ValueError(f"{what} is {tuple(score.shape)} for {count} sequences; one number each")
    if bool((score.isnan() | (score == math.inf)).any()):
        raise ValueError(f"{what} is nan or +inf for a sequence; a log-score is finite, or -inf to reject")
    return score
