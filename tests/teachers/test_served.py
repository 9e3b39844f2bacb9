"""A served teacher says what the local one says, or is refused."""

import math

import pytest
import torch
from tests.teachers import small
from tests.teachers.small import TEACHER, TOP, batches, local, opened
from tests.teachers.stub import serving
from tests.teachers.test_signal import other_words

from fdiv import Exact, FusedAtoms, FusedLinear, MonteCarlo, SampledLogits, TopK
from fdiv.adapters.transformers import CausalLM
from fdiv.teachers import _server
from fdiv.teachers._signal import TeacherError, Vocabulary
from fdiv.teachers.served import Served
from fdiv.teachers.write import write_cache


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(_server, "FIRST_WAIT", 0.01)


@pytest.fixture
def stub():
    with serving(TEACHER) as server:
        yield server


def source(stub, **options):
    return Served(stub.url, "served", **{"k": 20, "retries": 3, "timeout": 30.0} | options)


def teacher(stub, estimator=TOP, reference=TEACHER, temperature=1.0, **options):
    return source(stub, **options).open(estimator, temperature, reference)


# -- what comes back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator", [TOP, FusedAtoms(TopK(1)), FusedAtoms(TopK(20)), MonteCarlo()], ids=repr
)
def test_the_evidence_is_that_of_the_local_teacher(stub, estimator):
    some = small.text(12)
    found = teacher(stub, estimator)(*some)
    small.same(found.evidence, local(estimator)(*some).evidence, 1e-5)
    assert found.terms.support == local(estimator).terms.support
    found.terms.require(estimator, Vocabulary.of(TEACHER), 1.0)


def test_more_atoms_than_tokens_are_all_of_them(stub):
    stub.max_logprobs = 100
    some, many = small.text(3), FusedAtoms(TopK(90))
    found = teacher(stub, many, k=90)(*some).evidence
    small.same(found, local(many)(*some).evidence, 1e-5)
    assert found["log_p"].shape[1] == small.WORDS


def test_the_token_itself_is_no_atom_where_it_is_not_among_the_likeliest(stub):
    ids, mask = small.text(12)
    labels = ids[:, 1:][mask[:, 1:]].unsqueeze(-1)
    index = teacher(stub, FusedAtoms(TopK(2)))(ids, mask).evidence["index"]
    assert 0 < (index == labels).any(-1).sum() < len(labels)


def test_text_without_predicted_tokens_needs_no_request(stub):
    ids, mask = small.text()
    found = teacher(stub)(ids, mask & False).evidence
    assert {name: tuple(t.shape) for name, t in found.items()} == {"index": (0, 8), "log_p": (0, 8)}
    assert not stub.asked


def test_a_request_is_the_sequence_up_to_its_last_predicted_token_in_plain_sampling(stub):
    ids, mask = small.text(1)
    teacher(stub)(*small.wider(ids, mask, 3))
    (body,) = stub.asked
    assert body["prompt"] == ids[0, : int(mask[0].nonzero()[-1]) + 1].tolist()
    assert (body["max_tokens"], body["prompt_logprobs"], body["return_token_ids"]) == (1, 8, True)
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (1, 1, 0, 1)


def test_minus_infinity_arrives_as_such(stub):
    def empty(answer):
        entries = answer["choices"][0]["prompt_logprobs"][3]
        entries[min(entries, key=lambda name: entries[name]["logprob"])]["logprob"] = -9999.0
        return answer

    stub.spoil, stub.max_logprobs = empty, small.WORDS
    found = teacher(stub, FusedAtoms(TopK(small.WORDS)), k=small.WORDS)(*small.text(1)).evidence
    assert (found["log_p"] == -math.inf).sum(-1).tolist() == [1] + [0] * (len(found["log_p"]) - 1)


def test_a_cache_can_be_written_from_a_server(stub, tmp_path):
    text = small.text(12)
    manifest = write_cache(teacher(stub), batches(text), tmp_path)
    assert manifest.terms.model == "served"
    small.same(opened(tmp_path)(*text).evidence, local(TOP)(*text).evidence, 1e-5)


def test_a_padded_head_of_the_server_leaves_empty_places_and_is_said():
    padded = small.teacher(padding=16)
    ids, mask = small.text(6)
    every = FusedAtoms(TopK(small.WORDS))
    with serving(padded, max_logprobs=40) as stub:
        asked = teacher(stub, every, k=40)
        with pytest.warns(UserWarning, match="beyond the 24 of the vocabulary"):
            found = asked(ids, mask).evidence
    log_p = small.logits(padded, ids, mask).log_softmax(-1).float()
    assert (found["index"] < small.WORDS).all()
    held = found["log_p"] > -math.inf
    assert not held.all()
    expected = log_p.gather(-1, found["index"])
    torch.testing.assert_close(found["log_p"][held], expected[held], rtol=0, atol=1e-5)


# -- failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [[503], [500, 502, 429]])
def test_what_may_pass_is_tried_again(stub, fails):
    some = small.text(1)
    stub.fails = fails
    small.same(teacher(stub)(*some).evidence, local(TOP)(*some).evidence, 1e-5)
    assert not stub.fails


def test_a_timeout_is_tried_again(stub):
    some, asked = small.text(1), teacher(stub, timeout=0.5)
    stub.fails = [None]
    small.same(asked(*some).evidence, local(TOP)(*some).evidence, 1e-5)


def test_a_server_that_does_not_recover_is_given_up_with_a_sentence(stub):
    asked = teacher(stub)
    stub.fails = [503] * 99
    with pytest.raises(TeacherError, match=r"did not answer in 4 tries .status 503.*same command goes on"):
        asked(*small.text(1))
    assert len(stub.asked) == 4


def test_nobody_at_the_address_is_a_sentence():
    with pytest.raises(TeacherError, match=r"did not answer in 1 tries .ConnectError.*is the server up"):
        Served("http://127.0.0.1:9/v1", "served", retries=0).open(TOP, 1.0, TEACHER)


def test_more_than_the_servers_limit_is_refused_with_the_option_to_start_it_with(stub):
    with pytest.raises(TeacherError, match=r"status 400: .*21.*larger --max-logprobs"):
        teacher(stub, FusedAtoms(TopK(21)), k=21)(*small.text(1))
    assert len(stub.asked) == 1  # a mistake is not tried again


def test_a_key_is_read_from_the_environment_and_never_shown(monkeypatch):
    with serving(TEACHER, key="secret") as stub:
        with pytest.raises(TeacherError, match="api_key_env='NAME'"):
            teacher(stub)
        with pytest.raises(TeacherError, match="FDIV_TEST_KEY holds no key"):
            teacher(stub, api_key_env="FDIV_TEST_KEY")
        monkeypatch.setenv("FDIV_TEST_KEY", "secret")
        teacher(stub, api_key_env="FDIV_TEST_KEY")(*small.text(1))
        assert "secret" not in repr(source(stub, api_key_env="FDIV_TEST_KEY"))


def test_a_sequence_longer_than_the_servers_is_refused_before_it_is_sent(stub):
    stub.longest = 6
    with pytest.raises(TeacherError, match=r"exceed its limit of 6"):
        teacher(stub)(*small.text(12))
    assert not stub.asked


def test_a_model_that_is_not_served_is_refused_with_those_that_are(stub):
    with pytest.raises(TeacherError, match="serves served, not 'other'"):
        Served(stub.url, "other").open(TOP, 1.0, TEACHER)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda choice: choice.update(prompt_token_ids=[7] * len(choice["prompt_token_ids"])),
            "or other tokens",
        ),
        (lambda choice: choice["prompt_logprobs"].pop(), "the server scored"),
        (lambda choice: choice.pop("prompt_token_ids"), "without prompt_token_ids"),
        (lambda choice: choice.pop("prompt_logprobs"), "without prompt_logprobs"),
        (lambda choice: choice["prompt_logprobs"].insert(1, choice["prompt_logprobs"].pop()), "no log-prob"),
    ],
    ids=["other ids", "a place less", "no echo", "no scores", "shifted by one"],
)
def test_scores_that_belong_to_other_tokens_are_refused(stub, change, said):
    def spoil(answer):
        change(answer["choices"][0])
        return answer

    stub.spoil = spoil
    with pytest.raises(TeacherError, match=said):
        teacher(stub, FusedAtoms(TopK(1)))(*small.text(6))


def test_logits_in_place_of_log_probabilities_are_refused(stub):
    def raw(answer):
        for entries in filter(None, answer["choices"][0]["prompt_logprobs"]):
            for entry in entries.values():
                entry["logprob"] += 7.0
        return answer

    stub.spoil = raw
    with pytest.raises(TeacherError, match="--logprobs-mode raw_logprobs"):
        teacher(stub)(*small.text(1))


@pytest.mark.parametrize("answer", [b"<html>", {"choices": []}, {"object": "error"}])
def test_an_answer_of_another_form_is_a_sentence(stub, answer):
    asked = teacher(stub)
    stub.spoil = lambda _: answer
    with pytest.raises(TeacherError, match=r"something else than JSON|without `choices`"):
        asked(*small.text(1))


def test_tokens_named_by_their_text_are_refused(stub):
    def texts(answer):
        for n, entries in enumerate(answer["choices"][0]["prompt_logprobs"]):
            if entries:
                answer["choices"][0]["prompt_logprobs"][n] = {f"w{name}": e for name, e in entries.items()}
        return answer

    stub.spoil = texts
    with pytest.raises(TeacherError, match="names tokens by their text"):
        teacher(stub)(*small.text(1))


# -- what is refused -----------------------------------------------------------------------------------------


def test_another_temperature_is_refused(stub):
    with pytest.raises(TeacherError, match=r"at temperature 1 whatever it is asked, got 0\.5"):
        teacher(stub, temperature=0.5)


@pytest.mark.parametrize(
    "estimator", [Exact(), FusedLinear(), FusedAtoms(SampledLogits(5, "teacher"))], ids=repr
)
def test_what_a_server_cannot_give_is_refused_with_what_it_can(stub, estimator):
    with pytest.raises(TeacherError, match=r"write estimator=FusedAtoms\(TopK\(20\)\)"):
        teacher(stub, estimator)


def test_more_atoms_than_the_source_names_are_refused(stub):
    with pytest.raises(
        TeacherError, match=r"write Served\(..., k=30\), and start vLLM with --max-logprobs 30"
    ):
        teacher(stub, FusedAtoms(TopK(30)))


@pytest.mark.parametrize("tokenizes", ["/tokenize", "completions"])
def test_another_tokenizer_of_the_same_size_is_refused(tokenizes):
    refused = pytest.raises(TeacherError, match=r"tokenizer is not the student's.*ULD, GOLD, DSKD")
    with serving(TEACHER, tokenizer=other_words(), tokenizes=tokenizes) as stub, refused:
        teacher(stub)


def test_a_server_without_tokenize_is_asked_how_it_cuts_a_prompt():
    with serving(TEACHER, tokenizes="completions") as stub:
        teacher(stub)
        assert isinstance(stub.asked[0]["prompt"], str)


def test_a_server_that_cannot_tell_its_tokenizer_has_to_be_trusted_explicitly():
    with serving(TEACHER, tokenizes="nowhere") as stub:
        with pytest.raises(TeacherError, match=r"write Served\(..., trust_vocabulary=True\)"):
            teacher(stub)
        assert teacher(stub, trust_vocabulary=True).terms.vocabulary == Vocabulary.of(TEACHER)


def test_models_without_tokenizer_have_to_be_trusted_explicitly(stub):
    bare = CausalLM(TEACHER.model)
    with pytest.raises(TeacherError, match="have no tokenizer"):
        teacher(stub, reference=bare)
    some = small.text(2)
    found = teacher(stub, reference=bare, trust_vocabulary=True)(*some)
    small.same(found.evidence, local(TOP)(*some).evidence, 1e-5)
    assert found.terms.vocabulary.fingerprint == "unnamed-24"


def test_a_restricted_vocabulary_is_refused(stub):
    restricted = CausalLM(TEACHER.model, torch.arange(3, 9), TEACHER.tokenizer)
    with pytest.raises(TeacherError, match="restricted to 6 tokens"):
        teacher(stub, reference=restricted)


def test_without_a_local_model_there_is_nothing_to_check_the_tokenizer_against(stub):
    with pytest.raises(TeacherError, match="pass the student as reference"):
        teacher(stub, reference=None)


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"retries": -1}, {"concurrency": 0}, {"timeout": 0}, {"url": "localhost:8000"}]
)
def test_fields_that_cannot_be_are_refused(options):
    with pytest.raises(TeacherError, match="got"):
        Served(**{"url": "http://localhost:8000/v1", "model": "m"} | options)
