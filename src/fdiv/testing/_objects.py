"""Laws of the object: shapes, transforms, identity, notation, refusals."""

import copy
import dataclasses
import pickle

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.notation import parse
from fdiv.testing._problems import check_close, distributions, measures, require


def batch_and_dimension_do_not_matter(divergence: FDivergence) -> None:
    """Rows are independent, `dim` is any dimension, and shapes broadcast."""
    log_p, log_q = measures()
    value = divergence(log_p, log_q)
    at = {"log_p": log_p, "log_q": log_q}
    rows = torch.stack([divergence(a, b) for a, b in zip(log_p, log_q, strict=True)])
    check_close(rows, value, "one row at a time gives the batch", 1e-12, **at)
    check_close(divergence(log_p.T, log_q.T, dim=0), value, "dim=0 gives the transpose", 1e-12, **at)
    blocks = divergence(log_p.view(2, 3, -1), log_q.view(2, 3, -1))
    check_close(blocks.flatten(), value, "[2, 3, V] gives [2, 3]", 1e-12, **at)
    middle = divergence(log_p.view(2, 3, -1).mT, log_q.view(2, 3, -1).mT, dim=1)
    check_close(middle.flatten(), value, "dim=1 of [2, V, 3] gives [2, 3]", 1e-12, **at)
    shared = divergence(log_p, log_q[0])
    expected = divergence(log_p, log_q[:1].expand_as(log_q))
    check_close(shared, expected, "one q [V] for every row of p", 1e-12, log_p=log_p)


def compiles_and_transforms(divergence: FDivergence) -> None:
    """torch.compile traces it in one graph; torch.func.vmap and grad pass through it."""
    log_p, log_q = distributions(rows=3, support=4)
    value, slope = (
        divergence(log_p, log_q),
        torch.func.grad(lambda x: divergence(log_p, x).sum())(log_q),
    )
    torch.compiler.reset()
    traced = torch.compile(lambda a, b: divergence(a, b), backend="eager", fullgraph=True)
    at = {"log_p": log_p, "log_q": log_q}
    try:
        compiled = traced(log_p, log_q)
    except Exception as error:
        says = f"torch.compile traces {divergence!r} in one graph: {error}"
        raise AssertionError(says) from error
    check_close(compiled, value, "torch.compile keeps the value", 1e-12, **at)
    mapped = torch.func.vmap(torch.func.grad(divergence, argnums=1))(log_p, log_q)
    says = "vmap of grad is the gradient of every row"
    check_close(mapped, slope, says, 1e-12, 1e-15, **at)


def is_a_value(divergence: FDivergence) -> None:
    """Frozen, hashable, equal to its copy and to its pickle: the object is the config."""
    require(dataclasses.is_dataclass(divergence), f"{divergence!r} is a dataclass")
    require(vars(type(divergence))["__dataclass_params__"].frozen, f"{divergence!r} is a frozen dataclass")
    twins = [copy.copy(divergence), copy.deepcopy(divergence)]
    if has_notation(divergence):
        twins.append(pickle.loads(pickle.dumps(divergence)))
    for twin in twins:
        require(twin == divergence, f"a copy of {divergence!r} is equal to it, got {twin!r}")
        require(hash(twin) == hash(divergence), f"a copy of {divergence!r} has its hash")
    require(divergence != object(), f"{divergence!r} is not equal to everything")


def is_its_own_notation(divergence: FDivergence) -> None:
    """parse(repr(D)) == D: what is printed can stand in a recipe."""
    if not has_notation(divergence):
        return
    read = parse(repr(divergence), plugins=_modules(divergence))
    require(read == divergence, f"parse({repr(divergence)!r}) gives the divergence back, got {read!r}")
    require(repr(read) == repr(divergence), f"repr is stable, expected {divergence!r}, got {read!r}")


def refuses_what_it_cannot_compare(divergence: FDivergence) -> None:
    """Integers are a TypeError that says `.float()`; two supports are a ValueError that says so."""
    log_p, log_q = distributions()
    counts = torch.ones_like(log_p, dtype=torch.int64)
    _check_refusal(divergence, (counts, log_q), TypeError, ".float()")
    _check_refusal(divergence, (log_p, counts), TypeError, ".float()")
    _check_refusal(divergence, (log_p, log_q[:, :-1]), ValueError, "support")
    _check_refusal(divergence, (log_p, log_q[:, :1]), ValueError, "support")  # would broadcast


def _check_refusal(
    divergence: FDivergence, pair: tuple[Tensor, Tensor], error: type[Exception], word: str
) -> None:
    shapes = " and ".join(f"{x.dtype} {tuple(x.shape)}" for x in pair)
    try:
        divergence(*pair)
    except error as refusal:
        require(word in str(refusal), f"the refusal of {shapes} says {word!r}, got {str(refusal)!r}")
        return
    raise AssertionError(f"{divergence!r} refuses {shapes} with a {error.__name__}, got a value")


def has_notation(divergence: FDivergence) -> bool:
    """Whether everything in the repr can be imported: no lambda, no closure, no local class."""
    return "<lambda>" not in repr(divergence) and "<locals>" not in repr(divergence)


def _modules(value: object) -> set[str]:
    """The modules of every class in a divergence: the plugins that its notation needs."""
    if isinstance(value, tuple | list):
        return set().union(*map(_modules, value))
    if not dataclasses.is_dataclass(value):
        return set()
    return {type(value).__module__}.union(*(_modules(x) for x in vars(value).values()))
