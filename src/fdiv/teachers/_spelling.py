"""What each token of a vocabulary writes, in bytes, and where the tokens of a text end.

Bytes are what two tokenizers have in common. "Ġthe" of a byte-level BPE and "▁the" of a sentencepiece model
both write b" the", "æ¼¢" and "漢" both write b"\\xe6\\xbc\\xa2", and so does "<0xE6><0xBC><0xA2>" in three
tokens. Pieces of other kinds (WordPiece, words) are taken as they stand.
"""

import re
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"  # sentencepiece's


class Spelling(NamedTuple):
    """bytes_of: what a token writes. special: those that are no text. bytewise: byte tokens, "<0x41>"."""

    bytes_of: dict[int, bytes]
    special: frozenset[int]
    bytewise: frozenset[int]


@lru_cache(maxsize=8)
def spelling(tokenizer: Any) -> Spelling:
    """Of every token of a fast tokenizer of the transformers library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"{type(tokenizer).__name__} cannot say where its tokens begin and end; load a fast tokenizer, "
            "as AutoTokenizer.from_pretrained(...) gives by default"
        )
    layers = repr(backend.normalizer) + repr(backend.pre_tokenizer) + repr(backend.decoder)
    byte_level, spaced = "ByteLevel(" in layers, SPACE in layers
    falls_back = "ByteFallback(" in layers or getattr(backend.model, "byte_fallback", False)
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    bytes_of, bytewise = {}, set()
    for piece, number in tokenizer.get_vocab().items():
        single = BYTE_PIECE.fullmatch(piece) if falls_back else None
        if number in added:
            bytes_of[number] = added[number].encode()
        elif byte_level and all(c in BYTE_OF for c in piece):
            bytes_of[number] = bytes(BYTE_OF[c] for c in piece)
        elif single:
            bytes_of[number] = bytes.fromhex(single[1])
            bytewise.add(number)
        else:
            bytes_of[number] = (piece.replace(SPACE, " ") if spaced else piece).encode()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Spelling(bytes_of, frozenset(special), frozenset(bytewise))


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    characters = [*map(chr, printable), *(chr(0x100 + n) for n in range(len(others)))]
    return dict(zip(characters, [*printable, *others], strict=True))


BYTE_OF = _byte_level_alphabet()


def read(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """(ids, ends): the text in tokens, none added, and the byte of it at which each one ends."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    ends = _ends_by_spelling(ids, text.encode(), spelling(tokenizer))
    # A tokenizer that normalises text, drops its spaces or does not know a character spells another text.
    return ids, _ends_by_offsets(encoded["offset_mapping"], text) if ends is None else ends


def _ends_by_spelling(ids: list[int], text: bytes, spelt: Spelling) -> list[int] | None:
    """By what the tokens write, or None if that is not the text."""
    ends, place = [], 0
    for number in ids:
        written = spelt.bytes_of[number]
        if not text.startswith(written, place):
            written = written.removeprefix(b" ")  # sentencepiece begins a text with a space of its own
            if not text.startswith(written, place):
                return None
        place += len(written)
        ends.append(place)
    return ends if place == len(text) else None


def _ends_by_offsets(offsets: list[tuple[int, int]], text: str) -> list[int]:
    """By the characters that the tokenizer says a token covers."""
    byte = [0, *accumulate(len(character.encode()) for character in text)]
    starts = [*(start for start, _ in offsets[1:]), len(text)]
    # Tokens that share a character all cover it; only the last of them ends it.
    ends = [byte[min(end, start)] for (_, end), start in zip(offsets, starts, strict=True)]
    return list(accumulate(ends, max))


def opening(tokenizer: Any, ids: list[int]) -> list[int]:
    """The special tokens that the tokenizer puts before a text, unless its `ids` begin with them."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    before = next(whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
    return [] if ids[: len(before)] == before else before
