"""Which tokens two vocabularies have in common."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv.teachers._spelling import spelling


class Shared(NamedTuple):
    """The ids of the tokens that both vocabularies write alike, pair by pair [K], in the teacher's order."""

    student: Tensor
    teacher: Tensor


@lru_cache(maxsize=8)
def shared_tokens(student_tokenizer: Any, teacher_tokenizer: Any) -> Shared:
    """Alike are tokens that write the same bytes, special ones of one name, and both ends of text."""
    ours, theirs = _by_meaning(student_tokenizer), _by_meaning(teacher_tokenizer)
    pairs = sorted((theirs[meaning], ours[meaning]) for meaning in ours.keys() & theirs.keys())
    teacher, student = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return Shared(student, teacher)


def _by_meaning(tokenizer: Any) -> dict[tuple[str, bytes], int]:
    """The id of each thing that a token can say; of several that say it, the first that is no byte token."""
    spelt, by_meaning = spelling(tokenizer), {}
    for number in sorted(spelt.bytes_of, key=lambda n: (n in spelt.bytewise, n)):
        kind = "special" if number in spelt.special else "text"
        by_meaning.setdefault((kind, spelt.bytes_of[number]), number)
    if tokenizer.eos_token_id is not None:
        by_meaning = {k: n for k, n in by_meaning.items() if n != tokenizer.eos_token_id}
        by_meaning["end", b""] = tokenizer.eos_token_id
    return by_meaning
