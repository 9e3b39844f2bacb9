"""The unlearning task: what is forgotten, what is kept, and that its report is exact."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from tests.worlds import close

from fdiv import JS, KL, ReverseKL, parse
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import boxed, sequence_of
from fdiv.methods.unlearn.flat import FLAT
from fdiv.methods.unlearn.gradient_ascent import GradientAscent
from fdiv.methods.unlearn.npo import NPO
from fdiv.tasks._task import Text
from fdiv.tasks.grammar import Grammar
from fdiv.tasks.unlearning import Unlearning

GRAMMAR = Grammar(symbols=5, successors=2, length=3, questions=9, trained_on=9)
TASK = Unlearning(GRAMMAR, forget=3)
MEASURES = {"KL()": KL(), "ReverseKL()": ReverseKL(), "JS(0.5)": JS(0.5)}


def fresh(seed):
    model = CausalLM.fresh(GRAMMAR.vocab_size, hidden_size=16, layers=1, heads=2, seed=seed)
    with torch.no_grad():
        model.model.lm_head.weight.mul_(20)  # far from uniform
    return model


@pytest.fixture(scope="module")
def model():
    return fresh(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- prompts and data -------------------------------------------------------------------------------------


def test_every_prompt_is_either_forgotten_or_kept():
    assert len(TASK.forgotten) == 3 and len(TASK.kept) == 6
    assert torch.equal(torch.cat([TASK.forgotten, TASK.kept]), GRAMMAR.prompt_ids())


@pytest.mark.parametrize("table", range(5))
def test_the_refusal_is_an_answer_and_wrong_behind_every_forgotten_prompt(table):
    task = Unlearning(Grammar(table=table), forget=20)
    assert (task.task.answers() == task.refusal).all(1).sum() == 1
    assert len(task.refusal.unique()) == 1
    assert not task.verify(torch.cat([task.forgotten, task.refusal.expand(20, -1)], 1)).any()


def test_pairs_are_the_refusal_and_the_references_own_answers(model):
    pairs = TASK.pairs(model, 3000, generator())
    assert torch.equal(pairs.chosen.ids[:, :3], pairs.rejected.ids[:, :3])
    assert torch.equal(pairs.chosen.mask, pairs.rejected.mask)
    assert pairs.chosen.mask[0].tolist() == [False] * 3 + [True] * 3
    assert (pairs.chosen.ids[:, 3:] == TASK.refusal).all()
    assert torch.equal(pairs.chosen.ids[:, :3].unique(dim=0), TASK.forgotten.unique(dim=0))
    # The first symbols of the answers to one prompt, against the reference's own probabilities.
    mine = pairs.rejected.ids[(pairs.rejected.ids[:, :3] == TASK.forgotten[0]).all(1)]
    shares = torch.bincount(mine[:, 3], minlength=GRAMMAR.vocab_size) / len(mine)
    one = torch.cat([TASK.forgotten[:1], torch.ones(1, 1, dtype=torch.long)], 1)
    exact = model.log_softmax(one, torch.tensor([[False] * 3 + [True]])).exp()[0]
    assert len(mine) > 800 and (shares - exact).abs().max() < 0.06


def test_retained_text_and_responses_answer_the_other_prompts(model):
    for text in (TASK.retained(model, 200, generator()), TASK.responses(model, 200, generator())):
        assert torch.equal(text.ids[:, :3].unique(dim=0), TASK.kept.unique(dim=0))
        assert text.mask[:, 3:].all() and not text.mask[:, :3].any()
    prompts = TASK.prompts(200, generator())
    assert torch.equal(prompts.ids.unique(dim=0), TASK.kept.unique(dim=0)) and not prompts.mask.any()


def test_the_reference_learns_every_prompt():
    text = TASK.data("truth", 400, generator())
    assert len(text.ids[:, :3].unique(dim=0)) == 9 and TASK.verify(*text).all()


def test_draws_are_repeatable(model):
    one, two = (TASK.pairs(model, 20, generator(4)).rejected.ids for _ in range(2))
    assert torch.equal(one, two)


# -- the report -------------------------------------------------------------------------------------------


def test_what_did_not_move_has_no_divergence(model):
    result = TASK.evaluate(model, model, MEASURES, seed=0)
    for name in MEASURES:
        assert result["divergences"][name] == result["scalars"][f"forget {name}"] == 0


def test_both_sides_are_what_the_grammar_itself_enumerates(model):
    """A Grammar trained on the prompts to be forgotten calls the others held out."""
    policy = fresh(1)
    result = TASK.evaluate(policy, model, MEASURES, seed=0)
    theirs = replace(GRAMMAR, trained_on=3).evaluate(policy, model, MEASURES, seed=0)
    for name in ("pass@1", "pass@8", "modes"):
        assert result["scalars"][f"forget {name}"] == pytest.approx(theirs["scalars"][name], abs=1e-12)
        assert result["scalars"][name] == pytest.approx(theirs["scalars"][f"held-out {name}"], abs=1e-12)
    for name in MEASURES:
        assert result["scalars"][f"forget {name}"] == pytest.approx(theirs["divergences"][name], rel=1e-9)
    assert result["curves"]["pass@k"] == theirs["curves"]["pass@k (held-out prompts)"]
    assert result["curves"]["pass@k (prompts to be forgotten)"] == theirs["curves"]["pass@k"]


def test_the_divergence_of_what_is_kept_averages_over_its_prompts_alone(model):
    policy = fresh(1)
    result = TASK.evaluate(policy, model, MEASURES, seed=0)["divergences"]
    everything = GRAMMAR.evaluate(policy, model, MEASURES, seed=0)["divergences"]
    forget = replace(GRAMMAR, trained_on=3).evaluate(policy, model, MEASURES, seed=0)["divergences"]
    for name in MEASURES:
        assert result[name] == pytest.approx((9 * everything[name] - 3 * forget[name]) / 6, rel=1e-9)


def test_the_chance_of_a_refusal_is_that_of_its_tokens(model):
    result = TASK.evaluate(model, model, {}, seed=0)["scalars"]
    for name, prompts in (("refusal", TASK.kept), ("forget refusal", TASK.forgotten)):
        ids = torch.cat([prompts, TASK.refusal.expand(len(prompts), -1)], 1)
        mask = torch.arange(6).expand_as(ids) >= 3
        with torch.no_grad():
            exact = model.token_log_probs(ids, mask).reshape(-1, 3).sum(1).exp().mean()
        assert result[name] == pytest.approx(exact.item(), rel=1e-4)


def test_samples_show_prompts_of_either_kind(model):
    samples = TASK.evaluate(model, model, {}, seed=0)["samples"]
    kinds = [sample["prompt"].split()[0] for sample in samples]
    assert kinds == ["[forget]", "[forget]", "[keep]", "[keep]"]
    assert all(len(sample["outputs"]) == len(sample["valid"]) == 6 for sample in samples)
    one = Unlearning(GRAMMAR, forget=1).evaluate(model, model, {}, seed=0)["samples"]
    assert [sample["prompt"].split()[0] for sample in one] == ["[forget]", "[keep]", "[keep]"]


# -- methods on it ----------------------------------------------------------------------------------------


def menu(policy, reference, pairs, kept):
    """What PairsFeed hands to the three methods."""
    both = Text(*(torch.cat(two) for two in zip(pairs.chosen, pairs.rejected, strict=True)))
    log_q = policy.token_log_probs(*both)
    with torch.no_grad():
        log_p = boxed(reference.token_log_probs(*pairs.rejected), pairs.rejected.mask).sum(1)
    rows = len(pairs.chosen.ids)
    return {
        "log_q_label": log_q,
        "sequence": sequence_of(both.mask),
        "pairs": rows,
        "pairs_in_batch": rows,
        "log_p_rejected": log_p,
        "log_q_rejected": boxed(log_q, both.mask).sum(1)[rows:],
        "log_q_retain_label": policy.token_log_probs(*kept),
        "retain_sequence": sequence_of(kept.mask),
    }


def unlearnt(method, reference):
    """The scalars after a few steps from the reference."""
    policy = fresh(0)
    optimiser = torch.optim.Adam(policy.model.parameters(), lr=1e-3)
    for step in range(15):
        draw = generator(step)
        offered = menu(policy, reference, TASK.pairs(reference, 32, draw), TASK.retained(reference, 64, draw))
        loss = method(**{name: offered[name] for name in method.reads}).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return TASK.evaluate(policy, reference, MEASURES, seed=0)["scalars"]


@pytest.mark.parametrize("method", [FLAT(), FLAT(KL())], ids=repr)
def test_flat_puts_the_refusal_in_the_place_of_what_it_forgets(model, method):
    before, after = TASK.evaluate(model, model, MEASURES, seed=0)["scalars"], unlearnt(method, model)
    assert before["forget refusal"] < 0.05 and after["forget refusal"] > 0.3
    assert after["forget KL()"] > max(1.0, after["KL()"])


@pytest.mark.parametrize("method", [NPO, GradientAscent])
def test_text_that_is_retained_holds_the_policy_there(model, method):
    alone, held = unlearnt(method(), model), unlearnt(method(retain=3.0), model)
    assert min(alone["forget KL()"], held["forget KL()"]) > 3
    assert held["forget KL()"] > held["KL()"]
    assert held["KL()"] < 0.7 * alone["KL()"]


def test_retraining_without_the_forgotten_is_imitating_the_responses(model):
    close(
        TASK.responses(model, 50, generator(2)).ids.double(),
        TASK.retained(model, 50, generator(2)).ids.double(),
    )


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [0, 9, 20])
def test_something_is_forgotten_and_something_kept(forget):
    with pytest.raises(ValueError, match="1 <= forget < questions"):
        Unlearning(GRAMMAR, forget=forget)


def test_prompts_that_are_neither_forgotten_nor_kept_are_refused():
    with pytest.raises(ValueError, match="every prompt is either forgotten or kept"):
        Unlearning(replace(GRAMMAR, trained_on=6), forget=3)


def test_a_grammar_in_which_nothing_is_a_refusal_is_refused():
    with pytest.raises(ValueError, match="every symbol, repeated, is a valid answer"):
        Unlearning(Grammar(symbols=2, successors=2, length=2, questions=4, trained_on=4), forget=1)


def test_the_object_is_its_recipe():
    assert parse(repr(TASK), ["fdiv.tasks.all", "fdiv.methods.match.target"]) == TASK
