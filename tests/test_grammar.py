"""The enumerable task: what it calls exact is exact."""

import math

import pytest
import torch

from fdiv import KL, ReverseKL
from fdiv.adapters.transformers import CausalLM
from fdiv.sample._sampler import Decoding
from fdiv.tasks.grammar import Grammar, _draw

TASK = Grammar(symbols=5, successors=2, length=3, questions=9, trained_on=6)


@pytest.fixture(scope="module")
def model():
    return CausalLM.fresh(TASK.vocab_size, hidden_size=16, layers=1, heads=2, seed=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_truth_sums_to_one_over_its_valid_answers():
    p = TASK.log_truth(TASK.prompt_ids()).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(9, dtype=torch.float64))
    assert ((p > 0).sum(1) == TASK.successors**TASK.length).all()


def test_prompts_are_different_pairs():
    assert len(TASK.prompt_ids().unique(dim=0)) == TASK.questions


def test_the_verifier_accepts_exactly_the_answers_of_positive_probability():
    prompts, answers = TASK.prompt_ids(), TASK.answers()
    ids = torch.cat([prompts.repeat_interleave(len(answers), 0), answers.repeat(len(prompts), 1)], 1)
    expected = TASK.log_truth(prompts).isfinite().reshape(-1)
    assert torch.equal(TASK.verify(ids).bool(), expected)


def test_an_answer_with_the_start_symbol_is_invalid():
    ids = torch.cat([TASK.prompt_ids()[:1], torch.zeros(1, 3, dtype=torch.long)], 1)
    assert not TASK.verify(ids).any()


def test_enumerated_answers_equal_the_model_scored_one_by_one(model):
    prompts, answers = TASK.prompt_ids()[:2], TASK.answers()
    ids = torch.cat([prompts.repeat_interleave(len(answers), 0), answers.repeat(2, 1)], 1)
    text = TASK._text(ids)
    with torch.no_grad():
        one_by_one = model.token_log_probs(*text).reshape(2, len(answers), -1).sum(-1).double()
    torch.testing.assert_close(TASK.log_answers(model, prompts), one_by_one, atol=1e-4, rtol=1e-4)


def test_enumerated_mass_and_the_leak_sum_to_one(model):
    mass = TASK.log_answers(model, TASK.prompt_ids()).exp().sum(1)
    assert (mass < 1).all()
    assert (mass > 0.3).all()


def test_samples_follow_the_enumerated_distribution(model):
    prompt = TASK.prompt_ids()[:1]
    ids = model.sample(prompt.expand(4000, -1), TASK.length, generator())
    share = TASK.verify(ids).mean().item()
    q = TASK.log_answers(model, prompt).exp()
    exact = q[TASK.log_truth(prompt).isfinite()].sum().item()
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000)


def test_draws_by_inverting_the_cdf_have_the_right_frequencies():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    answers = _draw(p, torch.zeros(20000, dtype=torch.long), generator())
    shares = torch.bincount(answers, minlength=4) / 20000
    torch.testing.assert_close(shares.double(), p[0], atol=0.02, rtol=0)
    assert (_draw(p, torch.ones(50, dtype=torch.long), generator()) == 1).all()


def test_pairs_are_one_valid_and_one_invalid_answer_to_the_same_prompt(model):
    pairs = TASK.pairs(model, 40, generator())
    assert TASK.verify(pairs.chosen.ids).all()
    assert not TASK.verify(pairs.rejected.ids).any()
    assert torch.equal(pairs.chosen.ids[:, :3], pairs.rejected.ids[:, :3])


def test_noisy_data_is_random_as_often_as_it_says():
    task = Grammar(noise=0.4)
    share = task.verify(task.data("noisy", 8000, generator()).ids).mean().item()
    chance = 4**3 / 12**3  # a random answer may be valid
    assert abs(share - (0.6 + 0.4 * chance)) < 0.03
    assert task.verify(task.data("truth", 500, generator()).ids).all()


def test_a_model_is_at_distance_zero_from_itself(model):
    result = TASK.evaluate(model, model, {"KL()": KL(), "ReverseKL()": ReverseKL()}, seed=0)
    assert result["divergences"] == {"KL()": 0.0, "ReverseKL()": 0.0}
    assert {"pass@1", "coverage@64", "modes", "entropy", "held-out pass@1", "ece"} <= set(result["scalars"])
    assert result["curves"]["pass@k"]["y"] == sorted(result["curves"]["pass@k"]["y"])


def test_impossible_settings_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="successors <= symbols"):
        Grammar(symbols=3, successors=4)
    with pytest.raises(ValueError, match="trained_on <= questions"):
        Grammar(questions=10, trained_on=11)
    with pytest.raises(ValueError, match="'truth' and 'noisy'"):
        TASK.data("clean", 1, generator())


# -- prompts and answers ------------------------------------------------------------------------------------


def test_each_answer_is_made_of_its_own_draws(model):
    prompts = TASK.prompts(50, generator())
    assert torch.isin(prompts.ids[:, 1] * 9 + prompts.ids[:, 2], pairs_of(TASK.prompt_ids()[:6])).all()
    draws = torch.rand(50, TASK.answer_length, generator=generator(1), dtype=torch.float64)
    text = TASK.answer(model, prompts, draws, Decoding(0.8, top_k=3))
    some = torch.tensor([7, 31, 2])
    part = TASK.answer(model, prompts.rows(some), draws[some], Decoding(0.8, top_k=3))
    assert part.ids.equal(text.ids[some])
    assert text.ids[:, :3].equal(prompts.ids) and text.mask.sum(1).tolist() == [3] * 50


def pairs_of(prompts):
    return prompts[:, 1] * 9 + prompts[:, 2]


def test_rollouts_answer_each_prompt_of_training_several_times(model):
    text = TASK.rollouts(model, 4, 5, generator())
    assert all(len(group[:, :3].unique(dim=0)) == 1 for group in text.ids.split(5))
    assert len(text.ids.unique(dim=0)) > 8


def test_a_privileged_teacher_is_shown_a_right_answer_to_the_same_prompt(model):
    text = TASK.answer(model, TASK.prompts(20, generator()), torch.rand(20, 3), Decoding())
    richer, shown = TASK.privileged(text)
    assert shown.all()
    assert TASK.verify(richer.ids[:, :6]).all()
    assert richer.ids[:, :3].equal(richer.ids[:, 6:9])
    assert richer.ids[richer.mask].equal(text.ids[text.mask]) and richer.mask.sum(1).tolist() == [3] * 20
