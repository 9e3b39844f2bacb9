"""Which of several answers mean the same: exactly, by the tokens they share, or as a user's model says.

Any callable is a clusterer, one that asks an embedding or an entailment model included.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Written(NamedTuple):
    """What follows a place: its tokens, and its text where there is a tokenizer."""

    ids: tuple[int, ...]
    text: str | None = None


class Clusterer(Protocol):
    """Says which of several continuations mean the same: one number each, equal where they do."""

    def __call__(self, answers: Sequence[Written]) -> Sequence[int]: ...


@dataclass(frozen=True)
class SameAnswer:
    """Those with the same text, up to white space, or where there is none with the same tokens.

    pattern: a regular expression; its last match stands for the text (its first group, if it has one), and
    texts without one are alike. pattern=r"####(.*)" compares final answers.
    """

    pattern: str | None = None

    def __post_init__(self):
        re.compile(self.pattern or "")

    def __call__(self, answers: Sequence[Written]) -> list[int]:
        known: dict[Any, int] = {}
        return [known.setdefault(self._meaning(answer), len(known)) for answer in answers]

    def _meaning(self, answer: Written) -> Any:
        if answer.text is None:
            if self.pattern is not None:
                raise TypeError(f"{self!r} reads texts, and the model has no tokenizer; write SameAnswer()")
            return answer.ids
        if self.pattern is None:
            return " ".join(answer.text.split())
        found = [match.group(match.re.groups and 1) for match in re.finditer(self.pattern, answer.text)]
        return " ".join((found[-1] or "").split()) if found else None


@dataclass(frozen=True)
class Overlap:
    """Those that share runs of `run` tokens: at least `threshold` of all that either has (Jaccard).

    One by one, each joins the first cluster whose first member it is so close to, or else founds one.
    """

    run: int = 1
    threshold: float = 0.5

    def __post_init__(self):
        if self.run < 1:
            raise ValueError(f"run is a number of tokens >= 1, got {self.run!r}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is a fraction in (0, 1], got {self.threshold!r}")

    def __call__(self, answers: Sequence[Written]) -> list[int]:
        founders: list[set[tuple[int, ...]]] = []
        return [self._joined(self._runs(answer.ids), founders) for answer in answers]

    def _runs(self, ids: tuple[int, ...]) -> set[tuple[int, ...]]:
        return {ids[n : n + self.run] for n in range(max(1, len(ids) - self.run + 1))}

    def _joined(self, runs: set[tuple[int, ...]], founders: list[set[tuple[int, ...]]]) -> int:
        for number, other in enumerate(founders):
            if len(runs & other) >= self.threshold * len(runs | other):
                return number
        founders.append(runs)
        return len(founders) - 1
