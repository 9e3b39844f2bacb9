"""Instruction data, from files to tokens, answers and numbers."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from tests.tasks import letters
from tokenizers import processors

from fdiv import KL, SFT, parse
from fdiv.recipe import ModelSpec
from fdiv.sample._sampler import Decoding
from fdiv.tasks.instructions import Instructions
from fdiv.tasks.padding import NOTHING, lengths, rows_of, unanswered
from fdiv.tasks.samples import split
from fdiv.tasks.sources import records
from fdiv.tasks.verdict import agrees

READS = letters.tokenizer()
pytestmark = pytest.mark.filterwarnings("ignore:of 20 samples of")  # some tests ask for short answers


def sums(count=20) -> list[dict]:
    return [
        {"prompt": f"{a}+{a % 7}", "response": f"It is {a + a % 7}.", "sum": str(a + a % 7)}
        for a in range(10, 10 + count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path) -> str:
    return str(write(tmp_path / "sums.jsonl", sums()))


@pytest.fixture
def folder(tmp_path) -> str:
    """A model and its tokenizer, saved."""
    letters.model(READS).save(tmp_path / "model")
    return str(tmp_path / "model")


def opened(task, folder, **spec):
    model = task.reopen(folder, ModelSpec(**spec), 0)
    model.model.eval().requires_grad_(False)
    return model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(rows, tokens, seed=0):
    return torch.rand(rows, tokens, generator=generator(seed), dtype=torch.float64)


def told(samples):
    """(prompt, response) as text, in a fixed order."""
    return sorted((READS.decode(s.prompt), READS.decode(s.response)) for s in samples)


def everything(task, reads=READS):
    found = split(task, reads)
    return [*found.train, *found.held_out]


# -- where data are read from -----------------------------------------------------------------------------


def test_tables_folders_and_saved_data_sets_give_the_same_records(tmp_path):
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [*sums(3), {"prompt": 'a "b",\u2028c\nd', "response": "e", "sum": "1"}]
    write(tmp_path / "a.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "a.parquet", "a.csv", "saved", "splits", "splits/test"):
        assert records(str(tmp_path / name)) == rows, name
    (tmp_path / "folder").mkdir()
    for n, row in enumerate(rows):
        write(tmp_path / "folder" / f"{n}.jsonl", [row])
    assert records(str(tmp_path / "folder"), limit=2) == rows[:2]


def test_a_text_file_is_no_record(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"a \.jsonl, \.parquet, \.csv file"):
        records(str(tmp_path / "a.txt"))


# -- from records to tokens -------------------------------------------------------------------------------


def test_a_chat_is_written_by_the_template_and_its_mark_of_the_end_is_the_last_token(source):
    for prompt, response in told(everything(Instructions(source))):
        question = prompt.removeprefix("<|start|>user\n").removesuffix("<|end|>\n<|start|>assistant\n")
        row = next(row for row in sums() if row["prompt"] == question)
        assert response == row["response"] + "<|end|>"  # and not the line that the template adds behind it


def test_the_mask_is_true_on_the_response_and_its_end_alone(source, folder):
    task = Instructions(source)
    text = task.responses(opened(task, folder), 100, generator())
    end = READS.convert_tokens_to_ids("<|end|>")
    for ids, mask in zip(*text, strict=True):
        places = mask.nonzero().flatten()
        assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
        assert ids[places[-1]] == end and end not in ids[places[:-1]]
        prompt = READS.decode(ids[: places[0]])
        assert prompt.startswith("<|start|>user") and prompt.endswith("<|start|>assistant\n")
    assert len(text.ids) == len(split(task, READS).train)


def test_conversations_are_read_as_prompt_and_response_are(tmp_path, source):
    names = {"user": "human", "assistant": "gpt"}
    chats = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]
        for r in sums()
    ]
    other = [[{"from": names[t["role"]], "value": t["content"]} for t in chat] for chat in chats]
    wanted = told(everything(Instructions(source)))
    for name, turns in (("messages", chats), ("conversations", other)):
        path = write(tmp_path / f"{name}.jsonl", [{name: turn} for turn in turns])
        assert told(everything(Instructions(str(path), messages=name))) == wanted
    halves = [{"prompt": chat[:1], "response": chat[1:]} for chat in chats]
    assert told(everything(Instructions(str(write(tmp_path / "halves.jsonl", halves))))) == wanted


def test_of_a_conversation_the_last_answer_is_the_response_and_all_else_the_prompt(tmp_path):
    roles = ["user", "assistant", "user", "assistant"]
    rows = [{"m": [{"role": r, "content": f"{n}{k}"} for k, r in enumerate(roles)]} for n in range(4)]
    found = told(
        everything(Instructions(str(write(tmp_path / "a.jsonl", rows)), messages="m", system="Be brief."))
    )
    assert found[0] == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\n00<|end|>\n<|start|>assistant\n01<|end|>\n"
        "<|start|>user\n02<|end|>\n<|start|>assistant\n",
        "03<|end|>",
    )


def test_templates_without_a_chat_end_with_the_end_of_text(source):
    plain = told(everything(Instructions(source, template="plain")))
    assert plain[0] == ("10+3", "It is 13.<|text|>")
    text = told(everything(Instructions(source, template="{prompt} (to {sum}):\n")))
    assert text[0] == ("10+3 (to 13):\n", "It is 13.<|text|>")


def test_a_response_has_the_tokens_that_it_has_behind_its_prompt(source):
    begins = letters.tokenizer(space=True)
    sample = everything(Instructions(source, template="plain"), begins)[0]
    whole = begins.decode(torch.cat(sample[:2]))
    assert whole.startswith(" 1") and whole.count(" ") == 3  # one, and the two of "It is 13."


def test_no_token_reaches_over_the_border_of_prompt_and_response(tmp_path):
    rows = [{"prompt": f"{n}a", "response": "ba ab"} for n in range(4)]
    reads = letters.tokenizer(merges=[("a", "b")])
    task = Instructions(str(write(tmp_path / "a.jsonl", rows)), template="plain")
    assert reads.decode(reads("ab")["input_ids"]) == "ab" and len(reads("ab")["input_ids"]) == 1
    for sample in everything(task, reads):
        pieces = [[reads.decode(n) for n in part] for part in sample[:2]]
        assert pieces[0][1:] == ["a"] and pieces[1] == ["b", "a", " ", "ab", "<|text|>"]


def test_a_tokenizer_that_begins_texts_begins_plain_prompts_alone(source):
    begins = letters.tokenizer(bos_token="<|start|>")
    begins._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", begins.bos_token_id)]
    )
    assert (
        begins.decode(everything(Instructions(source, template="plain"), begins)[0].prompt)[:9] == "<|start|>"
    )
    chat = begins.decode(everything(Instructions(source), begins)[0].prompt)
    assert chat.count("<|start|>") == 2  # the template's own


@pytest.mark.parametrize(
    ("template", "eos", "wanted"),
    [
        (letters.CHAT, "<|end|>", "hi<|end|>"),
        (
            "{% for m in messages %}[{{ m.content }}]{% endfor %}",
            "<|text|>",
            "[hi]<|text|>",
        ),  # no mark at all
        (
            letters.CHAT.replace("m.content", "m.content | upper"),
            "<|text|>",
            "HI<|end|>",
        ),  # content not found
        (letters.CHAT.replace("}<|end|>\n{%", "}\n<|end|>\n<|text|>{%"), "<|text|>", "hi\n<|end|>"),
    ],
)
def test_a_response_ends_with_the_mark_that_follows_its_content(tmp_path, template, eos, wanted):
    rows = [{"prompt": f"{n}", "response": "hi"} for n in range(4)]
    reads = letters.tokenizer(template, eos)
    found = everything(Instructions(str(write(tmp_path / "a.jsonl", rows))), reads)
    assert {reads.decode(s.response) for s in found} == {wanted}
    assert split(Instructions(str(tmp_path / "a.jsonl")), reads).ends == (int(found[0].response[-1]),)


def test_what_is_too_long_or_empty_is_counted_and_warned_of(tmp_path):
    rows = [
        *sums(10),
        {"prompt": "long " * 20, "response": "x"},
        {"prompt": "p", "response": "abcdefghij" * 3},
        {"prompt": "q", "response": "abcdefghij" * 3},
        {"prompt": "r", "response": None},
        {"prompt": " ", "response": "x"},
    ]
    task = Instructions(
        str(write(tmp_path / "a.jsonl", rows)), template="plain", max_prompt=50, max_response=12
    )
    with pytest.warns(UserWarning, match="2 dropped: no prompt or no response") as w:
        found = split(task, READS)
    message = str(w[0].message)
    assert message.startswith("of 15 samples of ")
    assert "; 1 dropped: a prompt longer than max_prompt=50; 2 cut, and without their end: a resp" in message
    assert found.counts == Counter(read=15, empty=2, long=1, cut=2)
    assert len(everything(task)) == 12
    cut = [s.response for s in everything(task) if READS.decode(s.prompt) in "pq"]
    assert [READS.decode(response) for response in cut] == ["abcdefghijab"] * 2
    assert found.ends == (READS.eos_token_id,)


def test_no_prompt_is_both_trained_on_and_held_out_and_the_choice_does_not_move(tmp_path, source):
    twice = [{"prompt": r["prompt"], "response": f"{x}"} for r in sums() for x in "ab"]
    task = Instructions(str(write(tmp_path / "twice.jsonl", twice)), held_out=0.2)
    train, held = ({p for p, _ in told(side)} for side in split(task, READS)[:2])
    assert not train & held and len(train | held) == 20
    assert 2 <= len(held) <= 6
    shuffled = Instructions(str(write(tmp_path / "shuffled.jsonl", twice[::-1])), held_out=0.2)
    assert told(split(shuffled, READS).held_out) == told(split(task, READS).held_out)


def test_another_source_can_be_held_out_and_what_it_shares_is_not_trained_on(tmp_path, source):
    other = write(tmp_path / "other.jsonl", [*sums(2), {"prompt": "7", "response": "8", "sum": "8"}])
    task = Instructions(source, held_out=str(other))
    with pytest.warns(UserWarning, match="2 dropped: a prompt that is held out too"):
        found = split(task, READS)
    assert (len(found.train), len(found.held_out)) == (18, 3)


def test_a_restricted_vocabulary_is_that_of_prompts_and_responses(source, folder):
    task = Instructions(source, vocabulary="corpus", max_response=16)
    model = opened(task, folder)
    text = task.responses(model, 100, generator())
    assert torch.isin(text.ids, model.vocabulary).all() and len(model.vocabulary) < 40
    drawn = task.answer(model, task.prompts(3, generator()), uniform(3, task.answer_length), Decoding())
    assert torch.isin(drawn.ids[drawn.mask], model.vocabulary).all()


# -- answers ----------------------------------------------------------------------------------------------


def test_prompts_of_training_are_answered_up_to_the_mark_that_the_data_end_with(source, folder):
    task = Instructions(source, max_response=24)
    model, end = opened(task, folder), READS.convert_tokens_to_ids("<|end|>")
    with torch.no_grad():  # likely enough to be drawn
        model.model.lm_head.weight[end] *= 3
    prompts = task.prompts(40, generator())
    assert not prompts.mask.any() and (prompts.ids == NOTHING).any() == (
        lengths(prompts.ids).unique().numel() > 1
    )
    known = [s.prompt.tolist() for s in split(task, READS).train]
    assert all(row.tolist() in known for row in rows_of(prompts))
    text = task.answer(model, prompts, uniform(40, 24), Decoding())
    answers = [ids[mask].tolist() for ids, mask in zip(*text, strict=True)]
    assert all(end not in answer[:-1] for answer in answers)
    assert all(answer[-1] in (end, READS.eos_token_id) or len(answer) == 24 for answer in answers)
    assert sum(answer[-1] == end for answer in answers) > 3


def test_prompts_that_are_padded_with_a_token_are_refused(source, folder):
    task = Instructions(source, max_response=16)
    model, prompts = opened(task, folder), task.prompts(2, generator())
    padded = prompts._replace(ids=torch.nn.functional.pad(prompts.ids, (0, 2)))
    with pytest.raises(ValueError, match="padded with the id 0, which is read as text"):
        task.answer(model, padded, uniform(2, 16), Decoding())
    other = unanswered([torch.tensor([7, 7, 7]), torch.tensor([7])])  # no prompts of the data
    assert task.answer(model, other, uniform(2, 16), Decoding()).mask.any(1).all()


def test_rollouts_answer_each_prompt_several_times(source, folder):
    task = Instructions(source, max_response=5)
    text = task.rollouts(opened(task, folder), 3, 4, generator())
    begin = [tuple(ids[: int(mask.int().argmax())].tolist()) for ids, mask in zip(*text, strict=True)]
    assert all(len(set(begin[4 * n : 4 * n + 4])) == 1 for n in range(3))
    assert len({tuple(row.tolist()) for row in text.ids}) > 3


@pytest.mark.parametrize(
    ("response", "solution", "right"),
    [
        ("So it is 1,234.50 in all.", "1234.5", True),
        ("3 + 4 = 7", "7", True),
        ("3 + 4 = 7, not 8", "7", False),
        ("that makes \\boxed{\\frac{1}{2}} of 9", "\\boxed{\\frac{1}{2}}", True),
        ("\\boxed{6}, or \\boxed{ 7 } rather than 8", "7", True),
        ("I spent 3*4=12.\n#### 12", "... so 12\n#### 12.0", True),
        ("a half: 1/2", "0.5", True),
        ("-3", "3", False),
        ("$18", "18", True),
        ("no number", "18", False),
        ("Paris.", "  paris", True),
        ("It is Paris", "Paris", False),
        ("\\boxed{Paris}", "Paris", True),
        ("\\boxed{4", "4", True),  # never closed: the last number
        ("", "4", False),
    ],
)
def test_an_answer_is_right_if_its_last_number_or_its_whole_text_is_that_of_the_solution(
    response, solution, right
):
    assert agrees(response, solution) is right


def test_the_data_verify_themselves_and_wrong_answers_fail(source, folder):
    task = Instructions(source, solution="sum")
    text = task.responses(opened(task, folder), 100, generator())
    assert task.verify(text.ids).all() and task.verify(*text).all()
    answered = text.ids.clone()
    for row, mask in zip(answered, text.mask, strict=True):
        row[mask.nonzero().flatten()[-3]] = READS("x")["input_ids"][0]  # the last digit
    assert not task.verify(answered).any() and not task.verify(answered, text.mask).any()
    padded = torch.nn.functional.pad(text.ids, (0, 3), value=READS("9")["input_ids"][0])
    assert task.verify(padded, torch.nn.functional.pad(text.mask, (0, 3))).all()
    assert task.verify(padded).all()  # what follows the end of an answer is none of it
    with pytest.raises(ValueError, match="begins with no prompt of"):
        task.verify(text.ids[:, 1:])
    with pytest.raises(ValueError, match="no answer can be verified"):
        Instructions(source).verify(text.ids)


def test_a_teacher_may_be_shown_the_record_and_is_asked_about_the_same_tokens(source, folder):
    task = Instructions(source, hint="{prompt} (it is {sum}, say: {response})", max_response=16)
    model = opened(task, folder)
    text = task.answer(model, task.prompts(5, generator()), uniform(5, task.answer_length), Decoding())
    richer, shown = task.privileged(text)
    assert shown.tolist() == [True] * 5
    for (ids, mask), (new, new_mask) in zip(zip(*text, strict=True), zip(*richer, strict=True), strict=True):
        assert new[new_mask].equal(ids[mask])
        question = READS.decode(ids[: int(mask.int().argmax())]).split("\n")[1].removesuffix("<|end|>")
        row = next(row for row in sums() if row["prompt"] == question)
        hint = f"{question} (it is {row['sum']}, say: {row['response']})"
        wanted = f"<|start|>user\n{hint}<|end|>\n<|start|>assistant\n"
        assert READS.decode(new[: int(new_mask.int().argmax())]) == wanted


def test_where_nothing_can_be_shown_the_prompt_stays_what_it_is(tmp_path, folder):
    rows = [r | {"sum": None if n % 2 else r["sum"]} for n, r in enumerate(sums())]
    path = str(write(tmp_path / "half.jsonl", rows))
    for task in (Instructions(path, hint="{prompt} {sum}", template="plain"), Instructions(path, max_hint=3)):
        text = task.responses(opened(task, folder), 100, generator())
        richer, shown = task.privileged(text)
        assert shown.any() == (task.max_hint > 3) and not shown.all()
        for n in (~shown).nonzero().flatten().tolist():
            used = int(text.mask[n].nonzero().max()) + 1
            assert richer.ids[n][:used].equal(text.ids[n][:used])
            assert richer.mask[n].nonzero().equal(text.mask[n].nonzero())
    unknown = text.ids.clone()
    unknown[:, 0] = 7
    assert not task.privileged(text._replace(ids=unknown))[1].any()


# -- models -----------------------------------------------------------------------------------------------


def test_teacher_and_student_share_tokens_and_template(tmp_path, source, folder):
    task = Instructions(source)
    same = task.load(ModelSpec(path=folder), 0, folder)
    assert same.tokenizer is task.load(ModelSpec(hidden_size=8, heads=2), 0, folder).tokenizer
    changed = letters.tokenizer(letters.CHAT.replace("user", "human").replace("\n", " "))
    letters.model(changed).save(tmp_path / "template")
    with pytest.raises(ValueError, match="another chat template than its teacher"):
        task.load(ModelSpec(path=str(tmp_path / "template")), 0, folder)
    Instructions(source, template="plain").load(ModelSpec(path=str(tmp_path / "template")), 0, folder)
    Instructions(source, tokenizer=folder).load(ModelSpec(path=str(tmp_path / "template")), 0, folder)


def test_a_model_that_reads_other_tokens_is_measured_alone(tmp_path, source, folder):
    task = Instructions(source, held_out=0.3, max_response=16, continuations=3)
    reference = opened(task, folder)
    letters.model(letters.tokenizer(marks=letters.MARKS[::-1])).save(tmp_path / "other")
    model = task.load(ModelSpec(path=str(tmp_path / "other")), 0, folder)
    result = task.evaluate(model, reference, {"KL()": KL()}, seed=0)
    assert result["divergences"] == {} and {"KL()", "teacher agreement"}.isdisjoint(result["scalars"])
    alone = task.evaluate(model, model, {"KL()": KL()}, seed=0)
    for name in ("perplexity", "entropy", "ece", "distinct-2", "finished"):
        assert result["scalars"][name] == alone["scalars"][name]


def test_a_writer_with_another_tokenizer_than_the_prompts_is_refused(tmp_path, source, folder):
    task = Instructions(source, max_response=3)
    opened(task, folder)
    prompts = task.prompts(2, generator())
    other = letters.model(letters.tokenizer(marks=letters.MARKS[::-1]))
    with pytest.raises(ValueError, match="the writer has another tokenizer"):
        task.answer(other, prompts, uniform(2, 3), Decoding())


def test_prompts_without_a_model_need_the_tokenizer_named(source, folder):
    with pytest.raises(ValueError, match=r"write Instructions\(tokenizer=...\)"):
        Instructions(source, max_prompt=99).prompts(1, generator())
    named = Instructions(source, max_prompt=99, tokenizer=folder)
    assert named.data("train", 3, generator()).ids.equal(
        named.responses(letters.model(READS), 3, generator()).ids
    )


def test_what_is_learned_includes_when_to_stop(tmp_path):
    rows = [{"prompt": f"{n}?", "response": f"{n}{n}!"} for n in range(3)]
    other = write(tmp_path / "b.jsonl", [{"prompt": "x", "response": "y"}])
    task = Instructions(str(write(tmp_path / "a.jsonl", rows)), held_out=str(other), max_response=9)
    model = letters.model(READS, width=32)
    text = task.responses(model, 3, generator())
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=0.01)
    for _ in range(60):
        SFT()(log_q=model.token_log_probs(*text)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = unanswered([s.prompt for s in split(task, READS).train])
    greedy = task.answer(model, prompts, uniform(3, 9), Decoding(temperature=0))
    assert [READS.decode(i[m]) for i, m in zip(*greedy, strict=True)] == [
        "00!<|end|>",
        "11!<|end|>",
        "22!<|end|>",
    ]


# -- measurement ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 100_000])
def test_numbers_are_means_over_held_out_tokens_whatever_the_lengths(source, folder, rows, monkeypatch):
    monkeypatch.setattr("fdiv.tasks.measurement.ROWS", rows)
    rows_of_data = [row | {"response": row["response"] * (1 + n % 3)} for n, row in enumerate(sums())]
    path = str(write(Path(source), rows_of_data))
    task = Instructions(path, held_out=0.3, max_response=40, continuations=3)
    reference, model = opened(task, folder), letters.model(READS, seed=1)
    result = task.evaluate(model, reference, {"KL()": KL()}, seed=0)
    nll, kl, agree = [], [], []
    with torch.no_grad():
        for sample in split(task, READS).held_out:  # one at a time, without padding
            ids = torch.cat(sample[:2])[None]
            mask = torch.arange(ids.shape[1])[None] >= len(sample.prompt)
            log_p, log_q = (m.log_softmax(ids, mask) for m in (reference, model))
            nll += (-log_q.gather(1, sample.response[:, None])).flatten().tolist()
            kl += KL()(log_p, log_q).tolist()
            agree += (log_p.argmax(1) == log_q.argmax(1)).float().tolist()
    mean = {name: torch.tensor(values).double().mean().item() for name, values in
            (("nll", nll), ("kl", kl), ("agree", agree))}  # fmt: skip
    scalars = result["scalars"]
    assert scalars["perplexity"] == pytest.approx(torch.tensor(mean["nll"]).exp().item(), rel=1e-4)
    assert scalars["KL()"] == pytest.approx(mean["kl"], rel=1e-4)
    assert scalars["teacher agreement"] == pytest.approx(mean["agree"], abs=1e-6)
    assert sum(b["weight"] for b in result["calibration"]["bins"]) == pytest.approx(1)


def test_the_evaluation_says_what_the_report_reads(source, folder):
    task = Instructions(source, held_out=0.3, max_response=8, continuations=5, solution="sum")
    model = opened(task, folder)
    result = task.evaluate(model, model, {"KL()": KL()}, seed=0)
    corpus = {"perplexity", "teacher agreement", "entropy", "teacher NLL of samples", "distinct-2", "ece"}
    own = {"response tokens", "finished", "pass@1"}
    assert result["scalars"].keys() == corpus | own | {"ece_null", "KL()"}
    assert result["scalar_errors"].keys() == result["scalars"].keys() - {"distinct-2", "ece_null"}
    assert result["divergences"]["KL()"] == pytest.approx(0, abs=1e-6)
    assert result["scalars"]["teacher agreement"] == 1
    assert 1 <= result["scalars"]["response tokens"] <= 8
    sample = result["samples"][0]
    assert [x.split("]")[0] for x in sample["outputs"]] == ["[greedy", "[sampled"]
    assert sample["valid"] == [False, False]
    assert json.loads(json.dumps(result)) == result
    unsolved = Instructions(source, held_out=0.3, max_response=8, continuations=5)
    assert "pass@1" not in unsolved.evaluate(opened(unsolved, folder), model, {}, seed=0)["scalars"]


# -- recipes ----------------------------------------------------------------------------------------------


def test_a_task_is_what_its_notation_says():
    task = Instructions("a/b:main:test", template="Q: {prompt}\nA: ", solution="answer", held_out="c/d")
    assert parse(repr(task), ["fdiv.tasks.all"]) == task


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "fancy"}, "'chat', 'plain' or a text with {prompt}"),
        ({"template": "plain", "system": "x"}, "need template='chat'"),
        ({"messages": "m", "prompt": "p"}, "not both"),
        ({"held_out": 1.5}, "a fraction between 0 and 1, or a source, got 1.5"),
        ({"vocabulary": "half"}, "'corpus' or 'full'"),
        ({"hint": "no fields"}, "hint is a text with"),
        ({"max_response": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused_with_what_is_allowed(options, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        Instructions("a.jsonl", **options)


def test_data_that_do_not_fit_are_refused_with_what_is_there(tmp_path, source):
    with pytest.raises(ValueError, match=r"no field 'question'.*\['prompt', 'response', 'sum'\]"):
        split(Instructions(source, prompt="question"), READS)
    with pytest.raises(ValueError, match=r"asks for 'topic'; a record has"):
        split(Instructions(source, template="{topic}: {prompt}"), READS)
    with pytest.raises(ValueError, match="has no chat template"):
        split(Instructions(source), letters.tokenizer(template=None))
    with pytest.raises(ValueError, match="has no end-of-text token"):
        split(Instructions(source, template="plain"), letters.tokenizer(eos=None))
    with pytest.raises(ValueError, match="begins a conversation otherwise"):
        split(Instructions(source), letters.tokenizer(letters.CHAT.replace("<|start|>a", "<|start|>A")))
    with pytest.raises(ValueError, match="1 samples to train on and 0 held out"):
        split(Instructions(str(write(tmp_path / "one.jsonl", sums(1)))), READS)
    with pytest.raises(ValueError, match="a turn has a role and a content"):
        split(Instructions(str(write(tmp_path / "m.jsonl", [{"m": [{"role": 1}]}])), messages="m"), READS)
    with pytest.raises(ValueError, match="Instructions has data 'train', got 'test'"):
        Instructions(source).data("test", 1, generator())
