"""SampledLogits: unbiased, checked by going through every draw it could make."""

from itertools import product

import pytest
import torch
from tests.worlds import (
    LOG_P,
    close,
    each_divergence,
    each_other_object,
    gradient,
    random_rows,
    six_symbols,
)

import fdiv
from fdiv import SampledLogits

PROPOSALS = ("teacher", "student", "mixture")
each_proposal = pytest.mark.parametrize("proposal", PROPOSALS)


def proposal_of(name, log_p, log_q):
    p, q = log_p.exp(), log_q.exp().detach()
    return {"teacher": p, "student": q, "mixture": (p + q) / 2}[name]


def every_draw(name, n, log_p, log_q):
    """All sequences of n atoms [draws, n], their chances [draws] and log-weights [draws, n]."""
    chances = proposal_of(name, log_p, log_q)
    index = torch.tensor(list(product(range(len(log_p)), repeat=n)))
    return index, chances[index].prod(-1), -(n * chances[index]).log()


@pytest.mark.parametrize("n", [1, 2])
@each_proposal
@each_divergence
def test_value_and_gradient_are_unbiased(divergence, proposal, n):
    theta, log_q = six_symbols()
    index, chance, log_weight = every_draw(proposal, n, LOG_P, log_q)
    values = SampledLogits.atoms(divergence, LOG_P[index], log_q[index], log_weight)
    truth = divergence(LOG_P, log_q)
    close(chance @ values, truth)
    close(gradient(chance @ values, theta), gradient(truth, theta))


@each_proposal
def test_atoms_are_drawn_in_proportion_to_their_weights_inverse(proposal):
    _, log_q = six_symbols()
    estimator = SampledLogits(n=20_000, proposal=proposal)
    torch.manual_seed(0)
    index, log_weight = estimator.draw(LOG_P, log_q)
    chances = proposal_of(proposal, LOG_P, log_q)
    close(log_weight, -(20_000 * chances[index]).log(), 1e-13)
    frequency = index.bincount(minlength=6) / 20_000
    assert ((frequency - chances).abs() < 4 * (chances / 20_000).sqrt()).all()
    assert not log_weight.requires_grad


@pytest.mark.parametrize("n", [1, 2])
def test_kl_with_the_teacher_proposal_follows_random_sampling_distillation_on_average(n):
    """Random-sampling distillation's loss is -sum t_hat log q, t_hat the frequencies of the draw."""
    theta, log_q = six_symbols()
    index, chance, log_weight = every_draw("teacher", n, LOG_P, log_q)
    t_hat = torch.zeros(len(index), 6, dtype=torch.float64).scatter_add_(
        -1, index, torch.full(index.shape, 1 / n, dtype=torch.float64)
    )
    values = SampledLogits.atoms(fdiv.KL(), LOG_P[index], log_q[index], log_weight)
    ours, theirs = gradient(chance @ values, theta), gradient(chance @ -(t_hat @ log_q), theta)
    close(ours, theirs)
    close(ours, log_q.exp().detach() - LOG_P.exp())


def test_kl_with_the_teacher_proposal_is_that_loss_and_a_control_variate_of_mean_zero():
    theta, log_q = six_symbols()
    index, chance, log_weight = every_draw("teacher", 1, LOG_P, log_q)
    u = (LOG_P - log_q).exp()
    for draw in range(6):
        value = SampledLogits.atoms(fdiv.KL(), LOG_P[index[draw]], log_q[index[draw]], log_weight[draw])
        atom = index[draw, 0]
        close(gradient(value, theta), gradient(-log_q[atom] + 1 / u[atom], theta))
    close(chance @ (1 / u[index[:, 0]]), torch.tensor(1.0, dtype=torch.float64))


@each_proposal
@each_divergence
def test_where_the_models_agree_no_draw_has_a_value_or_a_gradient(divergence, proposal):
    logits = LOG_P.clone().requires_grad_()
    torch.manual_seed(0)
    value = SampledLogits(3, proposal)(divergence, LOG_P.log_softmax(-1), logits.log_softmax(-1))
    assert value.abs() < 1e-14
    assert gradient(value, logits).abs().max() < 1e-14


def test_draws_follow_torch_manual_seed():
    log_p, log_q = random_rows(4, 9, seed=1), random_rows(4, 9, seed=2)
    estimator = SampledLogits(n=3)
    torch.manual_seed(5)
    first = estimator(fdiv.KL(), log_p, log_q)
    other = estimator(fdiv.KL(), log_p, log_q)
    torch.manual_seed(5)
    assert torch.equal(first, estimator(fdiv.KL(), log_p, log_q))
    assert not torch.equal(first, other)


def test_under_the_mixture_no_weighted_mass_exceeds_two_over_n():
    log_p = torch.tensor([[20.0, 0, 0, 0, -20]], dtype=torch.float64).log_softmax(-1)
    log_q = torch.tensor([[-20.0, 0, 0, 0, 20]], dtype=torch.float64).log_softmax(-1)
    torch.manual_seed(0)
    index, log_weight = SampledLogits(n=50).draw(log_p, log_q)
    for log_density in (log_p, log_q):
        assert ((log_density.gather(-1, index) + log_weight).exp() <= 2 / 50 + 1e-12).all()


def test_rows_are_drawn_apart_and_the_teacher_gets_no_gradient():
    log_p = random_rows(4, 9, seed=1).reshape(2, 2, 9).requires_grad_()
    logits = random_rows(4, 9, seed=2).reshape(2, 2, 9).requires_grad_()
    rows = SampledLogits(n=5)(fdiv.JS(0.1), log_p.detach(), logits.log_softmax(-1))
    assert rows.shape == (2, 2)
    rows.sum().backward()
    assert log_p.grad is None
    assert logits.grad.isfinite().all()


@each_proposal
def test_empty_atoms_of_either_side_do_no_harm(proposal):
    log_p = torch.tensor([0.0, 1.0, -torch.inf, 0.5]).log_softmax(-1)
    logits = torch.tensor([0.0, -torch.inf, -torch.inf, 0.5], requires_grad=True)
    torch.manual_seed(0)
    value = SampledLogits(40, proposal)(fdiv.JS(0.5), log_p, logits.log_softmax(-1))
    assert value.isfinite()
    assert gradient(value, logits)[[0, 3]].isfinite().all()


@each_other_object
def test_what_is_no_sum_over_atoms_is_refused(other):
    with pytest.raises(TypeError, match="SampledLogits"):
        SampledLogits().check(other)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="n >= 1"):
        SampledLogits(0)
    with pytest.raises(ValueError, match="'teacher', 'student' or 'mixture'"):
        SampledLogits(proposal="both")
