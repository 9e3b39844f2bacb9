"""Whether an answer says what a solution says."""

import re
from fractions import Fraction

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")


def agrees(response: str, solution: str) -> bool:
    """Whether the final answers are equal; where the solution is a number, the response's last one counts.

    Final is what the last \\boxed{} holds, or what follows the last "####", or all of the text.
    """
    wanted, told = final(solution), final(response)
    if (number := _number(wanted)) is None:
        return _plain(told) == _plain(wanted)
    candidates = [told, *NUMBER.findall(told)[-1:]]
    return next((found for text in candidates if (found := _number(text)) is not None), None) == number


def final(text: str) -> str:
    at = text.rfind("\\boxed{")
    if at >= 0 and (held := _braced(text[at + len("\\boxed") :])) is not None:
        return held
    return text.rsplit("####", 1)[-1]


def _braced(text: str) -> str | None:
    """What stands between the first brace of `text`, with which it begins, and its partner."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:place]
    return None


def _number(text: str) -> Fraction | None:
    """The number that a text is, written with separators, a currency or a unit of percent or not."""
    try:
        return Fraction(re.sub(r"[\s,$%]|\\[$%,!]", "", text).removesuffix("."))
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")
