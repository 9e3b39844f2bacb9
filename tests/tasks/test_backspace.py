"""Backspaces: noise and its undoing, and a model that reads what is left."""

import pytest
import torch

pytest.importorskip("transformers")

from fdiv.adapters.transformers import CausalLM
from fdiv.tasks._task import Text
from fdiv.tasks.backspace import collapsed, left, noised, replayed, unasked
from fdiv.tasks.padding import answered

BACK = 9
SYMBOLS = torch.arange(1, 9)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def text(*pairs):
    """A prompt and an answer each, as lists of ids."""
    return answered(
        [torch.tensor(prompt) for prompt, _ in pairs], [torch.tensor(answer) for _, answer in pairs], 0
    )


def answers(of):
    return [ids[mask].tolist() for ids, mask in zip(*of, strict=True)]


def random_text(rows=60, seed=1):
    draw = generator(seed)
    sizes = torch.randint(1, 6, (rows, 2), generator=draw).tolist()
    return text(
        *([torch.randint(1, 9, (n,), generator=draw).tolist() for n in pair] for pair in sizes)
    )  # fmt: skip


# -- noise and its undoing --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_noise_collapses_to_the_text_it_was_put_into(noise):
    clean = random_text()
    again = collapsed(noised(clean, noise, SYMBOLS, BACK, generator()), BACK)
    assert torch.equal(again.ids, clean.ids) and torch.equal(again.mask, clean.mask)


def test_noise_of_nought_is_the_text_itself():
    clean = random_text()
    same = noised(clean, 0.0, SYMBOLS, BACK, generator())
    assert torch.equal(same.ids, clean.ids) and torch.equal(same.mask, clean.mask)


def test_noise_is_a_wrong_token_and_its_backspace_before_every_struck_token():
    clean = random_text()
    for before, after in zip(
        answers(clean), answers(noised(clean, 1.0, SYMBOLS, BACK, generator())), strict=True
    ):
        assert after[1::3] == [BACK] * len(before) and after[2::3] == before
        assert all(
            wrong != right and wrong in SYMBOLS for wrong, right in zip(after[::3], before, strict=True)
        )


def test_the_last_tokens_can_be_spared():
    clean = text(([1], [2, 3, 4]), ([1, 2], [5]))
    assert [len(a) for a in answers(noised(clean, 1.0, SYMBOLS, BACK, generator(), spare=1))] == [7, 1]


def test_wrong_tokens_are_drawn_evenly_from_the_others_and_strikes_as_often_as_said():
    clean = text(*[([1], [3, 3, 3, 3])] * 1500)
    made = answers(noised(clean, 0.25, SYMBOLS, BACK, generator()))
    wrong = torch.tensor([row[n - 1] for row in made for n, token in enumerate(row) if token == BACK])
    assert abs(len(wrong) / 6000 - 0.25) < 4 * (0.25 * 0.75 / 6000) ** 0.5
    shares = wrong.bincount(minlength=10) / len(wrong)
    assert shares[3] == 0 and (shares[[1, 2, 4, 5, 6, 7, 8]] - 1 / 7).abs().max() < 0.05


@pytest.mark.parametrize(
    ("written", "remains"),
    [
        ([1, BACK], []),
        ([BACK, BACK, 1], [1]),  # the prompt is never taken back
        ([1, 2, BACK, BACK, 3], [3]),
        ([1, 2, BACK, 3, BACK, 4], [1, 4]),
        ([BACK], []),
    ],
)
def test_backspaces_take_back_what_is_left(written, remains):
    assert answers(collapsed(text(([7, 8], written)), BACK)) == [remains]
    assert [written[n] for n in left(written, BACK)[-1]] == remains


def test_a_backspace_in_the_prompt_is_a_token_like_any_other():
    assert answers(collapsed(text(([7, BACK], [1, 2, BACK])), BACK)) == [[1]]


def test_unasked_leaves_out_what_is_taken_back_and_nothing_else():
    clean = random_text()
    made = noised(clean, 0.5, SYMBOLS, BACK, generator())
    for row, mask, asked in zip(made.ids, made.mask, unasked(made, BACK).mask, strict=True):
        told = row[asked].tolist()
        taken = row[mask & ~asked].tolist()
        assert [t for t in told if t != BACK] == answers(collapsed(Text(row[None], mask[None]), BACK))[0]
        assert len(taken) == told.count(BACK) and BACK not in taken
    twice = text(([7], [1, 2, BACK, BACK, BACK, 3]))
    assert unasked(twice, BACK).mask.tolist() == [[False, False, False, True, True, True, True]]


# -- what a model reads ------------------------------------------------------------------------------------


def test_masks_and_positions_of_a_text_by_hand():
    """Prompt 7 8; 1, 2, back to 1, 3, and back twice, of which the second leaves the prompt alone."""
    found = replayed(text(([7, 8], [1, 2, BACK, 3, BACK, BACK, 4])), BACK)
    assert found.ids.tolist() == [[7, 8, 1, 2, 1, 3, 1, 8, 4]]
    assert found.positions.tolist() == [[0, 1, 2, 3, 2, 3, 2, 1, 2]]
    seen = [row.nonzero().flatten().tolist() for row in found.visible[0]]
    expected = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 6], [0, 7], [0, 7, 8]]
    assert seen == expected


def test_without_backspaces_attention_is_causal_and_nothing_moves():
    clean = text(([7, 8], [1, 2, 3]))
    found = replayed(clean, BACK)
    assert torch.equal(found.ids, clean.ids) and found.positions.tolist() == [list(range(5))]
    assert torch.equal(found.visible[0], torch.ones(5, 5).tril().bool())


def test_behind_each_token_a_model_is_where_what_is_left_alone_would_put_it():
    """Its logits there are those of a plain causal reading of the prefix, for every prefix of every text."""
    model = CausalLM.fresh(10, hidden_size=16, layers=2, heads=2, seed=0).model.eval()
    draw = generator(3)
    written = [torch.randint(1, 10, (int(n),), generator=draw).tolist() for n in torch.randint(1, 9, (12,))]
    given = text(*(([7, 8], answer) for answer in written))
    found = replayed(given, BACK)
    closed = torch.zeros(found.visible.shape).masked_fill(~found.visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        replay = model(
            input_ids=found.ids, position_ids=found.positions, attention_mask=closed[:, None], use_cache=False
        ).logits
        for n, answer in enumerate(written):
            for length, places in enumerate(left(answer, BACK)):
                prefix = torch.tensor([[7, 8, *(answer[p] for p in places)]])
                plain = model(input_ids=prefix, use_cache=False).logits[0, -1]
                torch.testing.assert_close(replay[n, 1 + length], plain, atol=1e-5, rtol=1e-4)


# -- what is refused ----------------------------------------------------------------------------------------


def test_wrong_noise_is_refused():
    clean = text(([1], [2]))
    for noise in (-0.1, 1.5):
        with pytest.raises(ValueError, match="noise is a chance"):
            noised(clean, noise, SYMBOLS, BACK, generator())
    for symbols in ([1, 1], [1, 2, BACK]):
        with pytest.raises(ValueError, match="two tokens or more, and no backspace"):
            noised(clean, 0.5, torch.tensor(symbols), BACK, generator())


@pytest.mark.parametrize("mask", [[False, False, False], [True, False, True]])
def test_an_answer_is_a_stretch_of_the_mask(mask):
    given = Text(torch.tensor([[1, 2, 3]]), torch.tensor([mask]))
    with pytest.raises(ValueError, match="without a gap"):
        collapsed(given, BACK)
