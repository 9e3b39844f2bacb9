"""TopK: a divergence of two coarser distributions, hence a lower bound that is never blind."""

import pytest
import torch
from tests.worlds import close, each_divergence, each_other_object, gradient, random_rows

import fdiv
from fdiv import TopK

SUPPORTS = ("teacher", "student", "union")
each_support = pytest.mark.parametrize("support", SUPPORTS)


def chosen(support, k, log_p, log_q):
    """The atoms of one row, as a set."""
    teacher, student = set(log_p.topk(k).indices.tolist()), set(log_q.topk(k).indices.tolist())
    return sorted({"teacher": teacher, "student": student, "union": teacher | student}[support])


def merged(atoms, log_density):
    """One row's log-density on the atoms and on all others together, in plain probabilities."""
    kept = log_density[atoms].exp()
    others = [v for v in range(len(log_density)) if v not in atoms]
    return torch.cat([kept, log_density[others].exp().sum().reshape(1)]).log()


@each_support
@each_divergence
def test_the_value_is_a_lower_bound_that_grows_with_k_to_the_divergence(divergence, support):
    log_p, log_q = random_rows(8, 9, seed=1), random_rows(8, 9, seed=2)
    values = torch.stack([TopK(k, support)(divergence, log_p, log_q) for k in range(1, 10)])
    truth = divergence(log_p, log_q)
    assert (values > 0).all()
    assert (values <= truth * (1 + 1e-12)).all()
    assert (values.diff(dim=0) >= -1e-12 * truth).all()
    close(values[-1], truth, 1e-14)
    assert torch.equal(TopK(100, support)(divergence, log_p, log_q), values[-1])


@each_support
@each_divergence
def test_value_and_gradient_are_those_of_the_merged_distributions(divergence, support):
    for seed in range(3):
        log_p = random_rows(1, 8, seed)[0]
        logits = random_rows(1, 8, seed + 10)[0].requires_grad_()
        log_q = logits.log_softmax(-1)
        atoms = chosen(support, 3, log_p, log_q)
        explicit = divergence(merged(atoms, log_p), merged(atoms, log_q))
        value = TopK(3, support)(divergence, log_p[None], log_q[None])[0]
        close(value, explicit)
        close(gradient(value, logits), gradient(explicit, logits))


@each_support
def test_the_captured_masses_are_those_of_the_chosen_atoms(support):
    log_p, log_q = random_rows(6, 8, seed=1), random_rows(6, 8, seed=2)
    out = TopK(2, support).captured(fdiv.KL(), log_p, log_q)
    for row in range(6):
        atoms = chosen(support, 2, log_p[row], log_q[row])
        close(out.p_mass[row], log_p[row][atoms].exp().sum(), 1e-13)
        close(out.q_mass[row], log_q[row][atoms].exp().sum(), 1e-13)


def test_the_union_holds_the_atoms_of_both_even_where_rows_overlap_differently():
    same, other = random_rows(1, 7, seed=1), random_rows(1, 7, seed=2)
    log_p, log_q = torch.cat([same, same]), torch.cat([same, other])  # row 0: 3 atoms, row 1: more
    together = TopK(3, "union")(fdiv.KL(), log_p, log_q)
    alone = [TopK(3, "union")(fdiv.KL(), log_p[i : i + 1], log_q[i : i + 1])[0] for i in (0, 1)]
    assert len(chosen("union", 3, log_p[1], log_q[1])) > 3
    close(together, torch.stack(alone), 1e-14)
    assert together[0].abs() < 1e-14


@each_support
@each_divergence
def test_disjoint_top_k_have_a_value_and_a_gradient(divergence, support):
    """A loss renormalised over the support is 0 here, with gradient 0, though the models share nothing."""
    log_p = torch.tensor([5.0, 5, 0, 0, 0, 0], dtype=torch.float64).log_softmax(-1)
    logits = torch.tensor([0.0, 0, 5, 5, 0, 0], dtype=torch.float64, requires_grad=True)
    value = TopK(2, support)(divergence, log_p, logits.log_softmax(-1))
    assert value > 0.2
    assert gradient(value, logits).abs().max() > 1e-3


@pytest.mark.parametrize("divergence", [fdiv.KL(), fdiv.ReverseKL(), fdiv.JS(0.5)], ids=repr)
def test_a_student_with_nothing_at_all_on_the_support_keeps_a_finite_gradient(divergence):
    log_p = torch.tensor([[0.6, 0.3, 0.1, 0.0]], dtype=torch.float64).log()
    logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = TopK(2)(divergence, log_p, logits.log_softmax(-1))
    assert value > 0
    (step,) = torch.autograd.grad(value.sum(), logits)
    assert step.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_divergence
def test_the_tail_stays_finite_as_the_captured_mass_goes_to_one(divergence, dtype):
    confident = torch.tensor([[30.0, 0, 0, 0], [200.0, 0, 0, 0], [10.0, 0, 0, 0], [0.0, 0, 0, 0]])
    doubtful = torch.tensor([[1.0, 0.5, 0, 0]]).expand(4, 4)
    for p_logits, q_logits in ((confident, doubtful), (doubtful, confident), (confident, confident)):
        logits = q_logits.to(dtype).requires_grad_()
        value = TopK(1)(divergence, p_logits.to(dtype).log_softmax(-1), logits.log_softmax(-1))
        assert value.dtype == torch.float32
        assert value.isfinite().all() and (value >= 0).all()
        assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def test_empty_tails_on_either_side_are_priced_not_ignored():
    sharp, spread = torch.tensor([[1.0, 0, 0]]).log(), torch.tensor([[0.6, 0.3, 0.1]]).log()
    missed = TopK(1)(fdiv.KL(), sharp, spread)  # q wastes 0.4 of its mass
    close(missed, torch.tensor([-torch.tensor(0.6).log()]), 1e-5)
    outside = TopK(1)(fdiv.KL(), spread, sharp)  # p has 0.4 where q has at most the resolution
    assert 0.4 * torch.tensor(0.4 / 2e-7).log() - 1 < outside < 7


def test_stored_atoms_give_the_value_and_minus_infinity_twice_is_no_atom():
    log_p, log_q = random_rows(4, 9, seed=1), random_rows(4, 9, seed=2)
    index = log_p.topk(3).indices
    stored = [t.gather(-1, index) for t in (log_p, log_q)]
    padded = [torch.cat([t, torch.full((4, 2), -torch.inf, dtype=t.dtype)], -1) for t in stored]
    value = TopK(3)(fdiv.JS(0.1), log_p, log_q)
    close(TopK.atoms(fdiv.JS(0.1), *stored).value, value, 1e-14)
    close(TopK.atoms(fdiv.JS(0.1), *padded).value, value, 1e-14)


@each_other_object
def test_what_has_no_data_processing_is_refused(other):
    with pytest.raises(TypeError, match="data processing"):
        TopK(3).check(other)
    with pytest.raises(TypeError, match="data processing"):
        TopK(3)(other, random_rows(2, 5), random_rows(2, 5))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="k >= 1"):
        TopK(0)
    with pytest.raises(ValueError, match="'teacher', 'student' or 'union'"):
        TopK(3, "both")
