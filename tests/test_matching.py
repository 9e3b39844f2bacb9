"""Matching a target on a grammar whose answers can all be enumerated."""

import copy
import math

import pytest
import torch
from tests.worlds import close

from fdiv import JS, KL, TV, ReverseKL
from fdiv.adapters.transformers import CausalLM
from fdiv.matching import answer_log_probs, constrain, distance, draw, enumerated, match, scored
from fdiv.methods.decode.quasi_rejection import QuasiRejection
from fdiv.methods.match.fdpg import FDPG
from fdiv.methods.match.target import Accept, Exponential, Target, Tilt
from fdiv.tasks._task import Text
from fdiv.tasks.grammar import Grammar

TASK = Grammar(symbols=4, successors=2, length=2, questions=6, trained_on=5)
SEEN = TASK.prompt_ids()[:5]
ACCEPTED = Target() * Accept()


def model(seed):
    """Random, and far from uniform."""
    found = CausalLM.fresh(TASK.vocab_size, hidden_size=16, layers=1, heads=2, seed=seed)
    with torch.no_grad():
        found.model.lm_head.weight.mul_(8)
    return found


def nothing(ids, mask):
    return torch.zeros(len(ids))


def ends_alike(ids, mask):
    """Whether the two tokens of the answer are the same."""
    return ids[:, -1] == ids[:, -2]


def all_texts(prompts, answers):
    ids = torch.cat([prompts.repeat_interleave(len(answers), 0), answers.repeat(len(prompts), 1)], 1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 3:] = True
    return Text(ids, mask)


def laws(base, target, prompts=SEEN):
    """The normalised target at each prompt, [prompts, answers]."""
    answers, log_base = enumerated(base, prompts, 2)
    log_p = target.log_score(log_base.flatten(), *all_texts(prompts, answers), TASK).reshape(log_base.shape)
    return log_p.log_softmax(1)


# -- exactly -------------------------------------------------------------------------------------------


def test_the_enumeration_holds_every_answer_with_its_probability():
    base = model(0)
    answers, log_q = enumerated(base, SEEN, 2)
    assert answers.shape == (25, 2) and len({tuple(row) for row in answers.tolist()}) == 25
    close(log_q.exp().sum(1), torch.ones(5).double(), 1e-6)
    close(log_q.flatten(), answer_log_probs(base, all_texts(SEEN, answers)), 1e-5)


def test_the_distance_is_the_divergence_from_the_normalised_target():
    base, other = model(0), model(1)
    _, log_q = enumerated(other, SEEN, 2)
    for target, divergence in ((ACCEPTED, KL()), (ACCEPTED, TV()), (Target() * Tilt(0.5), ReverseKL())):
        found = distance(TASK, base, target, other, divergence, SEEN)
        close(found, divergence(laws(base, target), log_q))
        assert (found > 0).all()


def test_the_base_model_is_at_distance_0_from_the_target_without_scorers():
    base = model(0)
    assert distance(TASK, base, Target(), base, JS(), SEEN).max() < 1e-12


def test_the_kl_from_the_accepted_answers_to_the_base_model_is_minus_log_z():
    base = model(0)
    answers, log_base = enumerated(base, SEEN, 2)
    valid = TASK.verify(all_texts(SEEN, answers).ids).reshape(log_base.shape)
    close(distance(TASK, base, ACCEPTED, base, KL(), SEEN), -(log_base.exp() * valid).sum(1).log())


def test_where_the_target_has_no_mass_there_is_no_distance():
    base = model(0)
    assert distance(TASK, base, Target() * Accept(nothing), base, JS(), SEEN).isnan().all()


def test_too_many_answers_are_refused():
    with pytest.raises(ValueError, match="5\\^8 answers are too many"):
        enumerated(model(0), SEEN, 8)


# -- on samples ----------------------------------------------------------------------------------------


def test_answers_are_scored_under_target_and_proposal():
    base, other = model(0), model(1)
    text, log_target, log_proposal = scored(TASK, base, ACCEPTED, other, prompts=3, answers=4, seed=5)
    assert log_target.shape == log_proposal.shape == (3, 4) and len(text.ids) == 12
    close(log_proposal.flatten(), answer_log_probs(other, text))
    accepted = TASK.verify(*text).bool()
    assert torch.equal(log_target.flatten() > -math.inf, accepted)
    close(log_target.flatten()[accepted], answer_log_probs(base, text)[accepted])
    assert (text.ids.reshape(3, 4, -1)[:, :, :3] == text.ids.reshape(3, 4, -1)[:, :1, :3]).all()


def test_constrain_finds_the_lambdas_of_a_mean_over_prompts():
    base = model(0)
    found = constrain(TASK, base, (ends_alike,), (0.4,), prompts=200, answers=50, seed=1)
    assert found.moments == pytest.approx((0.4,), rel=1e-9)
    target = Target() * Exponential((ends_alike,), found.lambdas)
    answers, _ = enumerated(base, SEEN, 2)
    mean = (laws(base, target).exp() * (answers[:, 0] == answers[:, 1])).sum(1).mean().item()
    before = (laws(base, Target()).exp() * (answers[:, 0] == answers[:, 1])).sum(1).mean().item()
    assert abs(mean - 0.4) < 0.02 < abs(before - 0.4)


def test_drawn_answers_have_the_law_of_quasi_rejection_and_its_price():
    base, writer, rule, count = model(0), model(1), QuasiRejection(2.0), 1500
    prompts = SEEN[2:3].expand(count, -1)
    given = Text(prompts, torch.zeros_like(prompts, dtype=torch.bool))
    text, tries = draw(TASK, base, ACCEPTED, writer, rule, prompts=given)
    assert TASK.verify(*text).all() and (text.ids[:, :3] == SEEN[2]).all()
    answers, log_base = enumerated(base, SEEN[2:3], 2)
    _, log_q = enumerated(writer, SEEN[2:3], 2)
    log_target = ACCEPTED.log_score(log_base[0], *all_texts(SEEN[2:3], answers), TASK)
    mass = (log_q[0] + rule.log_kept(log_target, log_q[0])).exp()
    chance = mass / mass.sum()
    place = (text.ids[:, None, 3:] == answers).all(-1).int().argmax(1)
    told = place.bincount(minlength=25).double()
    deviations = (told - count * chance) / (count * chance * (1 - chance)).clamp(min=1e-9).sqrt()
    assert deviations[chance > 0].abs().max() < 4 and not told[chance == 0].any()
    rate = mass.sum().item()
    assert tries.double().mean().item() == pytest.approx(
        1 / rate, abs=4 * math.sqrt(1 - rate) / rate / count**0.5
    )


def test_drawing_repeats_itself_and_answers_each_prompt_once():
    base = model(0)
    first, again = (
        draw(TASK, base, ACCEPTED, base, QuasiRejection(1.0), prompts=7, seed=3) for _ in range(2)
    )
    assert torch.equal(first.text.ids, again.text.ids) and len(first.text.ids) == 7
    prompts = TASK.prompts(7, torch.Generator().manual_seed(3))
    assert torch.equal(first.text.ids[:, :3], prompts.ids)


def test_drawing_ends_with_an_error_where_nothing_is_accepted():
    base = model(0)
    with pytest.raises(RuntimeError, match=r"4 of 4 prompts have no accepted answer after 6 tries"):
        draw(TASK, base, Target() * Accept(nothing), base, QuasiRejection(2.0), prompts=4, most=6)


# -- by training ---------------------------------------------------------------------------------------

TRAIN = {"steps": 40, "batch_size": 80, "group_size": 16, "learning_rate": 0.02, "device": "cpu"}


def test_matching_approaches_the_target_and_leaves_the_base_model_alone():
    base = model(0)
    weights = copy.deepcopy(base.model.state_dict())
    for target, method in (
        (ACCEPTED, FDPG(KL())),
        (ACCEPTED, FDPG(KL(), proposal="lagged", every=4)),
        (Target() * Tilt(0.5), FDPG(ReverseKL())),
    ):
        before = distance(TASK, base, target, base, method.divergence, SEEN).mean()
        found = match(TASK, base, target, method=method, **TRAIN)
        after = distance(TASK, base, target, found, method.divergence, SEEN).mean()
        assert after < 0.5 * before
    assert all(torch.equal(weight, weights[name]) for name, weight in base.model.state_dict().items())


def test_a_run_is_kept_in_its_folder_and_repeats_itself(tmp_path):
    base = model(0)
    settings = TRAIN | {"steps": 4, "log_every": 1, "method": FDPG(KL())}
    first = match(TASK, base, ACCEPTED, folder=tmp_path, **settings)
    again = match(TASK, base, ACCEPTED, **settings)
    assert all(
        torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True)
    )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and '"log_partition"' in lines[0] and '"rejected"' in lines[0]


def test_a_wrong_setting_of_the_training_is_named():
    with pytest.raises(ValueError, match="learning_rates"):
        match(TASK, model(0), ACCEPTED, learning_rates=1.0)
