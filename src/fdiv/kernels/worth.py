"""When seconds of compilation pay, and how many rows are best taken at a time."""

from collections.abc import Iterator

from torch import Tensor

# Fewer numbers than this in a call do not pay for seconds of compilation.
WORTH_COMPILING = 1 << 21


def is_worth_compiling(compiled: bool | None, numbers: int) -> bool:
    """What was asked for; None leaves it to the size of the problem."""
    return numbers >= WORTH_COMPILING if compiled is None else compiled


# Logits at a time: what is made of them on the way stays in cache, and is freed into it.
COMPILED_BLOCK, EAGER_BLOCK = 1 << 19, 1 << 17


def blocks(compiled: bool, logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of logits [rows, vocab], and of the others with them, a block at a time."""
    if logits.is_cuda:
        return iter([(logits, *others)])
    size = COMPILED_BLOCK if compiled else EAGER_BLOCK
    rows = max(1, size // max(1, logits.shape[-1]))
    return zip(*(t.split(rows) for t in (logits, *others)), strict=True)
