"""What an adapter refuses when it is built: a method of the wrong kind, an option that would do nothing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fdiv.methods._method import Consumes, Method


def require_method(method: object, consumes: tuple[Consumes, ...], host: str, instead: str) -> None:
    """Raise TypeError unless `method` is a method that is fed what `host` has."""
    if isinstance(method, type) or not isinstance(method, Method):
        raise TypeError(f"{host}(method=...) takes a method, got {method!r}; write {instead}")
    if method.consumes not in consumes:
        raise TypeError(
            f"{host} has {' or '.join(consumes)} to give, and {method!r} consumes {method.consumes}; "
            f"write {instead}"
        )


def require_teacher(method: Any, teacher: object, host: str) -> None:
    """Raise unless there is a teacher exactly where `method` needs one, and batches that `host` can give."""
    if method.consumes == "tokens":
        if teacher is not None:
            raise TypeError(f"{method!r} learns from labels and would ignore the teacher; write GKD(KL())")
        return
    if teacher is None:
        raise TypeError(f"{method!r} needs a teacher: write {host}(teacher=model, ...)")
    if getattr(method, "lmbda", 0.0) > 0:
        raise ValueError(
            f"{host} is given its responses, and {method!r} has the student write some: write lmbda=0, or "
            "use fdiv.adapters.trl.DistillationTrainer"
        )


def refuse_options(args: Any, config: type, instead: Mapping[str, str]) -> None:
    """Raise ValueError for the first option that has left its default in `config`, a dataclass.

    `instead`: for each option that the method replaces, what to write; {value} stands for the value given.
    """
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    for name, text in instead.items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(
                f"{config.__name__}({name}={value!r}) would do nothing, for the method decides it; leave it "
                f"at {defaults[name]!r} and {text.format(value=value)}"
            )


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
