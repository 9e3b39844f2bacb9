"""Preference data, from files to pairs of responses, and what an evaluation says of them."""

import json

import pytest
import torch

pytest.importorskip("transformers")
from tests.tasks import letters

from fdiv import KL
from fdiv.recipe import ModelSpec
from fdiv.tasks.instructions import Instructions
from fdiv.tasks.measurement import responses

READS = letters.tokenizer()


def records(count=20):
    return [
        {"prompt": f"{a}+1", "chosen": f"It is {a + 1}.", "rejected": f"I do not know about {a}."}
        for a in range(10, 10 + count)
    ]


@pytest.fixture
def source(tmp_path):
    def write(rows, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def model(tmp_path):
    letters.model(READS).save(tmp_path / "model")
    return str(tmp_path / "model")


def opened(task, folder):
    found = task.reopen(folder, ModelSpec(), 0)
    found.model.eval().requires_grad_(False)
    return found


def task_on(source, **options):
    options = {"template": "plain", "response": "chosen", "rejected": "rejected"} | options
    return Instructions(source, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def texts(text):
    return [READS.decode(ids, skip_special_tokens=True) for ids in responses(text)]


def test_both_responses_follow_the_same_prompt(source, model):
    task = task_on(source(records()))
    pairs = task.pairs(opened(task, model), 12, generator())
    assert len(pairs.chosen.ids) == len(pairs.rejected.ids) == 12
    for better, worse, *marks in zip(
        pairs.chosen.ids, pairs.rejected.ids, pairs.chosen.mask, pairs.rejected.mask, strict=True
    ):
        begins = [int(mark.int().argmax()) for mark in marks]
        assert better[: begins[0]].tolist() == worse[: begins[1]].tolist()
    assert all(told.startswith("It is") for told in texts(pairs.chosen))
    assert all(told.startswith("I do not know") for told in texts(pairs.rejected))


def test_held_out_pairs_are_not_trained_on(source, model):
    task = task_on(source(records()), held_out=0.3)
    reference = opened(task, model)
    train, held = (
        set(texts(f(reference, 100, generator()).chosen)) for f in (task.pairs, task.held_out_pairs)
    )
    assert train and held and not train & held and len(train | held) == 20


def test_conversations_that_differ_in_their_last_turn_are_pairs(source, model):
    def turns(row, side):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]

    rows = [{side: turns(row, side) for side in ("chosen", "rejected")} for row in records()]
    task = Instructions(source(rows), messages="chosen", rejected="rejected")
    pairs = task.pairs(opened(task, model), 12, generator())
    assert all("It is" in told for told in texts(pairs.chosen))
    assert all("I do not know" in told for told in texts(pairs.rejected))


def test_conversations_that_differ_earlier_are_refused(source, model):
    def turns(row, side):
        asked = f"{row['prompt']} {side}"
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": row[side]}]

    rows = [{side: turns(row, side) for side in ("chosen", "rejected")} for row in records()]
    task = Instructions(source(rows), messages="chosen", rejected="rejected")
    with pytest.raises(ValueError, match="differ before their last turn"):
        task.pairs(opened(task, model), 4, generator())


def test_data_without_a_worse_response_says_what_to_write(source, model):
    task = task_on(source(records()), rejected=None)
    with pytest.raises(ValueError, match="rejected='rejected'"):
        task.pairs(opened(task, model), 4, generator())


def test_a_vocabulary_of_the_better_responses_alone_is_refused(source):
    with pytest.raises(ValueError, match="vocabulary='full'"):
        task_on(source(records()), vocabulary="corpus")


def test_a_record_without_the_worse_response_is_left_out(source, model):
    rows = [*records(), {"prompt": "5+5", "chosen": "It is 10.", "rejected": ""}]
    task = task_on(source(rows), held_out=0.3)
    reference = opened(task, model)
    with pytest.warns(UserWarning, match="1 dropped"):
        both = [texts(f(reference, 100, generator()).chosen) for f in (task.pairs, task.held_out_pairs)]
    assert len(both[0]) + len(both[1]) == 20


def test_worse_responses_that_are_left_out_or_cut_are_counted_and_warned_of(source, model):
    rows = [*records(), {"prompt": "5+5", "chosen": "It is 10.", "rejected": ""}]
    task = task_on(source(rows), max_response=12)
    reference = opened(task, model)
    cut = r"1 dropped: no response in 'rejected'; 20 cut, .*max_response=12"
    with pytest.warns(UserWarning, match=cut):
        pairs = task.pairs(reference, 100, generator())
    assert pairs.rejected.mask.sum(1).max() == 12


def test_an_evaluation_counts_the_pairs_that_were_learnt(source, model):
    task = task_on(source(records()), held_out=0.3, max_response=48, continuations=2)
    reference, trained = opened(task, model), opened(task, model)
    same = task.evaluate(trained, reference, {"KL()": KL()}, 0)["scalars"]
    assert same["preference accuracy"] == 0 and same["log-ratio margin"] == 0
    with torch.no_grad():  # what makes "It" likelier and "I " less
        head = trained.model.get_output_embeddings().weight
        head += 0.3 * torch.randn(head.shape, generator=generator(1))
    told = task.evaluate(trained, reference, {"KL()": KL()}, 0)["scalars"]
    assert 0 <= told["preference accuracy"] <= 1 and told["log-ratio margin"] != 0
