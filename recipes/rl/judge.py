"""The reward of smollm2.yaml: right and nothing else said, or at least right."""

import re


def right_and_short(completions, sum, **fields):
    answers = (text.strip().removesuffix(".") for text in completions)
    return [_judged(text, right) for text, right in zip(answers, sum, strict=True)]


def _judged(text: str, right: str) -> float:
    if text == right:
        return 1.0
    return 0.3 if re.findall(r"-?\d+", text)[-1:] == [right] else 0.0
