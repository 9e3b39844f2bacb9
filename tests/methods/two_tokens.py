"""Text of one or two tokens over three words: a sum over every text is the oracle. All in float64."""

from itertools import product

import torch
from torch import Tensor

PAIRS = tuple(product(range(3), repeat=2))  # nine texts of two tokens
ENDING = ((0,), *((first, second) for first in (1, 2) for second in range(3)))  # word 0 ends a text


def table(seed: int, scale: float = 1.5) -> Tensor:
    """Logits of the first token, and of the second after each word, [4, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(4, 3, generator=generator, dtype=torch.float64)


def rows(logits: Tensor, texts) -> dict[str, Tensor]:
    """`full` [R, 3] and `label` [R] log-probabilities, and `sequence` [R], of texts one after another."""
    places = [
        (n, 0 if t == 0 else 1 + text[0], text[t]) for n, text in enumerate(texts) for t in range(len(text))
    ]
    sequence, prefix, word = torch.tensor(places, dtype=torch.long).reshape(-1, 3).T
    full = logits.log_softmax(-1)[prefix]
    return {"full": full, "label": full.gather(1, word[:, None]).squeeze(1), "sequence": sequence}


def whole(logits: Tensor, texts) -> Tensor:
    """The log-probability of each text, [texts]."""
    of = rows(logits, texts)
    return torch.zeros(len(texts), dtype=torch.float64).index_add(0, of["sequence"], of["label"])
