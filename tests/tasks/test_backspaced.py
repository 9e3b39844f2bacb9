"""The grammar with backspaces: its texts, its verdicts and its report."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from fdiv import KL, TV, parse
from fdiv.adapters.transformers import CausalLM
from fdiv.recipe import ModelSpec
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text
from fdiv.tasks.backspace import collapsed
from fdiv.tasks.backspaced import Backspaced
from fdiv.tasks.grammar import Grammar
from fdiv.tasks.prompting import uniform

GRAMMAR = Grammar(symbols=5, successors=2, length=3, questions=9, trained_on=6)
TASK = Backspaced(GRAMMAR, noise=0.5)
BACK = 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return TASK.load(ModelSpec(hidden_size=16, layers=1, heads=2), seed=0)


class Script:
    """A writer that answers what it is told to."""

    def __init__(self, *answers):
        self.answers = torch.tensor(answers)

    def sample(self, prompts, length, draws, decoding):
        return torch.cat([prompts, self.answers], 1)


def written(*answers):
    prompts = GRAMMAR.prompt_ids()[:1].expand(len(answers), -1)
    given = Text(prompts, torch.zeros_like(prompts).bool())
    return TASK.answer(Script(*answers), given, uniform(len(answers), 7, generator()), Decoding())


def test_there_is_one_token_more(model):
    assert TASK.backspace == BACK and model.size == BACK + 1


def test_data_collapse_to_valid_answers_of_the_grammar():
    text = TASK.responses(None, 400, generator())
    clean = collapsed(text, BACK)
    assert (clean.mask.sum(1) == 3).all() and GRAMMAR.verify(clean.ids[:, :6]).all()
    assert TASK.verify(*text).all() and TASK.verify(text.ids, text.mask).all()
    assert text.ids.shape[1] == 3 + TASK.answer_length == 10  # somewhere both symbols were struck
    assert torch.equal(TASK._until_whole(text.ids), text.mask)


def test_what_is_taken_back_is_not_learnt_from_data():
    text = TASK.data("truth", 400, generator())
    assert (text.ids[text.mask] == BACK).any()
    following = torch.cat([text.ids[:, 1:] == BACK, torch.zeros(400, 1).bool()], 1)
    answer = torch.arange(text.ids.shape[1]) >= 3
    assert not text.mask[following & answer].any()


def test_an_answer_ends_when_it_is_whole():
    text = written([1, 2, 3, 4, 5, 1, 2], [1, BACK, 2, 3, 4, 5, 1], [1, BACK] * 3 + [1])
    assert text.mask.sum(1).tolist() == [3, 5, 7]
    assert not text.mask[:, :3].any()


def test_the_verdict_is_the_grammars_on_what_is_left():
    p = GRAMMAR.log_truth(GRAMMAR.prompt_ids()[:1])[0]
    right, wrong = (GRAMMAR.answers()[n].tolist() for n in (p.argmax(), p.argmin()))
    straight, bad = [*right, 1, 1, 1, 1], [*wrong, 1, 1, 1, 1]
    corrected = [wrong[0], BACK, *right, 1, 1]
    text = written(straight, bad, corrected, [BACK] * 7)
    assert TASK.verify(*text).tolist() == TASK.verify(text.ids).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_the_report_tells_a_model_that_undoes_noise_from_one_that_does_not(model):
    trained = TASK.load(ModelSpec(hidden_size=16, layers=1, heads=2), seed=0)
    optimiser = torch.optim.Adam(trained.model.parameters(), lr=0.03)
    for step in range(80):
        text = TASK.data("truth", 64, generator(step))
        loss = -trained.token_log_probs(*text).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    before, after = (TASK.evaluate(m, model, {"KL()": KL(), "TV()": TV()}, seed=0) for m in (model, trained))
    assert before["divergences"] == {"KL()": 0, "TV()": 0}
    assert 0 < after["divergences"]["TV()"] < after["divergences"]["KL()"]
    assert not after["exact"] and len(after["samples"]) == 4
    assert after["scalars"]["undoes wrong"] > 2 * after["scalars"]["undoes right"]
    assert after["scalars"]["pass@1"] > before["scalars"]["pass@1"] + 0.1
    assert after["scalars"]["pass@8"] >= after["scalars"]["pass@1"]


def test_the_numbers_on_answers_are_those_of_its_samples(model):
    scalars = TASK.evaluate(model, model, {}, seed=3)["scalars"]
    prompts = GRAMMAR.prompt_ids()[:6].repeat_interleave(32, 0)
    given = Text(prompts, torch.zeros_like(prompts).bool())
    text = TASK.answer(model, given, uniform(len(prompts), 7, generator(3)), Decoding())
    rows = [ids[mask].tolist() for ids, mask in zip(*text, strict=True)]
    depths = []
    for row in rows:
        depth = 0
        for token in row:
            depth = max(0, depth - 1) if token == BACK else depth + 1
        depths.append(depth)
    assert scalars["backspaces"] == pytest.approx(sum(row.count(BACK) for row in rows) / len(rows))
    assert scalars["unfinished"] == pytest.approx(sum(depth < 3 for depth in depths) / len(rows))
    assert 0 < scalars["unfinished"] < 0.2
    assert scalars["pass@1"] == pytest.approx(TASK.verify(*text).mean().item())


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="noise is a chance"):
        replace(TASK, noise=1.2)
    with pytest.raises(ValueError, match="give the model a hidden_size"):
        TASK.load(ModelSpec(path="somewhere"), seed=0)


def test_the_object_is_its_recipe():
    assert parse(repr(TASK), ["fdiv.tasks.all", "fdiv.methods.match.target"]) == TASK
    assert isinstance(TASK.load(ModelSpec(hidden_size=8, heads=2), seed=1), CausalLM)
