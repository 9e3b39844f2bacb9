"""Local: what the model in memory says, without ever holding more of it than is read."""

import warnings

import pytest
import torch
from tests.adapters import tiny
from tests.teachers import small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM

from fdiv import JS, KL, Exact, FusedAtoms, FusedLinear, MonteCarlo, SampledLogits, TopK
from fdiv.adapters.transformers import CausalLM
from fdiv.teachers import local
from fdiv.teachers._signal import TeacherError
from fdiv.teachers.local import Local, drawn

EVERY = [Exact(), FusedLinear(), FusedAtoms(TopK(5)), FusedAtoms(SampledLogits(9, "teacher")), MonteCarlo()]
each_estimator = pytest.mark.parametrize("estimator", EVERY, ids=repr)


def asked(estimator, model=None, ids=None, mask=None, temperature=1.0):
    if ids is None:
        ids, mask = small.text()
    return Local().open(estimator, temperature, model or small.teacher())(ids, mask).evidence


def capped(seed=0):
    """A model whose logits are more than hidden @ head.T."""
    config = Gemma2Config(
        vocab_size=small.WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=1.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CausalLM(Gemma2ForCausalLM(config).eval(), tokenizer=small.TOKENIZER)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("model", [small.teacher(), capped()], ids=["plain", "softcapped"])
def test_log_p_is_the_softmax_of_the_models_logits_over_the_temperature(model, temperature):
    ids, mask = small.text()
    expected = (small.logits(model, ids, mask) / temperature).log_softmax(-1)
    full = asked(Exact(), model, ids, mask, temperature)["log_p"]
    torch.testing.assert_close(full.double(), expected, rtol=0, atol=2e-5)
    top = asked(FusedAtoms(TopK(5)), model, ids, mask, temperature)
    torch.testing.assert_close(top["log_p"], full.topk(5).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(full.gather(-1, top["index"]), top["log_p"], rtol=0, atol=1e-6)
    label = asked(MonteCarlo(), model, ids, mask, temperature)["log_p"]
    chosen = full.gather(-1, ids[:, 1:][mask[:, 1:]].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(label, chosen, rtol=0, atol=1e-6)


def test_hidden_states_and_head_give_the_same_divergence_as_logits():
    ids, mask = small.text()
    student = small.teacher(2)
    heads = asked(FusedLinear(), None, ids, mask)
    fused = FusedLinear()(JS(0.3), *heads.values(), student.hidden(ids, mask), student.head)
    exact = Exact()(JS(0.3), asked(Exact(), None, ids, mask)["log_p"], student.log_softmax(ids, mask))
    torch.testing.assert_close(fused, exact, rtol=1e-4, atol=1e-6)


def test_atoms_of_the_teacher_give_what_the_full_rows_give():
    ids, mask = small.text()
    student = small.teacher(2)
    hidden, log_q = student.hidden(ids, mask), student.log_softmax(ids, mask)
    log_p = asked(Exact(), None, ids, mask)["log_p"]
    atoms = asked(FusedAtoms(TopK(5)), None, ids, mask)
    fused = FusedAtoms(TopK(5))(KL(), *atoms.values(), hidden, student.head)
    torch.testing.assert_close(fused, TopK(5)(KL(), log_p, log_q), rtol=1e-4, atol=1e-6)
    drawn_atoms = asked(FusedAtoms(SampledLogits(9, "teacher")), None, ids, mask)
    index, log_weight = drawn_atoms["index"], drawn_atoms["log_weight"]
    sampled = FusedAtoms(SampledLogits(9, "teacher"))(KL(), *drawn_atoms.values(), hidden, student.head)
    by_rows = SampledLogits.atoms(KL(), log_p.gather(-1, index), log_q.gather(-1, index), log_weight)
    torch.testing.assert_close(sampled, by_rows, rtol=1e-4, atol=1e-6)


def test_draws_follow_the_distribution():
    """A grid of levels draws each atom as often as its mass says, to one draw at either of its ends."""
    log_p = (3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    n = 20_000
    level = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).expand(4, -1)
    index = drawn(log_p, level)
    counts = torch.zeros(4, 50, dtype=torch.float64).scatter_add_(-1, index, torch.ones_like(level))
    assert ((counts - n * log_p.double().exp()).abs() <= 1).all()


def test_an_atom_without_mass_is_never_drawn():
    log_p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
    level = torch.tensor([[0.0, 0.25, 0.5, 1 - 1e-16]], dtype=torch.float64)
    assert drawn(log_p, level).tolist() == [[1, 1, 3, 3]]


def test_the_weight_of_a_draw_is_one_over_n_p():
    found = asked(FusedAtoms(SampledLogits(9, "teacher")))
    ones = (found["log_p"] + found["log_weight"]).exp() * 9
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_draws_are_of_the_sequence_alone_and_leave_the_global_generator_as_it_is():
    estimator, model = FusedAtoms(SampledLogits(9, "teacher")), small.teacher()
    ids, mask = small.text()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    whole = asked(estimator, model, ids, mask)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    rows = torch.arange(len(whole["index"])).split(mask.sum(1).tolist())
    for order in ([4, 1, 5, 0, 3, 2], [2, 5], *([n] for n in range(6))):
        some = asked(estimator, model, *small.wider(ids[order], mask[order], 4))
        moved = torch.cat([rows[n] for n in order])
        torch.testing.assert_close(some["index"], whole["index"][moved])
    assert not torch.equal(whole["index"][rows[0]][0], whole["index"][rows[1]][0])


@each_estimator
def test_slices_of_any_size_give_the_same(estimator, monkeypatch):
    ids, mask = small.text(9)
    whole = asked(estimator, None, ids, mask)
    monkeypatch.setattr(local, "CPU_BYTES", 1)
    monkeypatch.setattr(local, "FEWEST_ROWS", 2)
    monkeypatch.setattr(local, "READ_TOKENS", 11)
    small.same(asked(estimator, None, ids, mask), whole, 1e-5)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for t in tree_leaves(out):
            # A view, a transposed head say, is nothing new.
            if isinstance(t, torch.Tensor) and t.numel():
                self.numbers = max(self.numbers, t.numel())
        return out


@pytest.mark.parametrize("estimator", [e for e in EVERY if e != Exact()], ids=repr)
def test_tokens_times_vocabulary_is_never_held_unless_it_is_read(estimator, monkeypatch):
    monkeypatch.setattr(local, "CPU_BYTES", 1)
    model = CausalLM.fresh(2000, 8, 1, 2, 0)
    ids = torch.randint(2000, (30, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    teacher = Local().open(estimator, 1.0, model)
    with Largest() as largest:
        rows = len(next(iter(teacher(ids, mask).evidence.values())))
    assert rows == 30 * 49
    assert largest.numbers <= local.FEWEST_ROWS * 2000 < rows * 2000 / 10


@each_estimator
def test_a_padded_head_gives_what_the_head_without_padding_gives(estimator):
    plain = small.teacher(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small.same(asked(estimator, small.teacher(1, padding=9)), asked(estimator, plain), 1e-5)


@each_estimator
def test_mass_on_padding_is_measured_and_said_once(estimator):
    ids, mask = small.text()
    teacher = Local().open(estimator, 1.0, small.teacher(padding=9))
    logits = small.logits(teacher.model, ids, mask)
    expected = logits.softmax(-1)[:, small.WORDS :].sum(-1).mean().item()
    with pytest.warns(UserWarning, match=r"on the 9 rows of its head beyond the 24 tokens"):
        teacher(ids, mask)
    assert teacher.padding_mass == pytest.approx(expected, rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher(ids, mask)


def test_padding_without_mass_is_not_worth_a_word():
    model = small.teacher(padding=9)
    with torch.no_grad():  # logits far above those of the padding, which are 0
        model.model.get_output_embeddings().weight[: small.WORDS] *= 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked(Exact(), model)


def test_a_restricted_model_answers_over_its_own_tokens():
    model, (ids, mask) = small.teacher(), small.text()
    among = torch.tensor([3, 4, 9, 17, 20])
    restricted = CausalLM(model.model, among, model.tokenizer)
    expected = small.logits(model, ids, mask)[:, among].log_softmax(-1)
    found = asked(Exact(), restricted, ids, mask)["log_p"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    assert asked(FusedAtoms(TopK(9)), restricted, ids, mask)["index"].shape[1] == 5


@each_estimator
def test_text_without_predicted_tokens_gives_no_rows(estimator):
    ids, mask = small.text()
    full, empty = asked(estimator, None, ids, mask), asked(estimator, None, ids, mask & False)
    for name, rows in empty.items():
        assert rows.shape[1:] == full[name].shape[1:]
        assert name == "p_weight" or len(rows) == 0


@each_estimator
def test_the_first_token_is_predicted_by_nothing(estimator):
    ids, mask = small.text()
    first = mask.clone()
    first[:, 0] = True
    small.same(asked(estimator, None, ids, first), asked(estimator, None, ids, mask))


def test_a_teacher_with_dropout_answers_without_and_stays_in_training():
    model = CausalLM(tiny.model(1, attention_dropout=0.5), tokenizer=small.TOKENIZER)
    quiet = asked(Exact(), model)
    model.model.train()
    small.same(asked(Exact(), model), quiet)
    assert model.model.training and all(m.training for m in model.model.modules())


def test_without_a_model_in_memory_it_is_refused():
    with pytest.raises(TeacherError, match=r"write Cached\(folder\) or Served"):
        Local().open(Exact(), 1.0, None)


def test_a_mask_or_ids_of_another_form_are_refused():
    ids, mask = small.text()
    with pytest.raises(TypeError, match=r"mask.bool\(\)"):
        asked(Exact(), None, ids, mask.long())
    with pytest.raises(ValueError, match=r"ids are \[sequences, tokens\]"):
        asked(Exact(), None, ids[0], mask[0])
