"""Writes sums.jsonl: questions with a short right answer, and one that is wrong or says too much."""

import json
import random
from itertools import product
from pathlib import Path

WAYS = ("What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b} = ?")
WORDY = (
    "To find the sum of {a} and {b}, we add the two numbers together, which gives {sum}.",
    "Sure! Adding {b} to {a} is a simple calculation. The answer is {sum}.",
)


def record(a: int, b: int, draw: random.Random) -> dict:
    facts = {"a": a, "b": b, "sum": a + b}
    wrong = str(a + b + draw.choice((-2, -1, 1, 2, 10)))
    return {
        "prompt": draw.choice(WAYS).format(**facts),
        "chosen": str(a + b),
        "rejected": draw.choice((wrong, draw.choice(WORDY).format(**facts))),
        "sum": str(a + b),
    }


def main() -> None:
    draw = random.Random(0)
    pairs = draw.sample(list(product(range(2, 30), repeat=2)), 400)
    lines = (json.dumps(record(a, b, draw)) for a, b in pairs)
    Path(__file__).with_name("sums.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
