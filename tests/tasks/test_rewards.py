"""Rewards as plain functions, and puzzles that judge answers themselves."""

import json
import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")
from tests.tasks import letters

from fdiv.notation import function_named
from fdiv.recipe import ModelSpec
from fdiv.tasks.instructions import Instructions
from fdiv.tasks.padding import answered
from fdiv.tasks.rewards import rewarded
from fdiv.tasks.sources import records

READS = letters.tokenizer()


@pytest.fixture
def functions(monkeypatch):
    """A module that a recipe could list under plugins."""
    module = ModuleType("judges")
    module.length = lambda completions, **fields: [len(text) for text in completions]
    module.says_the_sum = lambda completions, sum, **fields: [
        float(right in text) for text, right in zip(completions, sum, strict=True)
    ]
    module.asks = lambda prompts, **fields: [float(prompt.endswith("1")) for prompt in prompts]
    module.short = lambda completions, **fields: [1.0]
    module.infinite = lambda completions, **fields: [float("inf") for _ in completions]
    module.words = lambda completions, **fields: ["many"] * len(completions)
    monkeypatch.setitem(sys.modules, "fdiv_plugin_judges", module)
    return module


@pytest.fixture
def task(tmp_path, functions):
    rows = [{"prompt": f"{a}+1", "response": f"It is {a + 1}.", "sum": str(a + 1)} for a in range(10, 30)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    letters.model(READS).save(tmp_path / "model")

    def made(**options):
        found = Instructions(str(path), template="plain", **options)
        found.reopen(str(tmp_path / "model"), ModelSpec(), 0)
        return found

    return made


def text_of(answers: dict[str, str]):
    ids = [[torch.tensor(READS(side)["input_ids"]) for side in pair] for pair in answers.items()]
    return answered([p for p, _ in ids], [a for _, a in ids], 0)


def test_a_reward_sees_texts_and_the_fields_of_the_record(task):
    answers = {"12+1": "It is 13.", "13+1": "It is 15."}
    assert task(rewards="judges:says_the_sum").reward(*text_of(answers)).tolist() == [1.0, 0.0]
    assert task(rewards="judges:asks").reward(*text_of(answers)).tolist() == [1.0, 1.0]
    assert task(rewards="judges:length").reward(*text_of(answers)).tolist() == [9.0, 9.0]


def test_several_rewards_are_added(task):
    both = task(rewards=("judges:says_the_sum", "judges:asks"))
    assert both.reward(*text_of({"12+1": "It is 13.", "13+1": "no"})).tolist() == [2.0, 1.0]


def test_without_a_function_the_reward_is_the_verdict(task):
    text = text_of({"12+1": "It is 13.", "13+1": "It is 15."})
    assert task(solution="sum").reward(*text).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("judges:none", "cannot be found"),
        ("no_such_module:f", "cannot be found"),
        ("judges", "module:function"),
        (":f", "module:function"),
        (".judges:f", "module:function"),
        ("judges:short", "one finite number each"),
        ("judges:infinite", "one finite number each"),
        ("judges:words", "list of numbers"),
    ],
)
def test_a_wrong_reward_says_what_is_wrong(functions, name, words):
    with pytest.raises(ValueError, match=words):
        rewarded((name,), ["a", "b"], ["c", "d"], [{}, {}])


def test_a_module_is_found_by_its_name_too():
    assert function_named("math:sqrt")(4.0) == 2.0


PUZZLES = "reasoning_gym:chain_sum?size=20&max_terms=2&max_digits=1"


@pytest.fixture
def reasoning_gym(monkeypatch):
    """Stands in for the package, which tests marked slow have: sums, and a checker of them."""
    module = ModuleType("reasoning_gym")

    def create_dataset(name, size, seed, **options):
        if name != "chain_sum" or options.keys() - {"max_terms", "max_digits"}:
            raise ValueError(f"no {name} with {options}")
        facts = {"source_dataset": name}
        return [
            {"question": f"{n}+{seed + 1}", "answer": str(n + seed + 1), "metadata": facts}
            for n in range(size)
        ]

    module.create_dataset = create_dataset
    module.get_score_answer_fn = lambda name: lambda answer, entry: float(answer == entry["answer"])
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.delitem(sys.modules, "fdiv.tasks.reasoning", raising=False)
    yield
    sys.modules.pop("fdiv.tasks.reasoning", None)


def judged_by_their_checker(folder):
    letters.model(READS).save(folder / "model")
    task = Instructions(
        PUZZLES,
        prompt="question",
        response="answer",
        solution="answer",
        rewards="fdiv.tasks.reasoning:score",
        template="plain",
    )
    model = task.reopen(str(folder / "model"), ModelSpec(), 0)
    right = task.responses(model, 5, torch.Generator().manual_seed(0))
    assert task.reward(*right).tolist() == [1.0] * 5
    wrong = right.ids.clone()
    wrong[right.mask] = READS("x")["input_ids"][-1]
    assert task.reward(wrong, right.mask).tolist() == [0.0] * 5


def test_puzzles_are_records_that_are_judged_by_their_own_checker(tmp_path, reasoning_gym):
    judged_by_their_checker(tmp_path)


@pytest.mark.parametrize(
    "wrong", ["reasoning_gym:no_such_puzzle", "reasoning_gym:chain_sum?no_such_option=1"]
)
def test_a_puzzle_that_does_not_exist_says_so(reasoning_gym, wrong):
    with pytest.raises(ValueError, match="cannot make"):
        records(wrong)


@pytest.mark.slow
def test_the_package_itself_makes_and_judges_puzzles(tmp_path):
    pytest.importorskip("reasoning_gym")
    judged_by_their_checker(tmp_path)
    for wrong in ("reasoning_gym:no_such_puzzle", "reasoning_gym:chain_sum?no_such_option=1"):
        with pytest.raises(ValueError, match="cannot make"):
            records(wrong)


def test_a_field_that_only_some_records_have_is_handed_over(functions):
    """Whichever record comes first; the others have None."""
    seen = {}

    def keeps(completions, **fields):
        seen.update(fields)
        return [0.0 for _ in completions]

    functions.keeps = keeps
    rewarded(("judges:keeps",), ["a", "b"], ["x", "y"], [{"level": 1}, {"level": 2, "sum": "3"}])
    assert seen == {"prompts": ["a", "b"], "level": [1, 2], "sum": [None, "3"]}
