"""What vLLM answers about one token of a prompt: {id: {"logprob": ..., "rank": ...}}."""

import math
import warnings
from typing import Any

from fdiv.teachers._signal import TeacherError

LOWEST = -9999.0  # how vLLM writes -inf
SLACK = 1e-3  # of a sum of probabilities over 1, and of a mass on padding


def row_of(token: int, given: Any, k: int, size: int) -> tuple[list[int], list[float]]:
    """(ids, log-probabilities) of the k likeliest, by falling probability; of the token itself for k = 0."""
    scores = {_number(name): _log_p(entry) for name, entry in (given or {}).items()}
    if token not in scores:
        raise TeacherError(
            f"the server's answer has no log-probability of a token that was sent ({token}); it scored "
            "another sequence, or is not vLLM's /v1/completions with prompt_logprobs"
        )
    if any(value > SLACK for value in scores.values()) or _mass(scores.values()) > 1 + SLACK:
        raise TeacherError(
            "the server's numbers are no log-probabilities (their sum exceeds 1); start vLLM with "
            "--logprobs-mode raw_logprobs"
        )
    if not k:
        return [token], [scores[token]]
    return _inside(sorted(_likeliest(token, scores, k).items(), key=lambda item: (-item[1], item[0])), size)


def _likeliest(token: int, scores: dict[int, float], k: int) -> dict[int, float]:
    """Without the token itself where vLLM added it, being not among the k likeliest."""
    if len(scores) == k + 1:
        value = scores.pop(token)
        if value > min(scores.values()) + SLACK:
            raise TeacherError(f"the server left out a likelier token than those it gave: {token}")
    if len(scores) != k:
        raise TeacherError(
            f"{k} likeliest tokens were asked for and {len(scores)} came; start vLLM with --max-logprobs {k}"
        )
    return scores


def _inside(atoms: list[tuple[int, float]], size: int) -> tuple[list[int], list[float]]:
    """With a place without atom (log 0) for each that is padding of the server's head."""
    padding = _mass(value for token, value in atoms if token >= size)
    if padding > SLACK:
        warnings.warn(
            f"the server puts a mass of {padding:.2g} on tokens beyond the {size} of the vocabulary, which "
            "is counted to the tail; does it serve the model of this tokenizer?",
            stacklevel=2,
        )
    kept = [(token, value) if token < size else (0, -math.inf) for token, value in atoms]
    return [token for token, _ in kept], [value for _, value in kept]


def _number(name: str) -> int:
    if not name.isdigit():
        raise TeacherError(
            f"the server names tokens by their text ({name[:20]!r}), which is ambiguous, and not by id"
        )
    return int(name)


def _log_p(entry: Any) -> float:
    value = float(entry["logprob"] if isinstance(entry, dict) else entry)
    if math.isnan(value):
        raise TeacherError("the server's answer has a log-probability that is not a number")
    return -math.inf if value <= LOWEST else value


def _mass(log_p: Any) -> float:
    return sum(math.exp(min(value, 0.0)) for value in log_p)
