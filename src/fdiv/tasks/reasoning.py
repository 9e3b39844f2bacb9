"""Tasks that reasoning-gym makes: puzzles with a checker, in any number.

Instructions("reasoning_gym:chain_sum?size=500&max_terms=2", prompt="question", response="answer",
             solution="answer", rewards="fdiv.tasks.reasoning:score")
"""

from typing import Any
from urllib.parse import parse_qsl

import yaml

try:
    import reasoning_gym
except ImportError as error:
    raise ImportError('this needs reasoning-gym: pip install "fdiv[reasoning]"') from error

SCHEME = "reasoning_gym:"


def puzzles(source: str) -> list[dict[str, Any]]:
    """The records of "reasoning_gym:NAME?option=value&...": question, answer, metadata.

    Options are those of the data set's configuration, size (default 500) and seed (default 0) among them.
    """
    name, _, query = source.removeprefix(SCHEME).partition("?")
    options = {"size": 500, "seed": 0} | {key: yaml.safe_load(text) for key, text in parse_qsl(query)}
    try:
        return list(reasoning_gym.create_dataset(name, **options))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym cannot make {source!r}: {error}") from error


def score(completions: list[str], **fields: list[Any]) -> list[float]:
    """A reward: what the puzzle's own checker says of each answer, 0 to 1."""
    entries = (dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True))
    return [_checked(text.strip(), entry) for text, entry in zip(completions, entries, strict=True)]


def _checked(answer: str, entry: dict[str, Any]) -> float:
    checker: Any = reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])
    return float(checker(answer=answer, entry=entry))
