"""Text for methods that learn from examples: a predicted token is an example."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from tests.worlds import close, gradient
from torch.nn.functional import cross_entropy

from fdiv import KL
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds import Counts, Part
from fdiv.feeds.tokens import READABLE_OF_TEXT, Tokens
from fdiv.methods._method import Out, mean_over_tokens
from fdiv.methods.distill.sft import SFT
from fdiv.parallel import World
from fdiv.recipe import ModelSpec, TrainSpec
from fdiv.tasks._task import Text
from fdiv.tasks.grammar import Grammar

VOCAB = 23
EVERYTHING = ("labels", "q_hidden", "q_weight", "p_weight", "log_prior")


@dataclass(frozen=True)
class Asks:
    """A method that keeps what it is handed; its loss is the cross-entropy where it reads logits."""

    consumes: ClassVar[str] = "examples"
    divergence: ClassVar = KL()

    reads: tuple[str, ...] = ("logits", "labels")
    seen: list = field(default_factory=list, compare=False)

    def __call__(self, *, count, **tensors):
        self.seen.append(tensors | {"count": count})
        rows = cross_entropy(tensors["logits"], tensors["labels"], reduction="none")
        return Out(mean_over_tokens(rows, count=count), {})


@dataclass(frozen=True)
class Unspoken:
    """Without `reads`."""

    consumes: ClassVar[str] = "examples"

    def __call__(self, *, logits, labels, count):
        return Out(mean_over_tokens(-logits.log_softmax(-1).gather(-1, labels[:, None]), count=count), {})


@dataclass(frozen=True)
class Whole(Asks):
    unit: ClassVar[str] = "batch"


@dataclass(frozen=True)
class Both(Asks):
    teaches: ClassVar[str] = "both"


@dataclass(frozen=True)
class Given:
    """A task whose text is there already."""

    text: Text

    def responses(self, teacher, count, generator):
        return self.text


def text(sequences=6, length=9, vocab=VOCAB):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab, (sequences, length), generator=generator)
    place, ends = torch.arange(length), torch.randint(4, length + 1, (sequences, 1), generator=generator)
    return Text(ids * (place < ends), (place >= 2) & (place < ends))


def feed(method, given=None, reference=None, **train):
    given = text() if given is None else given
    spec = TrainSpec(batch_size=len(given.ids), examples=len(given.ids), **train)
    return Tokens(method, Given(given), reference, spec, 0, World())


def counts(parts):
    return Counts(*(sum(column) for column in zip(*(p.counts for p in parts), strict=True)))


@pytest.fixture(scope="module")
def model():
    return CausalLM.fresh(VOCAB, 16, 1, 2, 0)


@pytest.mark.parametrize("method", [Asks(), Unspoken()], ids=["logits and labels", "unspoken"])
def test_cross_entropy_of_its_tokens_as_examples_is_sft(model, method):
    part = Part(text())
    losses = [feed(m).loss(model, part, counts([part])).loss for m in (method, SFT())]
    torch.testing.assert_close(*losses)
    grads = [gradient(loss, *model.model.parameters()) for loss in losses]
    close(grads[0], grads[1], 1e-5)


def test_a_split_batch_adds_up_to_the_batch(model):
    part, method = Part(text()), Asks()
    parts = part.split(4)
    assert len({p.counts.tokens for p in parts}) == 2  # of different sizes
    whole = feed(method).loss(model, part, counts([part])).loss
    split = torch.stack([feed(method).loss(model, p, counts(parts)).loss for p in parts])
    torch.testing.assert_close(split.sum(), whole)


def test_rows_are_the_predicted_tokens_in_the_order_of_the_text(model):
    method, given = Asks(), text()
    feed(method).loss(model, Part(given), counts([Part(given)]))
    (seen,) = method.seen
    assert seen["count"] == given.mask.sum()
    assert torch.equal(seen["labels"], given.ids[given.mask])
    logits = model.model(input_ids=given.ids).logits
    torch.testing.assert_close(seen["logits"], logits[:, :-1][given.mask[:, 1:]])
    assert seen["logits"].requires_grad


@dataclass(frozen=True)
class Heads(Asks):
    """Reads everything but logits."""

    reads: tuple[str, ...] = EVERYTHING

    def __call__(self, *, count, **tensors):
        logits = tensors["q_hidden"] @ tensors["q_weight"].T
        return super().__call__(count=count, logits=logits, **tensors)


def test_hidden_states_and_head_make_the_logits_and_the_references_head_has_no_gradient(model):
    method, given, other = Heads(), text(), CausalLM.fresh(VOCAB, 8, 1, 2, 1)
    part = Part(given)
    loss = feed(method, reference=other).loss(model, part, counts([part])).loss
    torch.testing.assert_close(loss, feed(Asks()).loss(model, part, counts([part])).loss)
    (seen,) = method.seen
    assert seen.keys() == {*EVERYTHING, "logits", "count"}
    torch.testing.assert_close(seen["logits"], model.logits(*given))
    assert torch.equal(seen["p_weight"], other.head) and not seen["p_weight"].requires_grad
    assert seen["q_weight"].requires_grad and seen["q_hidden"].requires_grad


def test_the_log_prior_is_the_share_of_each_token_among_all_that_is_trained_on(model):
    method, given = Heads(), text()
    own = feed(method, reference=model)
    own.loss(model, Part(given.rows(slice(0, 2))), Counts(9.0, 2.0, 0.0, 0.0))
    prior = method.seen[0]["log_prior"]
    labels = given.ids[given.mask].tolist()
    for token in range(VOCAB):
        share = labels.count(token) / len(labels)
        assert prior[token].exp().item() == pytest.approx(share, abs=1e-7)
    assert prior[0] == -torch.inf  # padding, which is never predicted
    assert own._log_prior(model) is prior  # counted once


def test_a_restricted_vocabulary_numbers_labels_and_prior_by_its_own_places():
    given = Text(torch.tensor([[5, 9, 7, 9]]), torch.tensor([[False, True, True, True]]))
    model = CausalLM(CausalLM.fresh(VOCAB, 16, 1, 2, 0).model, vocabulary=torch.tensor([5, 7, 9]))
    method = Heads()
    feed(method, given, model).loss(model, Part(given), Counts(3.0, 1.0, 0.0, 0.0))
    assert method.seen[0]["labels"].tolist() == [2, 1, 2]
    assert method.seen[0]["log_prior"].exp().tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert method.seen[0]["q_weight"].shape == (3, 16)


@pytest.mark.parametrize("name", ["stages", "inputs", "index", "p_logits", "network", "memory", "progress"])
def test_what_a_text_has_not_is_refused_by_its_name(name):
    with pytest.raises(TypeError, match=rf"reads {name}, which a text has not; .*labels, log_prior, logits"):
        feed(Asks(("logits", "labels", name)))


def test_everything_on_the_menu_is_served(model):
    menu = [name for names in READABLE_OF_TEXT for name in names.split(", ")]
    assert {"logits", *EVERYTHING} == set(menu)


def test_logits_and_hidden_states_at_once_are_refused():
    with pytest.raises(TypeError, match="run the student twice"):
        feed(Asks(("logits", "labels", "q_hidden")))


def test_a_reference_that_is_asked_for_has_to_be_there():
    with pytest.raises(TypeError, match="head of a reference, and there is none"):
        feed(Heads())


def test_a_method_that_trains_its_teacher_is_refused():
    with pytest.raises(TypeError, match="trains its teacher too"):
        feed(Both())


def test_a_method_on_whole_batches_gets_them_whole_or_not_at_all(model):
    part = Part(text())
    assert feed(Whole(), micro_batch=6).loss(model, part, counts([part])).loss.isfinite()
    with pytest.raises(ValueError, match=r"batches whole: .*micro_batch"):
        feed(Whole(), micro_batch=3)


def test_without_a_predicted_token_the_loss_is_zero_and_finite(model):
    given = text()
    part = Part(Text(given.ids, torch.zeros_like(given.mask)))
    loss = feed(Asks()).loss(model, part, counts([part])).loss
    assert loss == 0
    assert not gradient(loss, *model.model.parameters()).any()


def test_grammar_text_is_learnt_from_as_examples():
    task = Grammar(symbols=5, successors=2, length=2, questions=8, trained_on=8)
    teacher = task.load(ModelSpec(hidden_size=8, layers=1, heads=2), 0)
    spec = TrainSpec(batch_size=16, examples=32, validate_every=1, validate_on=8)
    own = Tokens(Asks(), task, teacher, spec, 0, World())
    (part,) = own.parts(teacher, 0)
    assert own.loss(teacher, part, part.counts).loss.isfinite()
    (unseen,) = own.validation(teacher)
    assert own.loss(teacher, unseen, unseen.counts).loss.isfinite()
