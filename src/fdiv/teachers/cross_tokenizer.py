"""One text in the tokens of two models: what a student and a teacher of another vocabulary are compared on.

    paired = pair([Passage("Question ...", "Answer ...")], student_tokenizer, teacher_tokenizer)
    paired.tokens, paired.groups  # of the global batch; then, for a micro-batch and its flat rows
    paired.rows(index).flat()

The teacher never sees the student's ids: it reads the text.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fdiv.methods.distill._alignment import LEFT_OVER, align
from fdiv.tasks._task import Text
from fdiv.teachers._spelling import opening, read, spelling


class Passage(NamedTuple):
    """A prompt and its response. `teacher_prompt`: the prompt in the teacher's template, if it differs."""

    prompt: str
    response: str
    teacher_prompt: str | None = None


class Paired(NamedTuple):
    """Both tokenisations of N responses, right-padded, and the group of each token.

    Groups [N, S], [N, T], counted from 0 in each sequence, are the least stretches of the response that are
    whole tokens on both sides; -1 is the group of what is compared with nothing (prompt, padding, left over).
    """

    student: Text
    teacher: Text
    q_group: Tensor
    p_group: Tensor

    def rows(self, index: Tensor | slice) -> "Paired":
        student, teacher = self.student.rows(index), self.teacher.rows(index)
        return Paired(student, teacher, self.q_group[index], self.p_group[index])

    @property
    def tokens(self) -> int:
        """`count` of a loss: the student's response tokens."""
        return int(self.student.mask.sum())

    @property
    def p_tokens(self) -> int:
        """`p_count`: the teacher's."""
        return int(self.teacher.mask.sum())

    @property
    def groups(self) -> int:
        """`groups` of a loss."""
        return int(self._groups_each().sum())

    def flat(self) -> dict[str, Tensor]:
        """labels, inputs (the token before), sequence and group, counted on over the sequences, of each
        response token, row by row as `Text.mask` selects; by the methods' names.
        """
        each, flat = self._groups_each(), {}
        before = each.cumsum(0) - each
        for side, text, group in (("q", self.student, self.q_group), ("p", self.teacher, self.p_group)):
            sequence, own = text.mask.nonzero()[:, 0], group[text.mask]
            flat[f"{side}_sequence"] = sequence
            flat[f"{side}_group"] = torch.where(own >= 0, own + before[sequence], LEFT_OVER)
            flat[f"{side}_labels"] = text.ids[text.mask]
            flat[f"{side}_inputs"] = text.ids[:, :-1][text.mask[:, 1:]]
        return flat

    def _groups_each(self) -> Tensor:
        """[N]"""
        return self.q_group.amax(1) + 1


def pair(
    texts: Sequence[Passage | tuple[str, str]],
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    end: bool = True,
    longest: int | None = None,
) -> Paired:
    """Each prompt and response as either tokenizer reads them, one behind the other.

    end: an end-of-text token follows on each side, where the tokenizer has one; both are one group.
    longest: tokens of a sequence, at most. A BOS token that the tokenizer adds stands before the prompt.
    A token that begins in the prompt and ends in the response is the response's first; unless the other side
    has one that begins at the same place, its group is compared with nothing.
    """
    sides = []
    for text in texts:
        if isinstance(text, str):
            raise TypeError(f"a text is (prompt, response), got the string {text[:40]!r}")
        prompt, response, teachers = text if isinstance(text, Passage) else Passage(*text)
        student = _of_text(student_tokenizer, prompt, response, end, longest)
        teachers = prompt if teachers is None else teachers
        sides.append((student, _of_text(teacher_tokenizer, teachers, response, end, longest)))
    return _paired(sides, student_tokenizer, teacher_tokenizer)


def pair_written(
    text: Text,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    teacher_prompts: Sequence[str] | None = None,
    longest: int | None = None,
) -> Paired:
    """What the student wrote, in its own tokens (which need not be those its tokenizer would choose).

    The teacher reads `teacher_prompts`, by default the decoded prompts without special tokens, and the
    response up to the first bytes that are not UTF-8. Its end-of-text token follows where the student's does.
    longest: tokens of one of the teacher's sequences, at most.
    """
    sides = []
    for n, (ids, mask) in enumerate(zip(text.ids.tolist(), text.mask.tolist(), strict=True)):
        student, response, ended = _of_ids(student_tokenizer, ids, mask)
        prompt = student_tokenizer.decode(ids[: student.start], skip_special_tokens=True)
        prompt = prompt if teacher_prompts is None else teacher_prompts[n]
        sides.append((student, _of_text(teacher_tokenizer, prompt, response, ended, longest)))
    return _paired(sides, student_tokenizer, teacher_tokenizer)


class _Side(NamedTuple):
    """ids of a sequence, the place of its first response token, and the byte of the response where each ends.

    begins: where the first of them begins, < 0 if in the prompt.
    """

    ids: list[int]
    start: int
    ends: list[int]
    begins: int


def _of_text(tokenizer: Any, prompt: str, response: str, end: bool, longest: int | None) -> _Side:
    ids, ends = read(tokenizer, prompt + response)
    boundary = len(prompt.encode())
    first = sum(place <= boundary for place in ends)
    begins = (ends[first - 1] if first else 0) - boundary
    before = opening(tokenizer, ids)
    ids, ends = before + ids, [place - boundary for place in ends[first:]]
    if end and tokenizer.eos_token_id is not None:
        ids, ends = [*ids, tokenizer.eos_token_id], [*ends, len(response.encode())]
    start = len(before) + first
    if start == 0 and ends:
        raise ValueError(
            f"nothing stands before {response[:20]!r}, and a text's first token is predicted by nothing: "
            "the prompt is empty, or in one token with it, and the tokenizer adds no BOS; give a longer one"
        )
    keep = len(ids) if longest is None else longest
    return _Side(ids[:keep], min(start, keep), ends[: max(0, keep - start)], begins)


def _of_ids(tokenizer: Any, ids: list[int], mask: list[bool]) -> tuple[_Side, str, bool]:
    """(the side, its response as text, whether it is whole)."""
    places = [place for place, response in enumerate(mask) if response]
    start = places[0] if places else len(ids)
    if places != list(range(start, start + len(places))) or places[:1] == [0]:
        raise ValueError(
            "a response is one stretch of tokens behind a prompt; its mask has gaps, or no prompt"
        )
    own = ids[start : start + len(places)]
    ended = own[-1:] == [tokenizer.eos_token_id]
    bytes_of = spelling(tokenizer).bytes_of
    # A head may be wider than its tokenizer; what is drawn from beyond writes nothing.
    written = [bytes_of.get(number, b"") for number in (own[:-1] if ended else own)]
    whole, ends = b"".join(written), list(accumulate(map(len, written)))
    side = _Side(ids[: start + len(places)], start, ends + [len(whole)] * ended, 0)
    try:
        return side, whole.decode(), ended
    except UnicodeDecodeError as error:
        return side, whole[: error.start].decode(), False


def _paired(sides: list[tuple[_Side, _Side]], *tokenizers: Any) -> Paired:
    groups = [_groups(*both) for both in sides]
    texts, padded = [], []
    for n, tokenizer in enumerate(tokenizers):
        rows = [both[n] for both in sides]
        ids = _stacked([row.ids for row in rows], tokenizer.pad_token_id or 0)
        mask = _stacked([[False] * row.start + [True] * len(row.ends) for row in rows], False)
        texts.append(Text(ids, mask))
        group = [[LEFT_OVER] * row.start + both[n] for row, both in zip(rows, groups, strict=True)]
        padded.append(_stacked(group, LEFT_OVER))
    return Paired(*texts, *padded)


def _groups(student: _Side, teacher: _Side) -> tuple[list[int], list[int]]:
    q_group, p_group = align(student.ends, teacher.ends)
    if student.begins != teacher.begins:  # the first group is not of one text
        q_group, p_group = ([max(g - 1, LEFT_OVER) for g in side] for side in (q_group, p_group))
    return q_group, p_group


def _stacked(rows: list[list], padding: int | bool) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.tensor(padding).dtype) for row in rows], True, padding)
