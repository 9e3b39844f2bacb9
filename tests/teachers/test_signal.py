"""The contract: whose tokens, at which temperature, over which atoms."""

import pytest
import torch
from tests.adapters import tiny
from tests.teachers import small
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fdiv import Exact, FusedAtoms, FusedLinear, MonteCarlo, SampledLogits, TopK, Variational
from fdiv.adapters.transformers import CausalLM
from fdiv.teachers._signal import Source, Teacher, TeacherError, Terms, Vocabulary
from fdiv.teachers.all import Cached, Local, Served

OURS = Vocabulary(24, "a" * 64)


def other_words():
    """A tokenizer of as many tokens, two of which have changed places."""
    words = list(tiny.VOCABULARY)
    words[5], words[6] = words[6], words[5]
    table = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="<eos>")


def terms(support="TopK(k=8, support='teacher')", temperature=1.0):
    return Terms(OURS, temperature, support, "m")


def test_two_heads_of_one_tokenizer_padded_to_different_sizes_have_one_vocabulary():
    plain, padded = small.teacher(), small.teacher(2, padding=16)
    assert padded.rows == small.WORDS + 16
    assert Vocabulary.of(plain) == Vocabulary.of(padded)
    assert Vocabulary.of(plain).size == small.WORDS


def test_another_table_of_the_same_size_is_another_vocabulary():
    model = small.teacher()
    swapped = CausalLM(model.model, tokenizer=other_words())
    assert Vocabulary.of(swapped).size == Vocabulary.of(model).size
    assert Vocabulary.of(swapped).fingerprint != Vocabulary.of(model).fingerprint


def test_a_token_that_was_added_later_changes_the_vocabulary():
    added = tiny.tokenizer()
    added.add_tokens(["<tool>"])
    model = small.teacher(padding=1)
    assert Vocabulary.of(CausalLM(model.model, tokenizer=added)).size == small.WORDS + 1
    assert Vocabulary.of(CausalLM(model.model, tokenizer=added)) != Vocabulary.of(model)


def test_a_model_without_tokenizer_is_named_by_its_size():
    assert Vocabulary.of(CausalLM.fresh(13, 8, 1, 2, 0)) == Vocabulary(13, "unnamed-13")


def test_the_ids_that_a_model_is_restricted_to_are_part_of_its_vocabulary():
    model = small.teacher()
    some, others = (
        CausalLM(model.model, torch.tensor(ids), model.tokenizer) for ids in ([3, 5, 9], [3, 5, 8])
    )
    assert Vocabulary.of(some).size == 3
    assert len({Vocabulary.of(m).fingerprint for m in (model, some, others)}) == 3


@pytest.mark.parametrize("source", [Local(), Cached("x"), Served("http://localhost:8000/v1", "m")], ids=repr)
def test_a_source_is_a_frozen_object_that_its_repr_names(source):
    from fdiv.notation import parse

    assert isinstance(source, Source)
    assert parse(repr(source), ["fdiv.teachers.all"]) == source


def test_an_opened_source_is_a_teacher():
    assert isinstance(Local().open(Exact(), 1.0, small.teacher()), Teacher)


@pytest.mark.parametrize(
    ("support", "estimator"),
    [
        ("heads", FusedLinear()),
        ("heads", FusedLinear(of=TopK(3))),
        ("logits", Exact()),
        ("logits", TopK(3)),
        ("logits", SampledLogits(3)),
        ("labels", MonteCarlo()),
        ("TopK(k=8, support='teacher')", FusedAtoms(TopK(8))),
        ("TopK(k=8, support='teacher')", FusedAtoms(TopK(3))),
        ("SampledLogits(n=8, proposal='teacher')", FusedAtoms(SampledLogits(8, "teacher"))),
    ],
)
def test_a_signal_serves_the_estimators_that_read_what_it_holds(support, estimator):
    terms(support).require(estimator, OURS, 1.0)


@pytest.mark.parametrize(
    ("support", "estimator", "said"),
    [
        ("TopK(k=8, support='teacher')", FusedAtoms(TopK(9)), r"write estimator=FusedAtoms\(TopK\(k=8"),
        ("TopK(k=8, support='teacher')", Exact(), "whole vocabulary"),
        ("TopK(k=8, support='teacher')", FusedLinear(), "reads hidden states and a head"),
        ("SampledLogits(n=8, proposal='teacher')", FusedAtoms(SampledLogits(7, "teacher")), "n=8.*n=7"),
        ("heads", FusedAtoms(TopK(2)), r"write estimator=FusedLinear\(\)"),
        ("logits", FusedAtoms(TopK(2)), r"write estimator=Exact\(\)"),
        ("labels", Exact(), r"write estimator=MonteCarlo\(\)"),
        ("heads", FusedAtoms(SampledLogits(8)), r"write SampledLogits\(8, 'teacher'\)"),
        ("heads", Variational(), "no teacher gives"),
    ],
)
def test_another_support_is_refused_with_what_to_write(support, estimator, said):
    with pytest.raises(TeacherError, match=said):
        terms(support).require(estimator, OURS, 1.0)


def test_another_temperature_is_refused_but_for_hidden_states():
    with pytest.raises(TeacherError, match=r"made at temperature 1 and is read at 2.*cannot be tempered"):
        terms().require(FusedAtoms(TopK(8)), OURS, 2.0)
    terms(temperature=2.0).require(FusedAtoms(TopK(8)), OURS, 2.0)
    terms("heads").require(FusedLinear(), OURS, 2.0)


def test_another_vocabulary_is_refused_with_the_methods_for_two_tokenizers():
    with pytest.raises(TeacherError, match="ULD, GOLD, DSKD"):
        terms().require(FusedAtoms(TopK(8)), Vocabulary(24, "b" * 64), 1.0)
    with pytest.raises(TeacherError, match="one tokenizer, but heads of different size"):
        terms().require(FusedAtoms(TopK(8)), Vocabulary(23, "a" * 64), 1.0)
