"""ULD: cross-entropy, and the L1 distance of sorted probabilities between tokens paired by their number."""

import pytest
import torch
from tests.worlds import close, gradient, random_rows

import fdiv
from fdiv.divergences.sorted import SortedL1
from fdiv.divergences.wasserstein import Wasserstein1D
from fdiv.methods._method import Method
from fdiv.methods.distill.uld import ULD

Q_SEQUENCE = torch.tensor([0, 0, 0, 1, 1])
P_SEQUENCE = torch.tensor([0, 0, 1, 1, 1, 1])


def batch(vocab=7, teacher_vocab=9, seed=0):
    logits = random_rows(5, vocab, seed).requires_grad_()
    log_q = logits.log_softmax(-1)
    tensors = {"log_p": random_rows(6, teacher_vocab, seed + 1), "log_q": log_q, "log_q_label": log_q[:, 2]}
    return logits, tensors | {"q_sequence": Q_SEQUENCE, "p_sequence": P_SEQUENCE}


# -- the sorted transport ---------------------------------------------------------------------------------


def test_it_is_the_closed_form_on_worked_rows():
    p, q, sure = (
        torch.tensor(masses, dtype=torch.float64).log() for masses in ([0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [1])
    )
    assert SortedL1()(p, q).item() == pytest.approx(0.2, abs=1e-14)  # |.6 - .5| + |.3 - .3| + |.1 - .2|
    assert SortedL1()(p, sure).item() == pytest.approx(0.8, abs=1e-14)  # .4 + .3 + .1


def test_it_is_v_times_the_wasserstein_1_distance_between_the_masses_as_points():
    log_p, log_q = random_rows(4, 11, 0), random_rows(4, 11, 1)
    points = [t.exp().unsqueeze(-1) for t in (log_p, log_q)]
    close(SortedL1()(log_p, log_q), 11 * Wasserstein1D(p=1).between(*points), 1e-12)


def test_it_is_0_on_permutations_and_on_nothing_else():
    log_p = random_rows(3, 8)
    assert not SortedL1()(log_p, log_p[:, torch.randperm(8)]).any()
    assert (SortedL1()(log_p, random_rows(3, 8, seed=5)) > 1e-3).all()


@pytest.mark.parametrize("seed", range(5))
def test_it_is_at_most_2_and_at_most_the_l1_distance_over_one_vocabulary(seed):
    log_p, log_q = random_rows(50, 6, seed, scale=6.0), random_rows(50, 6, seed + 100, scale=0.2)
    value = SortedL1()(log_p, log_q)
    assert (value <= (log_p.exp() - log_q.exp()).abs().sum(-1) + 1e-15).all()
    assert (value <= 2).all()
    assert value.max() > 0.5


def test_a_sure_token_and_a_uniform_guess_are_2_less_2_over_v_apart():
    point = torch.tensor([0.0]).double()
    for atoms in (2, 10, 1000):
        uniform = torch.zeros(atoms).double().log_softmax(-1)
        assert SortedL1()(point, uniform).item() == pytest.approx(2 - 2 / atoms, abs=1e-12)


def test_atoms_without_mass_change_nothing():
    log_p, log_q = random_rows(3, 5, 0), random_rows(3, 5, 1).requires_grad_()
    padded = torch.cat([torch.full((3, 4), -torch.inf), log_q], -1)
    close(SortedL1()(log_p, padded), SortedL1()(log_p, log_q), 1e-15)
    grad = gradient(SortedL1()(log_p, padded).sum(), log_q)
    close(grad, gradient(SortedL1()(log_p, log_q).sum(), log_q), 1e-15)


def test_its_gradient_is_that_of_finite_differences():
    logits = random_rows(3, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: SortedL1()(random_rows(3, 8, 3), z.log_softmax(-1)), logits, eps=1e-7, atol=1e-7
    )


def test_half_precision_is_computed_in_float32():
    value = SortedL1()(random_rows(2, 5, 0).bfloat16(), random_rows(2, 5, 1).half())
    assert value.dtype == torch.float32


# -- the loss -----------------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_and_the_mean_over_sequences_of_each_ones_mean_over_pairs():
    _, tensors = batch()
    log_p, log_q = tensors["log_p"], tensors["log_q"]

    def distance(i, j):
        widened = torch.cat([log_q[i].exp(), torch.zeros(2)]).sort().values
        return (widened - log_p[j].exp().sort().values).abs().sum()

    first = (distance(0, 0) + distance(1, 1)) / 2
    second = (distance(3, 2) + distance(4, 3)) / 2
    out = ULD(weight=0.7)(**tensors)
    close(out.loss, -tensors["log_q_label"].mean() + 0.7 * (first + second) / 2, 1e-14)
    close(out.metrics["transport"], (first + second) / 2, 1e-14)


def test_a_student_whose_sorted_rows_are_the_teachers_has_only_labels_to_learn():
    _, tensors = batch()
    tensors["log_p"] = tensors["log_q"].detach()[[0, 1, 3, 4, 0, 0]][:, torch.randperm(7)]
    out = ULD()(**tensors)
    close(out.loss, -tensors["log_q_label"].mean(), 1e-15)


def test_micro_batches_add_up_to_the_whole():
    logits, tensors = batch()
    whole = ULD()(**tensors).loss
    parts = 0
    for n in (0, 1):
        mine = {
            k: v[n == P_SEQUENCE] if k[:2] in ("p_", "lo") and len(v) == 6 else v for k, v in tensors.items()
        }
        mine = {k: v[n == Q_SEQUENCE] if len(v) == 5 else v for k, v in mine.items()}
        mine |= {k: torch.zeros_like(mine[k]) for k in ("p_sequence", "q_sequence")}
        parts = parts + ULD()(**mine, count=5, sequences=2).loss
    close(parts, whole, 1e-14)
    close(gradient(parts, logits), gradient(whole, logits), 1e-13)


def test_the_teacher_gets_no_gradient_and_each_row_of_the_students_sums_to_0():
    logits, tensors = batch()
    teacher = tensors["log_p"].requires_grad_()
    loss = ULD()(**tensors).loss
    assert torch.autograd.grad(loss, teacher, retain_graph=True, allow_unused=True)[0] is None
    assert gradient(loss, logits).reshape(5, 7).sum(-1).abs().max() < 1e-14


def test_no_token_at_all_is_loss_0_with_a_graph():
    log_q = torch.zeros(0, 3, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    out = ULD()(
        log_p=torch.zeros(0, 4), log_q=log_q, log_q_label=log_q[:, 0], p_sequence=none, q_sequence=none
    )
    assert out.loss == 0
    assert gradient(out.loss, log_q).numel() == 0


def test_one_step_down_the_loss_lowers_it():
    logits, tensors = batch()
    before = ULD(cross_entropy=0.0)(**tensors).loss
    moved = (logits - 1e-3 * gradient(before, logits).reshape(5, 7)).log_softmax(-1)
    assert ULD(cross_entropy=0.0)(**tensors | {"log_q": moved}).loss < before


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"weight is the transport's, > 0, got 0; write SFT\(\)"):
        ULD(weight=0)
    with pytest.raises(ValueError, match="cross_entropy is a weight >= 0"):
        ULD(cross_entropy=-1.0)
    with pytest.raises(TypeError, match=r"who writes, got 'data'; write Offline\(\)"):
        ULD(sampler="data")


def test_it_keeps_the_contract_and_its_repr_is_its_recipe():
    method = ULD(weight=2.0)
    assert isinstance(method, Method) and hash(method) == hash(ULD(weight=2.0))
    assert isinstance(method.divergence, fdiv.Divergence)
    assert repr(method).startswith("ULD(weight=2.0, cross_entropy=1.0, sampler=Offline(")
