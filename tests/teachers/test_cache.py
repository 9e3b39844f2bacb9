"""A cache says what the teacher said, of the same samples alone, or it is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from tests.teachers import small
from tests.teachers.small import TEACHER, TOP, batches, cache, local, opened

from fdiv import KL, Exact, FusedAtoms, FusedLinear, MonteCarlo, SampledLogits, TopK
from fdiv.adapters.transformers import CausalLM
from fdiv.teachers import _columns, _format
from fdiv.teachers._signal import TeacherError, Vocabulary

DRAWN = FusedAtoms(SampledLogits(20, "teacher"))
KEPT = [TOP, DRAWN, FusedLinear(), MonteCarlo()]
each_kind = pytest.mark.parametrize("estimator", KEPT, ids=repr)


# -- what comes back -----------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_gives_the_teachers_evidence_to_the_bit_in_any_batch_order_and_padding(
    tmp_path, estimator, temperature
):
    ids, mask = small.text(12)
    manifest = cache(tmp_path, estimator, (ids, mask), temperature)
    assert len(manifest.shards) > 1
    teacher = opened(tmp_path, estimator, temperature)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))[:7]
    for some in [(ids, mask), (ids[order], mask[order]), small.wider(ids[order], mask[order], 5)]:
        expected = local(estimator, temperature)(*some).evidence
        tolerance = 1e-5 if estimator == TOP or estimator == MonteCarlo() else 1e-6  # of batched products
        small.same(teacher(*some).evidence, expected, tolerance)
    # The same batches as were asked have the same rounding.
    for some in batches((ids, mask)):
        small.same(teacher(*some).evidence, local(estimator, temperature)(*some).evidence)


@each_kind
def test_the_opened_cache_states_the_terms_that_were_asked_of_it(tmp_path, estimator):
    cache(tmp_path, estimator)
    terms = opened(tmp_path, estimator).terms
    assert terms == local(estimator).terms
    terms.require(estimator, Vocabulary.of(small.teacher(2, padding=5)), 1.0)


def test_hidden_states_serve_every_temperature_and_are_kept_with_one_head(tmp_path):
    cache(tmp_path, FusedLinear())
    some = small.text(12)
    found = opened(tmp_path, FusedLinear(), 3.0)(*some)
    small.same(found.evidence, local(FusedLinear(), 3.0)(*some).evidence, 1e-6)
    assert found.terms.temperature == 3.0
    assert [file.name for file in tmp_path.glob("head*")] == ["head.safetensors"]


def test_bfloat16_states_are_kept_as_they_are(tmp_path):
    model = small.teacher()
    model.model.bfloat16()
    manifest = cache(tmp_path, FusedLinear(), model=model)
    found = opened(tmp_path, FusedLinear(), model=model)(*small.text(12)).evidence
    assert found["p_hidden"].dtype == found["p_weight"].dtype == torch.bfloat16
    assert 2 * 32 < manifest.bytes_per_token < 4 * 32 + 400


def test_a_cache_of_k_atoms_answers_for_any_fewer(tmp_path):
    cache(tmp_path)
    fewer = FusedAtoms(TopK(3))
    some = small.text(12)
    small.same(opened(tmp_path, fewer)(*some).evidence, local(fewer)(*some).evidence, 1e-5)


def test_text_without_predicted_tokens_gives_no_rows(tmp_path):
    cache(tmp_path)
    ids, mask = small.text(2)
    found = opened(tmp_path)(ids, mask & False).evidence
    assert {name: tuple(t.shape) for name, t in found.items()} == {"index": (0, 8), "log_p": (0, 8)}


def test_a_student_that_learns_from_a_cache_comes_to_the_teacher(tmp_path):
    text = small.text(12)
    cache(tmp_path, TOP, text)
    student, signal = small.teacher(5), opened(tmp_path)(*text).evidence
    optimizer = torch.optim.Adam(student.model.parameters(), lr=3e-3)
    values = []
    for _ in range(40):
        loss = TOP(KL(), *signal.values(), student.hidden(*text), student.head).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            exact = KL()(local(Exact())(*text).evidence["log_p"], student.log_softmax(*text))
        values.append(exact.mean().item())
    assert values[-1] < 0.2 * values[0]


# -- size ----------------------------------------------------------------------------------------------------


def test_the_size_a_token_is_that_of_the_files_and_is_stored(tmp_path):
    manifest = cache(tmp_path)
    files = sum(file.stat().st_size for file in tmp_path.glob("shard*"))
    tokens = int(small.text(12)[1].sum())
    assert manifest.tokens == tokens and manifest.samples == 12
    assert manifest.bytes_per_token == files / tokens
    said = json.loads((tmp_path / "manifest.json").read_text())
    assert said["bytes_per_token"] == pytest.approx(files / tokens, abs=0.01)
    assert f"{files / tokens:.1f} bytes a token" in manifest.summary


@pytest.mark.parametrize(("size", "bytes_an_id"), [(200, 1), (1000, 2), (70_000, 4)])
def test_ids_are_in_the_smallest_integers_and_the_largest_id_survives(tmp_path, size, bytes_an_id):
    model = CausalLM.fresh(size, 4, 1, 2, 0)
    with torch.no_grad():
        model.model.get_output_embeddings().weight[-1] *= 50  # the last id is often the likeliest
    text = (torch.randint(size, (4, 8), generator=torch.Generator().manual_seed(0)), torch.ones(4, 8).bool())
    cache(tmp_path, TOP, text, model=model, shard_bytes=1 << 20)
    with safe_open(tmp_path / "shard-000000.safetensors", "pt") as file:
        assert file.get_tensor("index").element_size() == bytes_an_id
    found = opened(tmp_path, model=model)(*text).evidence
    assert (found["index"] == size - 1).any()
    small.same(found, local(TOP, 1.0, model)(*text).evidence, 1e-5)


def test_draws_are_kept_once_with_their_number(tmp_path):
    cache(tmp_path, DRAWN, shard_bytes=1 << 20)
    found = local(DRAWN)(*small.text(12)).evidence["index"]
    different = sum(len(row.unique()) for row in found)
    with safe_open(tmp_path / "shard-000000.safetensors", "pt") as file:
        assert len(file.get_tensor("index")) == different < found.numel() / 2
        assert int(file.get_tensor("count").sum()) == found.numel()


def test_float16_keeps_each_log_probability_to_2_to_the_minus_11_of_it(tmp_path):
    """And the captured mass to that of float32: each is moved by at most the mean error of its row."""
    exact = local(TOP)(*small.text(12)).evidence["log_p"].double()
    cache(tmp_path, precision="float16")
    found = opened(tmp_path)(*small.text(12)).evidence["log_p"].double()
    p = exact.exp()
    mean = (p * exact.abs()).sum(-1, keepdim=True) / p.sum(-1, keepdim=True)
    assert ((found - exact).abs() <= 2**-11 * (exact.abs() + mean) * 1.01 + 2e-6).all()
    torch.testing.assert_close(found.exp().sum(-1), p.sum(-1), rtol=0, atol=1e-6)
    assert (found - exact).abs().max() > 1e-4  # the bound is about something


def test_float16_keeps_a_small_tail(tmp_path):
    """Of mass 1e-5, which rounding alone would move by more than itself."""
    log_p = torch.tensor([[0.6, 0.399984]]).log()
    log_p = torch.cat([log_p, torch.full((1, 6), 1e-6).log()], -1)
    evidence = {"index": torch.arange(8).unsqueeze(0), "log_p": log_p}
    terms = local(TOP).terms
    for precision in ("float32", "float16"):
        columns = _columns.pack(evidence, terms, precision)
        tail = 1 - _columns.unpack(columns, terms.support)["log_p"].double().exp().sum()
        assert tail.item() == pytest.approx(1 - log_p.double().exp().sum().item(), abs=2e-7)
    rounded = 1 - log_p.half().double().exp().sum().item()
    assert abs(rounded - 1e-5) > 1e-5


@pytest.mark.parametrize("estimator", [DRAWN, MonteCarlo()], ids=repr)
def test_float16_of_draws_and_labels_is_within_the_same_bound(tmp_path, estimator):
    exact = local(estimator)(*small.text(12)).evidence["log_p"]
    cache(tmp_path, estimator, precision="float16")
    found = opened(tmp_path, estimator)(*small.text(12)).evidence["log_p"]
    assert ((found - exact).abs() <= 2**-11 * exact.abs() * 1.01 + 2e-6).all()


def test_float16_takes_fewer_bytes_a_token(tmp_path):
    many = small.text(64)
    wide = cache(tmp_path / "a", some=many, shard_bytes=1 << 20).bytes_per_token
    narrow = cache(tmp_path / "b", some=many, shard_bytes=1 << 20, precision="float16").bytes_per_token
    assert wide - narrow == pytest.approx(2 * 8 - 4, abs=1)  # two bytes an atom, less the mass of the row


# -- what is refused -----------------------------------------------------------------------------------------


def test_another_temperature_is_refused(tmp_path):
    cache(tmp_path, temperature=2.0)
    opened(tmp_path, temperature=2.0)
    with pytest.raises(TeacherError, match=r"made at temperature 2 and is read at 1.*write temperature=2"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "other", [FusedAtoms(TopK(9)), DRAWN, FusedLinear(), Exact(), MonteCarlo()], ids=repr
)
def test_another_support_is_refused(tmp_path, other):
    cache(tmp_path)
    with pytest.raises(TeacherError, match=r"holds atoms of TopK\(k=8.*write estimator=FusedAtoms"):
        opened(tmp_path, other)


def test_another_teacher_is_refused(tmp_path):
    cache(tmp_path)
    with pytest.raises(TeacherError, match="of another teacher"):
        opened(tmp_path, model=small.teacher(2))
    opened(tmp_path, model=None)  # nothing to compare with


def test_a_reference_or_student_with_another_vocabulary_is_refused(tmp_path):
    cache(tmp_path)
    restricted = CausalLM(TEACHER.model, torch.arange(3, 20), TEACHER.tokenizer)
    with pytest.raises(TeacherError, match="is not the reference's"):
        opened(tmp_path, model=restricted)
    with pytest.raises(TeacherError, match=r"is not the student's.*GOLD"):
        opened(tmp_path).terms.require(TOP, Vocabulary.of(restricted), 1.0)


def test_a_sample_that_is_not_there_is_refused(tmp_path):
    ids, mask = small.text(12)
    cache(tmp_path, TOP, (ids[:9], mask[:9]))
    with pytest.raises(TeacherError, match=r"has nothing on 3 of the 12 samples.*adds what is missing"):
        opened(tmp_path)(ids, mask)


def test_another_context_or_another_mask_is_another_sample(tmp_path):
    ids, mask = small.text(12)
    cache(tmp_path, TOP, (ids, mask))
    context, shorter = ids.clone(), mask.clone()
    context[0, 0] = 3 + (context[0, 0] - 2) % 20
    shorter[1, int(mask[1].nonzero()[0])] = False
    for some in [(context[:1], mask[:1]), (ids[1:2], shorter[1:2])]:
        if some[1].any():
            with pytest.raises(TeacherError, match="has nothing on 1 of the 1"):
                opened(tmp_path)(*some)


@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("file", ["shard-000001.safetensors", "manifest.json"])
def test_a_bit_that_flipped_is_refused(tmp_path, file, place):
    cache(tmp_path)
    data = bytearray((tmp_path / file).read_bytes())
    data[int(place * len(data))] ^= 4
    (tmp_path / file).write_bytes(data)
    with pytest.raises(TeacherError, match=r"is damaged|of another format"):
        opened(tmp_path)(*small.text(12))


def test_a_bit_that_flipped_in_the_head_is_refused(tmp_path):
    cache(tmp_path, FusedLinear())
    data = bytearray((tmp_path / "head.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "head.safetensors").write_bytes(data)
    with pytest.raises(TeacherError, match="is damaged"):
        opened(tmp_path, FusedLinear())


@pytest.mark.parametrize("file", ["shard-000001.safetensors", "manifest.json"])
def test_a_file_that_was_cut_is_refused(tmp_path, file):
    cache(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(TeacherError, match=r"bytes, .* were written|is damaged"):
        opened(tmp_path)
    path.unlink()
    with pytest.raises(TeacherError, match=r"is missing|no cache at"):
        opened(tmp_path)


def test_a_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_format, "VERSION", 2)
    cache(tmp_path)
    monkeypatch.undo()
    with pytest.raises(TeacherError, match="another format than version 1"):
        opened(tmp_path)


def test_what_should_not_be_kept_is_refused(tmp_path):
    with pytest.raises(TeacherError, match=r"too large to keep; write FusedAtoms\(TopK\(k\)\)"):
        cache(tmp_path, Exact())
    with pytest.raises(TeacherError, match="loaded in bfloat16"):
        cache(tmp_path, FusedLinear(), precision="float16")
    with pytest.raises(TeacherError, match="'float32' or 'float16', got 'int8'"):
        cache(tmp_path, precision="int8")


def test_a_folder_with_another_signal_is_refused(tmp_path):
    cache(tmp_path)
    for other in [{"estimator": DRAWN}, {"temperature": 2.0}, {"precision": "float16"}]:
        with pytest.raises(TeacherError, match="holds another signal"):
            cache(tmp_path, **other)


# -- several teachers ----------------------------------------------------------------------------------------


def test_of_several_teachers_that_of_the_reference_is_taken(tmp_path):
    other = small.teacher(2)
    cache(tmp_path / "a")
    cache(tmp_path / "b", model=other)
    some = small.text(12)
    small.same(opened(tmp_path, model=other)(*some).evidence, local(TOP, 1.0, other)(*some).evidence, 1e-5)
    with pytest.raises(TeacherError, match="caches of 2 teachers and none of the reference"):
        opened(tmp_path, model=small.teacher(3))
    with pytest.raises(TeacherError, match="no reference to choose by"):
        opened(tmp_path, model=None)
