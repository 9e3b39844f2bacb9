"""Tables on which a test takes long: some of their members in every run, the others with -m slow."""

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(members: Iterable[Any], every: int = 3) -> list[Any]:
    """One member in `every`, the first among them, is for every run."""
    return [m if n % every == 0 else pytest.param(m, marks=pytest.mark.slow) for n, m in enumerate(members)]


def fewer(mark: pytest.MarkDecorator, every: int = 3) -> pytest.MarkDecorator:
    """The same parametrisation by one name, thinned."""
    name, members = mark.args
    return pytest.mark.parametrize(name, thinned(members, every), **mark.kwargs)
