"""A prompt and its response in the tokens of two models, and the groups that they are compared by."""

import pytest
import torch
from tests.teachers.tiny_tokenizers import (
    byte_level,
    characters,
    each_pair,
    each_tokenizer,
    sentencepiece,
    unigram,
)

from fdiv.tasks._task import Text
from fdiv.teachers._spelling import read, spelling
from fdiv.teachers.cross_tokenizer import Passage, pair, pair_written

PASSAGES = [("the ", "cat"), ("hello", " there, the cat"), ("é: ", "漢字 and 😀!"), ("x\n", "new\nlines")]
KNOWN = [("the ", "cat sat on the"), ("hello", " there, the cat"), ("é:", " é 漢漢")]  # by every tokenizer


# -- prompts and responses -------------------------------------------------------------------------------


@each_pair
def test_rows_under_the_mask_are_the_response_and_its_end(student, teacher):
    paired = pair(PASSAGES, student, teacher)
    for tokenizer, text in ((student, paired.student), (teacher, paired.teacher)):
        for (prompt, response), ids, mask in zip(PASSAGES, *text, strict=True):
            own = ids[mask].tolist()
            assert own[-1] == tokenizer.eos_token_id and not mask[0]
            whole = read(tokenizer, prompt + response)[0]
            assert own[:-1] == whole[len(whole) - len(own) + 1 :]
            before = ids[: int(mask.nonzero()[0])].tolist()
            added = [tokenizer.bos_token_id] if tokenizer.bos_token else []
            assert before == added + whole[: len(whole) - len(own) + 1]


@each_pair
def test_a_group_writes_the_same_text_on_both_sides(student, teacher):
    paired, compared = pair(KNOWN, student, teacher, end=False), 0
    for n, (_, response) in enumerate(KNOWN):
        ours = stretches(student, paired.student.ids[n], paired.q_group[n])
        theirs = stretches(teacher, paired.teacher.ids[n], paired.p_group[n])
        assert ours == theirs
        assert response.encode().endswith(b"".join(ours).removeprefix(b" "))
        compared += len(ours)
    assert compared >= 5


def stretches(tokenizer, ids, group):
    """What each group of a sequence writes."""
    texts, bytes_of = {}, spelling(tokenizer).bytes_of
    for token, g in zip(ids.tolist(), group.tolist(), strict=True):
        if g >= 0:
            texts[g] = texts.get(g, b"") + bytes_of[token]
    return list(texts.values())


@each_tokenizer
def test_one_tokenizer_and_itself_have_one_token_a_group(tokenizer):
    paired = pair(PASSAGES, tokenizer, tokenizer)
    assert torch.equal(paired.student.ids, paired.teacher.ids)
    flat = paired.flat()
    assert torch.equal(flat["q_group"], torch.arange(paired.tokens))
    assert torch.equal(flat["p_group"], flat["q_group"]) and paired.groups == paired.tokens == paired.p_tokens


def test_a_token_that_straddles_prompt_and_response_is_compared_only_with_its_like():
    many, few = byte_level(90), byte_level(0)
    assert many.convert_ids_to_tokens(read(many, "the cat")[0]) == ["the", "Ġcat"]
    paired = pair([("the ", "cat")], many, few, end=False)
    assert paired.student.mask.sum() == 1 and paired.q_group[paired.student.mask].tolist() == [-1]
    assert paired.teacher.mask.sum() == 3 and paired.p_group[paired.teacher.mask].tolist() == [-1, -1, -1]
    assert paired.groups == 0
    paired = pair([("the ", "cat sat")], many, few, end=False)
    assert paired.q_group[paired.student.mask].tolist() == [-1, 0]
    assert paired.p_group[paired.teacher.mask].tolist() == [-1, -1, -1, 0, 0, 0, 0]
    assert pair([("the ", "cat")], many, many, end=False).groups == 1


def test_each_side_reads_its_own_prompt_and_the_same_response():
    passage = Passage("the cat", " sat", teacher_prompt="hello there:")
    paired = pair([passage], byte_level(90), byte_level(0))
    assert byte_level(90).decode(paired.student.ids[0][~paired.student.mask[0]]) == "the cat"
    assert byte_level(0).decode(paired.teacher.ids[0][~paired.teacher.mask[0]]) == "hello there:"
    assert paired.groups == 2 and paired.q_group[0].tolist()[-2:] == [0, 1]


def test_a_text_that_brings_its_own_bos_gets_no_second():
    bare, own = (pair([(p, " cat")], sentencepiece(), sentencepiece()) for p in ("the", "<s>the"))
    assert bare.student.ids[0, 0] == 1 and bare.student.ids[0, 1] != 1
    assert own.student.ids[0].tolist().count(1) == 1


def test_what_is_cut_off_is_compared_with_nothing():
    paired = pair([("the", " cat sat on")], byte_level(90), byte_level(0), longest=8)
    assert paired.teacher.ids.shape == (1, 8) and paired.p_tokens == 5
    assert paired.q_group[paired.student.mask].tolist() == [0] + [-1] * (paired.tokens - 1)
    assert paired.p_group[paired.teacher.mask].tolist() == [0, 0, 0, 0, -1]
    nothing = pair([("the cat sat", " on")], byte_level(0), byte_level(0), longest=4)
    assert nothing.tokens == nothing.groups == 0 and nothing.student.ids.shape == (1, 4)


def test_flat_rows_are_numbered_over_the_micro_batch_and_never_cross_sequences():
    paired = pair(PASSAGES, byte_level(12), unigram())
    flat = paired.flat()
    for side, text in (("q", paired.student), ("p", paired.teacher)):
        assert torch.equal(flat[f"{side}_labels"], text.ids[text.mask])
        places = text.mask.nonzero()
        assert torch.equal(flat[f"{side}_inputs"], text.ids[places[:, 0], places[:, 1] - 1])
        assert torch.equal(flat[f"{side}_sequence"], places[:, 0])
        inside = flat[f"{side}_group"][flat[f"{side}_group"] >= 0]
        assert torch.equal(inside.unique(), torch.arange(paired.groups)) and (inside.diff() >= 0).all()
    owners = [
        set(zip(*(flat[f"{x}_{n}"].tolist() for n in ("group", "sequence")), strict=True)) for x in "qp"
    ]
    owners = [{owner for owner in own if owner[0] >= 0} for own in owners]
    assert owners[0] == owners[1] and len(owners[0]) == paired.groups


def test_micro_batches_hold_the_same_groups():
    paired = pair(PASSAGES, byte_level(12), byte_level(90))
    parts = [paired.rows(index) for index in torch.arange(4).split(1)]
    assert sum(part.groups for part in parts) == paired.groups
    assert sum(part.tokens for part in parts) == paired.tokens
    assert torch.equal(torch.cat([part.flat()["q_labels"] for part in parts]), paired.flat()["q_labels"])


# -- what the student wrote ------------------------------------------------------------------------------


def written(tokenizer, prompt, response, *more):
    ids = [*prompt, *response, *more]
    mask = [False] * len(prompt) + [True] * len(response) + [False] * len(more)
    return Text(torch.tensor([ids]), torch.tensor([mask]))


@each_pair
def test_what_the_student_wrote_is_paired_as_the_same_text_is(student, teacher):
    prompt, response = "hello", " there"
    ids = read(student, prompt + response)[0]
    start = next(n for n in range(len(ids)) if read(student, prompt)[0] == ids[:n])
    text = written(student, ids[:start], [*ids[start:], student.eos_token_id], student.pad_token_id)
    own = pair_written(text, student, teacher, teacher_prompts=[prompt])
    plain = pair([(prompt, response)], student, teacher)
    assert own.flat()["q_group"].tolist() == plain.flat()["q_group"].tolist()
    assert torch.equal(own.teacher.ids, plain.teacher.ids) and torch.equal(own.p_group, plain.p_group)


def test_tokens_that_the_tokenizer_would_not_choose_are_kept():
    tokenizer = byte_level(90)
    letters = tokenizer.convert_tokens_to_ids(["t", "h", "e"])
    paired = pair_written(written(tokenizer, [tokenizer.eos_token_id], letters), tokenizer, tokenizer, ["a "])
    assert paired.flat()["q_labels"].tolist() == letters
    assert paired.teacher.ids[paired.teacher.mask].tolist() == read(tokenizer, " the")[0][-1:]


def test_a_response_is_compared_up_to_its_first_bytes_that_are_no_text():
    tokenizer = byte_level(0)
    ids = tokenizer.convert_tokens_to_ids(["h", "i", "æ", "¼", "x", "<|end|>"])
    paired = pair_written(written(tokenizer, read(tokenizer, "the ")[0], ids), tokenizer, characters())
    assert paired.q_group[paired.student.mask].tolist() == [0, 1, -1, -1, -1, -1]
    assert characters().decode(paired.teacher.ids[0][paired.teacher.mask[0]]) == "hi"


def test_an_end_of_text_is_a_group_only_where_the_student_wrote_it():
    tokenizer = byte_level(0)
    ids, prompt = read(tokenizer, "hi")[0], read(tokenizer, "the ")[0]
    ended = pair_written(written(tokenizer, prompt, [*ids, 0]), tokenizer, characters())
    assert ended.groups == 3 and ended.teacher.ids[0, -1] == characters().eos_token_id
    assert pair_written(written(tokenizer, prompt, ids), tokenizer, characters()).groups == 2
    alone = pair_written(written(tokenizer, prompt, [0]), tokenizer, characters())
    assert alone.groups == 1 and alone.p_tokens == 1


# -- mistakes --------------------------------------------------------------------------------------------


def test_texts_that_cannot_be_paired_are_refused():
    with pytest.raises(
        ValueError, match="the prompt is empty, or in one token with it, and the tokenizer adds no BOS"
    ):
        pair([("", "cat")], byte_level(0), byte_level(0))
    assert pair([("", "cat")], sentencepiece(), unigram()).groups > 0
    with pytest.raises(TypeError, match=r"\(prompt, response\), got the string 'cat'"):
        pair(["cat"], byte_level(0), byte_level(0))
    holes = Text(torch.zeros(1, 4).long(), torch.tensor([[False, True, False, True]]))
    with pytest.raises(ValueError, match="mask has gaps, or no prompt"):
        pair_written(holes, byte_level(0), byte_level(0))
