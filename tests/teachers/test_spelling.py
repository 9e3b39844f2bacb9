"""What tokens write and where they end, in bytes; which tokens two vocabularies have in common."""

from itertools import pairwise

import pytest
import torch
from tests.teachers.tiny_tokenizers import (
    TEXTS,
    TOKENIZERS,
    byte_level,
    characters,
    each_pair,
    each_tokenizer,
    sentencepiece,
    unigram,
)

from fdiv.methods.distill._alignment import align
from fdiv.teachers._spelling import read, spelling
from fdiv.teachers.shared import shared_tokens


def pieces(text: bytes, ends) -> list[bytes]:
    return [text[start:end] for start, end in pairwise([0, *ends])]


# -- where tokens end ------------------------------------------------------------------------------------


@each_tokenizer
def test_the_stretches_between_ends_are_what_the_tokens_write(tokenizer):
    """Up to a space that the tokenizer puts before a text, and to characters that it does not know."""
    bytes_of, compared = spelling(tokenizer).bytes_of, 0
    for text in TEXTS:
        ids, ends = read(tokenizer, text)
        assert ends == sorted(ends) and ends[-1] == len(text.encode())
        if tokenizer.unk_token_id in ids:
            continue
        for number, stretch in zip(ids, pieces(text.encode(), ends), strict=True):
            assert stretch in (bytes_of[number], bytes_of[number].removeprefix(b" "))
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("tokenizer", [unigram(), characters()])
def test_an_unknown_character_ends_where_it_ends(tokenizer):
    ids, ends = read(tokenizer, "a żółw!")
    assert tokenizer.unk_token_id in ids
    assert ends[-1] == len("a żółw!".encode()) and set(ends) <= {0, 1, 2, 4, 6, 8, 9, 10}


def test_a_tokenizer_that_normalises_ends_tokens_where_they_end_in_the_text_it_was_given():
    """ "É" of two characters (three bytes) is read as "é" (two bytes), and "T" as "t"."""
    text = "DE\u0301JA the CAT"
    ids, ends = read(TOKENIZERS["composed"], text)
    assert b"".join(spelling(TOKENIZERS["composed"]).bytes_of[n] for n in ids) == "déja the cat".encode()
    boundaries = {len(text[:n].encode()) for n in range(len(text) + 1)}
    assert ends == sorted(ends) and ends[-1] == len(text.encode()) and set(ends) <= boundaries


def test_a_character_that_is_split_between_tokens_ends_with_the_last_of_them():
    ids, ends = read(byte_level(0), "a😀")
    assert ends == [1, 2, 3, 4, 5]
    upper = "A😀"  # its "A" is lower-cased, so that ends are told by characters
    ids, ends = read(TOKENIZERS["composed"], upper)
    assert len(ids) > 2 and ends == [1] * (len(ids) - 1) + [5]


@each_pair
def test_groups_end_at_the_common_ends_of_both_and_hold_every_byte(student, teacher):
    for text in TEXTS:
        ends = [read(tokenizer, text)[1] for tokenizer in (student, teacher)]
        for of, group in zip(ends, align(*ends), strict=True):
            last = {g: e for e, g in zip(of, group, strict=True) if g >= 0}
            assert set(last.values()) == set(ends[0]) & set(ends[1])
            assert max(last.values()) == len(text.encode())


# -- shared tokens ---------------------------------------------------------------------------------------


@each_pair
def test_shared_tokens_write_the_same_bytes_and_are_pairs(student, teacher):
    shared = shared_tokens(student, teacher)
    assert len(shared.student.unique()) == len(shared.teacher.unique()) == len(shared.student) > 0
    ours, theirs = spelling(student).bytes_of, spelling(teacher).bytes_of
    pairs = dict(zip(shared.student.tolist(), shared.teacher.tolist(), strict=True))
    assert pairs.pop(student.eos_token_id) == teacher.eos_token_id
    assert all(ours[a] == theirs[b] for a, b in pairs.items())


@each_tokenizer
def test_a_vocabulary_shares_all_its_tokens_with_itself_but_second_spellings(tokenizer):
    shared = shared_tokens(tokenizer, tokenizer)
    assert torch.equal(shared.student, shared.teacher)
    spelt = spelling(tokenizer)
    assert len(shared.student) == len({(n in spelt.special, b) for n, b in spelt.bytes_of.items()})


def test_the_space_is_the_same_whether_it_is_written_with_a_dot_or_a_bar():
    shared = shared_tokens(byte_level(90), sentencepiece())
    pairs = set(zip(shared.student.tolist(), shared.teacher.tolist(), strict=True))

    def ids(a, b):
        return byte_level(90).convert_tokens_to_ids(a), sentencepiece().convert_tokens_to_ids(b)

    assert {ids("Ġcat", "▁cat"), ids("Ġ", "▁"), ids("Ã©", "é"), ids("Ã", "<0xC3>")} <= pairs
    assert ids("a", "a") in pairs and ids("a", "<0x61>") not in pairs


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(
        TypeError, match="object cannot say where its tokens begin and end; load a fast tokenizer"
    ):
        spelling(object())
