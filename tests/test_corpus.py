"""The corpus task, on a tiny Llama with a tokenizer of its own: from text files to a trained student."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from fdiv import GKD, JS, KL, FusedLinear
from fdiv.adapters.transformers import CausalLM, keep_layers
from fdiv.compare import compare
from fdiv.feeds.responses import Responses
from fdiv.feeds.signals import kept
from fdiv.parallel import World
from fdiv.recipe import ModelSpec, TrainSpec, load, measures, members
from fdiv.sample._sampler import Decoding
from fdiv.tasks.sources import documents
from fdiv.tasks.text import Corpus, separate, split

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "two", "dogs", "ran", "round", "old", "trees", "and"]
SPARE = ["never", "written", "anywhere"]  # in the tokenizer, not in the corpus
MEASURES = {"KL()": KL(), "JS(0.5)": JS(0.5)}


def lines(count: int = 24) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(WORDS), (count, 40), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in draws]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A folder with a random Llama of four layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *SPARE, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    model = CausalLM.fresh(len(vocabulary), hidden_size=16, layers=4, heads=2, seed=0)
    with torch.no_grad():  # far enough from uniform to be worth learning
        model.model.lm_head.weight.mul_(20)
    CausalLM(model.model, tokenizer=tokenizer).save(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for n, line in enumerate(lines()):
        (folder / f"{n:03}.txt").write_text(line)
    return folder


@pytest.fixture
def task(texts) -> Corpus:
    return Corpus(str(texts), block=8, held_out=0.2, continuations=6)


def opened(task: Corpus, teacher: Path, **spec) -> CausalLM:
    spec = spec or {"path": str(teacher)}
    model = task.load(ModelSpec(**spec), 0, teacher)
    model.model.eval().requires_grad_(False)
    return model


def predicted(ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    return mask


# -- the text ---------------------------------------------------------------------------------------------


def test_text_json_and_parquet_give_the_same_documents(texts, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in [*lines(), " "]))
    parquet.write_table(pyarrow.table({"body": lines()}), tmp_path / "a.parquet")
    wanted = documents(str(texts), "text")
    assert wanted == lines()
    assert documents(str(tmp_path / "a.jsonl"), "body") == wanted
    assert documents(str(tmp_path / "a.parquet"), "body") == wanted
    assert documents(str(tmp_path), "body", limit=3) == wanted[:3]


def test_the_manual_of_python_is_a_source():
    assert len(documents("pydoc", "text")) > 50


def test_a_missing_field_or_file_is_named(texts, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"no text field 'text'.*\['body'\]"):
        documents(str(tmp_path / "a.jsonl"), "text")
    with pytest.raises(FileNotFoundError, match=r"no text at .*nowhere\.txt"):
        documents(str(tmp_path / "nowhere.txt"), "text")


def test_held_out_documents_are_not_trained_on():
    train, held_out = separate([*lines(), *lines()[:6]], 0.2)
    assert set(train) | set(held_out) == set(lines())
    assert not set(train) & set(held_out)
    assert 0.1 < len(set(held_out)) / len(lines()) < 0.3


def test_of_a_single_document_the_end_is_held_out():
    train, held_out = separate(["0123456789"], 0.2)
    assert (train, held_out) == (["01234567"], ["89"])


def test_the_split_is_the_same_every_time_and_all_blocks_are_full(task, teacher):
    first, second = (split(task, AutoTokenizer.from_pretrained(teacher)) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert first.train.shape[1] == first.held_out.shape[1] == task.block
    assert first.vocabulary.tolist() == sorted({1, *range(2 + len(SPARE), 2 + len(SPARE) + len(WORDS))})


def test_too_little_text_is_refused(teacher, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat")
    with pytest.raises(ValueError, match="0 blocks to train on"):
        split(Corpus(str(tmp_path)), AutoTokenizer.from_pretrained(teacher))


def test_examples_are_at_most_the_blocks_there_are(task, teacher):
    model = opened(task, teacher)
    blocks = split(task, model.tokenizer).train
    text = task.responses(model, 10_000, torch.Generator().manual_seed(0))
    assert sorted(text.ids.tolist()) == sorted(blocks.tolist())
    assert text.mask[:, 1:].all() and not text.mask[:, 0].any()


def test_rollouts_continue_training_blocks(task, teacher):
    model = opened(task, teacher)
    text = task.rollouts(model, 3, 2, torch.Generator().manual_seed(0))
    beginnings = split(task, model.tokenizer).train[:, :2].tolist()
    assert all(row in beginnings for row in text.ids[:, :2].tolist())
    assert text.ids.shape == (6, 8) and text.mask.sum(1).tolist() == [6] * 6
    assert torch.isin(text.ids, model.vocabulary).all()


def test_beginnings_of_blocks_are_prompts_and_each_is_continued_by_its_own_draws(task, teacher):
    model = opened(task, teacher)
    prompts = task.prompts(5, torch.Generator().manual_seed(0))  # in the tokens of the model opened last
    assert all(row in split(task, model.tokenizer).train[:, :2].tolist() for row in prompts.ids.tolist())
    draws = torch.rand(5, task.answer_length, dtype=torch.float64)
    text = task.answer(model, prompts, draws, Decoding())
    alone = task.answer(model, prompts.rows(slice(3, 4)), draws[3:4], Decoding())
    assert alone.ids[0].equal(text.ids[3]) and alone.mask[0].tolist() == [False] * 2 + [True] * 6


# -- the models -------------------------------------------------------------------------------------------


def test_a_student_from_all_layers_is_the_teacher(task, teacher):
    ids = split(task, AutoTokenizer.from_pretrained(teacher)).train[:2]
    whole, same = opened(task, teacher), opened(task, teacher, keep_layers=[0, 1, 2, 3])
    torch.testing.assert_close(same.log_softmax(ids, predicted(ids)), whole.log_softmax(ids, predicted(ids)))


def test_a_student_keeps_the_named_layers_and_all_else(task, teacher):
    whole, student = (m.model for m in (opened(task, teacher), opened(task, teacher, keep_layers=[0, 3])))
    assert student.config.num_hidden_layers == 2
    for mine, theirs in zip(student.model.layers, [whole.model.layers[i] for i in (0, 3)], strict=True):
        for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert a.equal(b), name
    assert student.lm_head.weight.equal(whole.lm_head.weight)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]


def test_layers_that_are_not_there_are_refused(task, teacher):
    with pytest.raises(ValueError, match="indices from 0 to 3"):
        opened(task, teacher, keep_layers=[0, 4])
    other = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none"):
        keep_layers(other, [0])


def test_a_fresh_student_has_the_head_of_the_teacher(task, teacher):
    student = opened(task, teacher, hidden_size=8, heads=2)
    assert len(student.head) == len(opened(task, teacher).head)


def test_the_restricted_vocabulary_is_the_conditional_distribution(task, teacher):
    restricted = opened(task, teacher)
    full = opened(Corpus(task.source, block=8, held_out=0.2, vocabulary="full"), teacher)
    ids = split(task, restricted.tokenizer).train[:3]
    log_p = full.log_softmax(ids, predicted(ids))[:, restricted.vocabulary]
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(restricted.log_softmax(ids, predicted(ids)), log_p)
    labels = restricted.labels(ids, predicted(ids))
    assert restricted.vocabulary[labels].equal(ids[:, 1:].flatten())


def test_generation_with_a_cache_agrees_with_the_whole_sequence(task, teacher):
    model = opened(task, teacher, keep_layers=[1, 3])
    ids = model.sample(split(task, model.tokenizer).held_out[:4, :2], 6)
    log_q = model.log_softmax(ids, predicted(ids)).reshape(4, 7, -1)
    assert model.vocabulary[log_q[:, 1:].argmax(-1)].equal(ids[:, 2:])


def test_models_that_cap_their_logits_are_sampled_and_measured_with_the_cap():
    config = Gemma2Config(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.1,
    )
    model = CausalLM(Gemma2ForCausalLM(config).eval())
    ids = model.sample(torch.tensor([[3, 4]]), 5)
    log_q = model.log_softmax(ids, predicted(ids))
    assert log_q[1:].argmax(-1).equal(ids[0, 2:])
    assert log_q.max() - log_q.min() < 0.2 + 1e-6
    with pytest.raises(ValueError, match="estimator that sees logits"):
        model.head  # noqa: B018


def test_a_package_that_is_not_installed_is_named_with_its_install_line():
    with pytest.raises(ImportError, match="pip install --no-deps some-weights"):
        CausalLM.load("package:some_weights")


# -- the teacher's signal ---------------------------------------------------------------------------------


def signal_of(task, reference, cache):
    method = GKD(divergence=KL(), estimator=FusedLinear())
    feed = Responses(method, task, reference, TrainSpec(examples=20), 0, World(), cache=cache)
    return feed.signals.stored["p_hidden"]


def test_cached_hidden_states_are_the_fresh_ones(task, teacher, tmp_path, monkeypatch):
    reference = opened(task, teacher)
    fresh = signal_of(task, reference, None)
    first = signal_of(task, reference, tmp_path)
    monkeypatch.setattr(CausalLM, "hidden", None)  # from now on nothing can be computed
    again = signal_of(task, reference, tmp_path)
    assert first.equal(fresh) and again.equal(fresh)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_the_cache_of_another_model_or_text_is_not_used(task, teacher, tmp_path):
    reference = opened(task, teacher)
    signal_of(task, reference, tmp_path)
    with torch.no_grad():
        reference.model.model.norm.weight[0] += 1
    other = signal_of(task, reference, tmp_path)
    assert other.equal(signal_of(task, reference, None))
    shorter = Corpus(task.source, block=9, held_out=0.2)
    assert len(signal_of(shorter, reference, tmp_path)) % 8 == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_made_again(tmp_path):
    file = tmp_path / "part.safetensors"
    rows = torch.arange(6.0).reshape(2, 3)
    kept(file, lambda: {"rows": rows})
    file.write_bytes(file.read_bytes()[:-5])
    assert kept(file, lambda: {"rows": rows + 1})["rows"].equal(rows + 1)
    assert kept(file, lambda: {"rows": rows})["rows"].equal(rows + 1)


# -- training and measurement -----------------------------------------------------------------------------


def test_the_evaluation_says_what_the_report_reads(task, teacher):
    reference, student = opened(task, teacher), opened(task, teacher, keep_layers=[0, 3])
    result = task.evaluate(student, reference, MEASURES, seed=0)
    assert result["exact"] is False
    wanted = {"perplexity", "teacher agreement", "entropy", "teacher NLL of samples", "distinct-2"}
    assert result["scalars"].keys() == wanted | {"ece", "ece_null", *MEASURES}
    assert result["divergences"] == {name: result["scalars"][name] for name in MEASURES}
    assert result["scalar_errors"].keys() < result["scalars"].keys()
    assert all(error >= 0 for error in result["scalar_errors"].values())
    assert sum(b["weight"] for b in result["calibration"]["bins"]) == pytest.approx(1)
    assert len(result["samples"]) == 4
    assert all(len(s["outputs"]) == 2 and s["valid"] is None for s in result["samples"])
    assert json.loads(json.dumps(result)) == result


def test_evaluation_in_parts_is_the_mean_over_all_held_out_tokens(task, teacher, monkeypatch):
    monkeypatch.setattr("fdiv.tasks.measurement.ROWS", 16)
    reference, student = opened(task, teacher), opened(task, teacher, keep_layers=[0, 3])
    result = task.evaluate(student, reference, MEASURES, seed=0)
    ids = split(task, reference.tokenizer).held_out
    log_p, log_q = (m.log_softmax(ids, predicted(ids)) for m in (reference, student))
    for name, divergence in MEASURES.items():
        assert result["scalars"][name] == pytest.approx(divergence(log_p, log_q).mean().item(), rel=1e-5)
    nll = -student.token_log_probs(ids, predicted(ids)).mean()
    assert result["scalars"]["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-5)


def test_the_reference_is_at_distance_zero_from_itself(task, teacher):
    reference = opened(task, teacher)
    result = task.evaluate(reference, reference, MEASURES, seed=0)
    assert all(value == pytest.approx(0, abs=1e-6) for value in result["divergences"].values())
    assert result["scalars"]["teacher agreement"] == 1


def test_the_shipped_recipe_claims_and_shows_what_is_measured(task, teacher):
    shipped = load(Path(__file__).parents[1] / "recipes" / "distill" / "smollm2.yaml")
    model = opened(task, teacher)
    known = task.evaluate(model, model, measures(shipped), seed=0)["scalars"]
    labels = {shipped.reference.label, *(m.label for m in members(shipped))}
    report = shipped.report
    assert {*report.table, *report.better, report.frontier["x"], report.frontier["y"]} <= known.keys()
    assert all({c[side][0] for side in ("left", "right")} <= labels for c in report.expect)
    assert all({c[side][1] for side in ("left", "right")} <= known.keys() for c in report.expect)


def recipe(texts: Path, teacher: Path, folder: Path) -> Path:
    text = f"""
name: tiny
task: Corpus("{texts}", block=8, held_out=0.2, continuations=6)
reference: {{model: {{path: "{teacher}"}}}}
student: {{keep_layers: [0, 3]}}
method: GKD(estimator=FusedLinear())
divergences: [KL(), JS(0.5)]
baselines: [{{label: untrained student}}]
train: {{steps: 30, batch_size: 8, examples: 100, learning_rate: 0.02, precision: bfloat16}}
report: {{better: {{"JS(0.5)": lower}}}}
"""
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def test_a_comparison_trains_students_that_load_and_are_closer(texts, teacher, tmp_path):
    path = recipe(texts, teacher, tmp_path)
    (chapter,), failures = compare([path], tmp_path / "runs")
    assert not failures
    folder = chapter / "seed-0"
    found = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/evaluation.json")}
    assert found.keys() == {"teacher", "untrained-student", "kl", "js-0.5"}
    untrained = found["untrained-student"]
    assert (untrained["role"], untrained["method"], untrained["steps"]) == ("reference", None, 0)
    for slug, name in (("kl", "KL()"), ("js-0.5", "JS(0.5)")):
        assert found[slug]["scalars"][name] < 0.8 * untrained["scalars"][name]
        student = AutoModelForCausalLM.from_pretrained(folder / slug / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / slug / "model")
        ids = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
        assert student(input_ids=ids).logits.shape == (1, 3, len(tokenizer))
        assert '"entropy"' in (folder / slug / "metrics.jsonl").read_text()
    assert len(list((folder / "teacher" / "signal").iterdir())) == 1  # shared by both


def test_what_is_validated_on_is_not_trained_on(task, teacher):
    reference = opened(task, teacher)
    draws = [torch.Generator().manual_seed(n) for n in range(2)]
    seen, unseen = task.responses(reference, 999, draws[0]), task.held_out_responses(reference, 999, draws[1])
    assert len(unseen.ids) and not {tuple(r) for r in seen.ids.tolist()} & {
        tuple(r) for r in unseen.ids.tolist()
    }
