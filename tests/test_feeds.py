"""What a training step holds, and what it does not depend on."""

from dataclasses import dataclass

import pytest
import torch
from tests.estimate.test_fused_linear import PeakMemory

import fdiv
from fdiv import (
    FDPO,
    GKD,
    GRPO,
    JS,
    KD,
    PACED,
    TIP,
    TV,
    AdaptiveReplay,
    DistiLLM,
    Exact,
    FusedLinear,
    Offline,
    OnPolicyDistillation,
    SequenceFDistill,
)
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds import Counts, Part, feed_of
from fdiv.feeds.responses import Responses
from fdiv.methods._method import (
    READABLE,
    READABLE_IN_EXAMPLES,
    READABLE_IN_PAIRS,
    READABLE_IN_PATHS,
    READABLE_IN_ROLLOUTS,
    READABLE_IN_TWO,
)
from fdiv.parallel import Spread, World
from fdiv.recipe import TrainSpec
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Pairs, Text
from fdiv.tasks.grammar import Grammar
from fdiv.teachers.local import Local
from fdiv.train import accumulate

METHODS = (
    GKD(JS(0.3)),
    GKD(JS(0.3), FusedLinear(chunk=5)),
    KD(estimator=FusedLinear()),
    TIP(estimator=FusedLinear()),
    OnPolicyDistillation(discount=1.0),
    SequenceFDistill(TV()),
)


@dataclass(frozen=True)
class Given:
    """A task whose text is there already."""

    text: Text
    answer_length: int = 4

    def responses(self, teacher, count, generator):
        return self.text

    def prompts(self, count, generator):
        return Text(self.text.ids[:count, :2], torch.zeros(count, 2, dtype=torch.bool))

    def answer(self, model, prompts, draws, decoding):
        return self.text.rows(slice(0, len(prompts.ids)))


NEEDED = {"DRO": {"lam": 1.0}}  # what has no default


def methods():
    """Every exported method at its defaults."""
    members = [m for m in vars(fdiv).values() if isinstance(m, type) and hasattr(m, "consumes")]
    return [m(**NEEDED.get(m.__name__, {})) for m in members if m is not fdiv.Method]


def test_methods_read_what_the_menu_offers():
    menus = {"responses": (READABLE, READABLE_IN_TWO), "pairs": (READABLE_IN_PAIRS,)}
    menus |= {"tokens": (), "rollouts": (READABLE_IN_ROLLOUTS,), "examples": (READABLE_IN_EXAMPLES,)}
    menus |= {"paths": (READABLE_IN_PATHS,)}
    for method in methods():
        names = (names for menu in menus[method.consumes] for names in menu)
        menu = {name for several in names for name in several.split(", ")}
        assert set(getattr(method, "reads", ())) <= menu | {"q_hidden", "q_weight", "q_embedding"}, method


def test_every_method_has_a_feed():
    assert {feed_of(method).__name__ for method in methods()} == {
        "CrossTokenizer",
        "PairsFeed",
        "PathsFeed",
        "Responses",
        "Rollouts",
        "Tokens",
    }


def text(sequences, length, vocab):
    """Prompts and responses of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab, (sequences, length), generator=generator)
    place, ends = torch.arange(length), torch.randint(4, length + 1, (sequences, 1), generator=generator)
    starts = torch.randint(1, 4, (sequences, 1), generator=generator)
    return Text(ids * (place < ends), (place >= starts) & (place < ends))


def feed(method, given, teacher, **train):
    spec = TrainSpec(batch_size=2 * len(given.ids), examples=len(given.ids), signal="each step", **train)
    return Responses(method, Given(given), teacher, spec, 0, World())


def part(given):
    by_student = torch.arange(len(given.ids)) % 2 == 1
    return Part(given, {"place": torch.full((len(given.ids),), -1), "by_student": by_student})


def step(method, teacher, student, parts):
    """Loss and gradient of the global batch that these parts make up."""
    counts = Counts(*(sum(column) for column in zip(*(p.counts for p in parts), strict=True)))
    student.model.zero_grad()
    own = feed(method, parts[0].text, teacher)
    total = sum(own.loss(student, p, counts).loss for p in parts)
    total.backward()
    return total.detach(), torch.cat([p.grad.flatten() for p in student.model.parameters()])


@pytest.fixture(scope="module")
def models():
    return [CausalLM.fresh(23, 16, 1, 2, seed) for seed in (0, 1)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_padding_behind_the_text_changes_nothing(models, method):
    given = text(6, 9, 23)
    wider = Text(*(torch.nn.functional.pad(t, (0, 7)) for t in given))
    plain, padded = (step(method, *models, [part(t)]) for t in (given, wider))
    for one, two in zip(plain, padded, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, TIP)], ids=repr)
def test_uneven_micro_batches_add_up_to_the_batch(models, method):
    """TIP is left out: it ranks the tokens of a call."""
    given = text(6, 9, 23)
    whole = step(method, *models, [part(given)])
    parts = part(given)
    parts = [*parts.split(5)]
    split = step(method, *models, parts)
    for one, two in zip(whole, split, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_without_a_response_costs_nothing_and_harms_nothing(models):
    given = text(4, 9, 23)
    empty = Text(given.ids, torch.zeros_like(given.mask))
    whole = step(GKD(), *models, [part(given)])
    with_empty = step(GKD(), *models, [part(given), part(empty)])
    for one, two in zip(whole, with_empty, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7)


def test_a_step_with_a_large_vocabulary_never_holds_tokens_by_vocabulary():
    vocab, tokens = 151936, 128
    teacher, student = (CausalLM.fresh(vocab, 8, 1, 2, seed) for seed in (0, 1))
    ids = torch.randint(vocab, (4, tokens // 4 + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    method = GKD(JS(0.5), FusedLinear(chunk=16, compiled=False))
    with PeakMemory(floor=vocab) as seen:
        step(method, teacher, student, [part(Text(ids, mask))])
    assert seen.largest <= tokens * vocab / 2  # 43 rows, of which the entropy is told
    assert seen.peak < 4 * tokens * vocab  # all that is held at one time, gradients included, in bytes


GRAMMAR = Grammar(symbols=4, successors=2, length=2, questions=6, trained_on=5)


def test_a_replay_buffer_shares_its_memory_with_what_else_is_remembered():
    teacher, student = (CausalLM.fresh(GRAMMAR.vocab_size, 8, 1, 2, 0) for _ in range(2))
    method = DistiLLM(sampler=AdaptiveReplay(start=1.0, step=0, capacity=8))
    feed = Responses(method, GRAMMAR, teacher, TrainSpec(batch_size=4, examples=8), 0, World())
    feed.memory["teacher.weight"] = torch.zeros(1)
    for step in range(3):
        feed.parts(student, step)
    assert feed.replay.full and "teacher.weight" in feed.memory


def test_pass_rates_do_not_depend_on_how_many_prompts_are_answered_at_once(monkeypatch):
    teacher, student = (CausalLM.fresh(GRAMMAR.vocab_size, 8, 1, 2, 0) for _ in range(2))
    spec, found, answer = TrainSpec(batch_size=4, examples=32), [], Grammar.answer
    feeds = [Responses(PACED(), GRAMMAR, teacher, spec, 0, World()) for _ in range(2)]
    for rows, feed in zip((256, 2), feeds, strict=True):

        def counted(task, model, prompts, *others, most=rows):
            assert len(prompts.ids) <= most
            return answer(task, model, prompts, *others)

        monkeypatch.setattr(Grammar, "answer", counted)
        monkeypatch.setattr("fdiv.feeds.memory.READ_ROWS", rows)
        feed.passes.ask(feed, student)
        found.append(feed.memory["passes"])
    assert found[0].sum() > 0 and torch.equal(*found)


@dataclass(frozen=True)
class Uneven:
    """Prompts of two tokens whose answers are 1, 2, 3 and 4 long; the long ones are right."""

    answer_length: int = 4

    def prompts(self, count, generator):
        ids = torch.ones(count, 2, dtype=torch.long)
        return Text(ids, torch.zeros_like(ids).bool())

    def answer(self, model, prompts, draws, decoding):
        place, longest = torch.arange(6), 1 + torch.arange(len(prompts.ids)).unsqueeze(1) % 4
        return Text(torch.ones(len(longest), 6).long(), (place >= 2) & (place < 2 + longest))

    def verify(self, ids, mask):
        return (mask.sum(1) > 2).float()


def logged(feed, student, parts):
    alone = World(device="cpu")
    return accumulate(Spread(student.model, "ddp", alone), student, feed, parts)


@pytest.mark.parametrize("size", [None, 1, 3])
def test_the_logged_reward_is_the_mean_over_answers_in_whatever_micro_batches(size):
    teacher, student = (CausalLM.fresh(5, 8, 1, 2, 0) for _ in range(2))
    spec = TrainSpec(batch_size=8, group_size=4, micro_batch=size)
    feed = feed_of(GRPO())(GRPO(), Uneven(), teacher, spec, 0, World(device="cpu"))
    assert logged(feed, student, feed.parts(student, 0))["reward"] == pytest.approx(0.5)


@dataclass(frozen=True)
class Compared:
    """A task whose pairs are there already."""

    chosen: Text
    rejected: Text

    def pairs(self, reference, count, generator):
        return Pairs(self.chosen, self.rejected)


@pytest.mark.parametrize("size", [1, 3])
def test_logged_metrics_are_means_over_pairs_in_whatever_micro_batches(models, size):
    given, found = text(4, 9, 23), []
    assert len(given.mask.sum(1).unique()) > 1
    task = Compared(given, Text(given.ids * 5 % 23, given.mask.flip(0)))
    for micro in (None, size):
        spec = TrainSpec(batch_size=4, micro_batch=micro)
        feed = feed_of(FDPO())(FDPO(), task, models[0], spec, 0, World(device="cpu"))
        found.append(logged(feed, models[1], feed.mine(feed.pairs)))
    assert found[1] == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in found[0].items()}


def test_a_micro_batch_without_a_response_leaves_the_logged_numbers_finite(models):
    given, method = text(4, 9, 23), GKD(JS(0.3), FusedLinear())
    parts = [part(given), part(Text(given.ids, torch.zeros_like(given.mask)))]
    with_empty, alone = (logged(feed(method, given, models[0]), models[1], p) for p in (parts, parts[:1]))
    assert with_empty == {name: pytest.approx(value, rel=1e-5) for name, value in alone.items()}


@dataclass(frozen=True)
class Named(Local):
    name: str = ""


def test_what_is_kept_of_one_source_is_not_read_for_another(models, tmp_path):
    """A cache may hold the same teacher in half precision."""
    given, files = text(4, 9, 23), []
    for name in ("one", "two"):
        spec = TrainSpec(batch_size=4, examples=4, signal="once")
        method = GKD(estimator=FusedLinear())
        Responses(method, Given(given), models[0], spec, 0, World(), source=Named(name), cache=tmp_path)
        files.append(len(list(tmp_path.iterdir())))
    assert files == [1, 2]


def test_a_dataset_is_not_decoded():
    with pytest.raises(ValueError, match="nobody writes"):
        Offline(Decoding(temperature=0))


def test_under_autocast_the_entropy_is_told_of_logits_in_float32(models):
    given, told = text(6, 9, 23), []
    for estimator in (Exact(), FusedLinear()):
        with torch.autocast("cpu", torch.bfloat16):
            one, batch = part(given), part(given).counts
            told.append(feed(GKD(estimator=estimator), given, models[0]).loss(models[1], one, batch).metrics)
    assert told[1]["entropy"].item() == pytest.approx(told[0]["entropy"].item(), rel=1e-6)


def test_a_validation_that_processes_cannot_share_is_refused_before_training(models):
    with pytest.raises(ValueError, match="256 sequences cannot be shared evenly by 3"):
        Responses(GKD(), GRAMMAR, models[0], TrainSpec(validate_every=9), 0, World(size=3))
