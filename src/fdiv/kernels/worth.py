"""When seconds of compilation pay."""

# Fewer numbers than this in a call do not pay for seconds of compilation.
WORTH_COMPILING = 1 << 22


def is_worth_compiling(compiled: bool | None, numbers: int) -> bool:
    """What was asked for; None leaves it to the size of the problem."""
    return numbers >= WORTH_COMPILING if compiled is None else compiled
