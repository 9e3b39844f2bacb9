"""The writing of trees: what is kept, what is drawn anew and from where, whoever writes it."""

import json
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("transformers")
from tests.tasks import letters
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds import branching, continuing, feed_of
from fdiv.feeds.branching import branched
from fdiv.methods.rl.rose import ROSE
from fdiv.parallel import World
from fdiv.recipe import ModelSpec, TrainSpec
from fdiv.sample._sampler import Decoding
from fdiv.sample.branching import Branching, Dispersion, SemanticEntropy, semantic_entropy, token_entropy
from fdiv.sample.clustering import Overlap, SameAnswer
from fdiv.tasks._task import Text
from fdiv.tasks.grammar import Grammar
from fdiv.tasks.instructions import Instructions
from fdiv.tasks.padding import rows_of
from fdiv.tasks.prompting import uniform

TASK = Grammar(symbols=6, successors=3, length=6, questions=6, trained_on=5)
SIZE, GROUPS = 5, 4
MEASURES = [Dispersion(4), SemanticEntropy(SameAnswer(), 3, 2), SemanticEntropy(Overlap(1, 0.4), 3, 4)]
each_measure = pytest.mark.parametrize("measure", MEASURES, ids=repr)


@pytest.fixture(scope="module")
def model():
    found = CausalLM.fresh(TASK.vocab_size, 16, 1, 2, seed=3)
    with torch.no_grad():  # far from uniform, so that places differ
        found.model.lm_head.weight.mul_(20)
    found.model.requires_grad_(False)
    return found


def feed(plan, task, reference, world=None, size=SIZE, groups=GROUPS):
    spec = TrainSpec(batch_size=size * groups, group_size=size, examples=32)
    return feed_of(ROSE())(
        ROSE(beta=0.0, branching=plan), task, reference, spec, 0, world or World(device="cpu")
    )


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def written(plan, model, task=TASK, world=None, groups=GROUPS):
    """(text, parent, branch) of a step."""
    own = feed(plan, task, model, world, groups=groups)
    prompts = task.prompts(groups, generator(1))
    text, more = branched(own, model, prompts, generator())
    return text, more["parent"], more["branch"]


def answers_of(text: Text) -> list[list[Tensor]]:
    """Tokens, group by group."""
    rows = [ids[mask] for ids, mask in zip(*text, strict=True)]
    return [rows[n : n + SIZE] for n in range(0, len(rows), SIZE)]


def same(one, other):
    for a, b in zip(answers_of(one[0]), answers_of(other[0]), strict=True):
        assert [row.tolist() for row in a] == [row.tolist() for row in b]
    assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


# -- what is kept, and what is new --------------------------------------------------------------------------


@each_measure
def test_an_answer_keeps_its_parents_prefix_and_is_made_of_its_own_draws_from_there(model, measure):
    plan = Branching(first=2, epsilon=0.3, measure=measure)
    text, parent, branch = written(plan, model)
    assert text.ids.shape == (SIZE * GROUPS, 3 + TASK.length) and text.mask[:, 3:].all()
    prompts = TASK.prompts(GROUPS, generator(1)).ids
    assert torch.equal(text.ids[:, :3], prompts.repeat_interleave(SIZE, 0))
    draws = uniform(SIZE * GROUPS, TASK.length, generator())
    assert (branch > 0).sum() > 3 and ((branch > 0) == (parent >= 0)).all()
    assert (parent < torch.arange(SIZE).repeat(GROUPS)).all()
    assert (parent.reshape(GROUPS, SIZE)[:, :2] == -1).all()
    for n, (over, kept) in enumerate(zip(parent.tolist(), branch.tolist(), strict=True)):
        start = text.ids[n : n + 1, : 3 + kept]
        if over >= 0:
            assert torch.equal(start, text.ids[n - n % SIZE + over, : 3 + kept].unsqueeze(0))
        anew = model.sample(start, TASK.length - kept, draws=draws[n : n + 1, kept:])
        assert torch.equal(anew[0], text.ids[n])


@pytest.mark.parametrize("plan", [Branching(epsilon=1.0), Branching(first=SIZE)], ids=repr)
def test_without_branches_the_answers_are_those_of_independent_rollouts(model, plan):
    text, parent, branch = written(plan, model)
    prompts = Text(*(t.repeat_interleave(SIZE, 0) for t in TASK.prompts(GROUPS, generator(1))))
    expected = TASK.answer(model, prompts, uniform(SIZE * GROUPS, TASK.length, generator()), Decoding())
    assert torch.equal(text.ids, expected.ids) and torch.equal(text.mask, expected.mask)
    assert (parent == -1).all() and not branch.any()


def test_each_branch_is_at_the_most_open_place_of_all_answers_so_far(model):
    text, parent, branch = written(Branching(epsilon=0.0, measure=Dispersion(4)), model)
    log_probs = model.log_softmax(*text).reshape(len(text.ids), TASK.length, -1)
    embeddings = model.model.get_input_embeddings().weight
    scores = torch.stack([Dispersion(4)(rows, embeddings) for rows in log_probs])
    for n in range(len(text.ids)):
        group, number = n - n % SIZE, n % SIZE
        if number:
            so_far = scores[group : group + number]
            best = so_far.max()
            place = int((so_far.amax(0) >= best - 1e-6).nonzero()[0])
            assert int(branch[n]) == place
            if place:
                assert scores[group + int(parent[n]), place] >= best - 1e-6
    assert branch.unique().numel() > 2


def test_meanings_are_asked_for_at_the_likeliest_places_and_their_entropy_is_what_counts(model):
    asked = []

    def initials(answers):
        asked.append(answers)
        return [answer.ids[0] for answer in answers]

    plan = Branching(epsilon=0.0, measure=SemanticEntropy(initials, continuations=6, candidates=2))
    text, _, branch = written(plan, model, groups=1)
    first = text.rows(slice(0, 1))
    entropy = token_entropy(model.log_softmax(*first))
    places = (entropy[1:].argsort(descending=True)[:2] + 1).tolist()
    assert [len(answers[0].ids) for answers in asked[:2]] == [TASK.length - place for place in places]
    assert all(answer.text is None for answer in asked[0]) and len(asked[0]) == 6
    told = [float(semantic_entropy(torch.tensor([a.ids[0] for a in answers]))) for answers in asked[:2]]
    assert int(branch[1]) == places[told.index(max(told))] and told[0] != told[1]
    assert len(asked) == int((TASK.length - branch[:-1].clamp(min=1)).clamp(max=2).sum())


# -- whoever writes -----------------------------------------------------------------------------------------


@each_measure
def test_the_answers_do_not_depend_on_how_many_processes_write_them(model, measure):
    plan = Branching(epsilon=0.3, measure=measure)
    whole = written(plan, model)
    halves = [written(plan, model, world=World(rank, 2, "cpu")) for rank in range(2)]
    same(whole, (Text(*map(torch.cat, zip(*(h[0] for h in halves), strict=True))),
                 *(torch.cat([half[n] for half in halves]) for n in (1, 2))))  # fmt: skip
    assert (whole[2] > 0).any()


@each_measure
def test_nor_on_how_many_are_read_or_written_at_once(model, measure, monkeypatch):
    plan = Branching(epsilon=0.3, measure=measure)
    whole = written(plan, model)
    monkeypatch.setattr(branching, "READ_ROWS", 3)
    monkeypatch.setattr(branching, "ROWS", 2)
    same(whole, written(plan, model))


def test_another_seed_writes_another_tree(model):
    own = feed(Branching(), TASK, model)
    prompts = TASK.prompts(GROUPS, generator(1))
    one, other = (branched(own, model, prompts, generator(seed))[0].ids for seed in (1, 2))
    assert not torch.equal(one, other)


# -- answers of different lengths ---------------------------------------------------------------------------


@pytest.fixture
def sums(tmp_path):
    """(the task, a model that sometimes ends its answers)."""
    rows = [
        {"prompt": f"{a}+{a % 7}" + a // 20 * "!", "response": f"It is {a + a % 7}."} for a in range(10, 40)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reads = letters.tokenizer()
    letters.model(reads).save(tmp_path / "model")
    task = Instructions(str(tmp_path / "sums.jsonl"), max_response=12)
    model = task.reopen(str(tmp_path / "model"), ModelSpec(), 0)
    with torch.no_grad():
        model.model.lm_head.weight[reads.convert_tokens_to_ids("<|end|>")] *= 3
    model.model.eval().requires_grad_(False)
    return task, model


@pytest.mark.parametrize(
    "measure", [Dispersion(), SemanticEntropy(SameAnswer(r"\d+"), 2, 2), MEASURES[2]], ids=repr
)
def test_text_answers_end_within_their_room_and_keep_their_parents_prefix(sums, measure):
    task, model = sums
    plan = Branching(epsilon=0.2, measure=measure)
    text, parent, branch = written(plan, model, task)
    groups = answers_of(text)
    ends = {*model.ends, model.tokenizer.convert_tokens_to_ids("<|end|>")}
    assert (branch > 0).sum() > 3
    for n, (over, kept) in enumerate(zip(parent.tolist(), branch.tolist(), strict=True)):
        answer = groups[n // SIZE][n % SIZE].tolist()
        assert kept < len(answer) <= 12 and not ends & set(answer[:-1])
        assert answer[-1] in ends or len(answer) == 12
        if over >= 0:
            assert answer[:kept] == groups[n // SIZE][over][:kept].tolist()
    assert text.mask.sum(1).unique().numel() > 1
    rows = rows_of(task.prompts(GROUPS, generator(1)))
    for n, (ids, mask) in enumerate(zip(*text, strict=True)):
        assert ids[: int(mask.int().argmax())].tolist() == rows[n // SIZE].tolist()


def test_where_positions_are_few_the_same_is_written_in_smaller_batches(sums, monkeypatch):
    task, model = sums
    plan = Branching(epsilon=0.2)
    whole, calls = written(plan, model, task), []
    longest = int(max(len(row) for row in rows_of(task.prompts(GROUPS, generator(1))))) + 12
    monkeypatch.setattr(model.model.config, "max_position_embeddings", longest)
    plain = CausalLM.generate
    monkeypatch.setattr(CausalLM, "generate", lambda self, *a, **b: calls.append(1) or plain(self, *a, **b))
    same(whole, written(plan, model, task))
    assert len(calls) > SIZE


@dataclass(frozen=True)
class Silent(Grammar):
    """Its answers end before their first token."""

    def answer(self, model, prompts, draws, decoding):
        text = super().answer(model, prompts, draws, decoding)
        return Text(text.ids, torch.zeros_like(text.mask))


@each_measure
def test_answers_without_a_token_have_no_place_to_branch_off(model, measure):
    text, parent, branch = written(Branching(epsilon=0.0, measure=measure), model, Silent(**vars(TASK)))
    assert not text.mask.any() and (parent == -1).all() and not branch.any()


def test_a_begun_writer_looks_like_any_other(model):
    own = continuing.Continuing(model, [torch.tensor([1, 2]), torch.tensor([], dtype=torch.long)], model)
    assert own.tokenizer is model.tokenizer and own.ends == model.ends
    prompts, draws = TASK.prompts(2, generator()), uniform(2, TASK.length, generator())
    text = TASK.answer(own, prompts, draws, Decoding())
    assert text.ids[0, 3:5].tolist() == [1, 2]
    assert torch.equal(text.ids[1:], model.sample(prompts.ids[1:], TASK.length, draws=draws[1:]))


def test_too_many_first_answers_are_refused(model):
    with pytest.raises(ValueError, match="do not fit into groups of 5"):
        written(Branching(first=6), model)
