"""MonteCarlo: expectations over every sample, and the well-known wrong turns shown to be wrong."""

from itertools import product

import pytest
import torch
from tests.worlds import (
    LOG_BEHAVIOUR,
    LOG_P,
    close,
    each_divergence,
    each_other_object,
    gradient,
    six_symbols,
)

import fdiv
from fdiv import MonteCarlo

SAMPLES = ("q", "p", "behaviour")
ESTIMATORS = (
    *(MonteCarlo(s, g) for s in SAMPLES for g in ("score", "importance")),
    MonteCarlo("q", "potential"),
    MonteCarlo("q", "straight-through"),
)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
each_source = pytest.mark.parametrize("estimator", [MonteCarlo(s) for s in SAMPLES], ids=repr)


def chances(estimator, log_q):
    """How likely each of the six symbols is to be the sample."""
    return {"q": log_q.detach(), "p": LOG_P, "behaviour": LOG_BEHAVIOUR}[estimator.samples].exp()


def evidence(estimator, log_q):
    """Every sample once."""
    return (LOG_P, log_q, LOG_BEHAVIOUR)[: len(estimator.evidence)]


@each_estimator
@each_divergence
def test_the_value_is_unbiased_and_never_negative(divergence, estimator):
    _, log_q = six_symbols()
    values = estimator(divergence, *evidence(estimator, log_q))
    assert (values >= 0).all()
    close(chances(estimator, log_q) @ values, divergence(LOG_P, log_q))


@each_estimator
@each_divergence
def test_the_surrogates_value_is_the_estimate_and_its_expected_gradient_is_exact(divergence, estimator):
    theta, log_q = six_symbols()
    surrogate = estimator.surrogate(divergence, *evidence(estimator, log_q))
    if estimator.gradient != "potential":  # whose value is another function
        close(surrogate, estimator(divergence, *evidence(estimator, log_q)), 1e-14)
    expected = gradient(divergence(LOG_P, log_q), theta)
    close(gradient(chances(estimator, log_q) @ surrogate, theta), expected)


@each_divergence
def test_at_each_sample_of_q_all_modes_have_the_same_gradient(divergence):
    log_q = six_symbols()[1].detach().requires_grad_()
    for mode in ("score", "importance", "potential", "straight-through"):
        surrogate = MonteCarlo().surrogate(divergence, LOG_P, log_q, mode=mode)
        close(gradient(surrogate.sum(), log_q), divergence.psi(LOG_P - log_q.detach()), 1e-13)


@each_divergence
def test_the_mode_of_one_call_takes_the_place_of_the_field(divergence):
    theta, log_q = six_symbols()
    for estimator in ESTIMATORS:
        tensors = evidence(estimator, log_q)
        of_field = estimator.surrogate(divergence, *tensors)
        of_call = MonteCarlo(estimator.samples).surrogate(divergence, *tensors, mode=estimator.gradient)
        assert torch.equal(of_call, of_field)
        assert torch.equal(gradient(of_call.sum(), theta), gradient(of_field.sum(), theta))


@each_divergence
def test_differentiating_the_value_at_frozen_samples_is_wrong(divergence):
    theta, log_q = six_symbols()
    q = log_q.exp().detach()
    naive = gradient(q @ MonteCarlo()(divergence, LOG_P, log_q), theta)
    lost = divergence.psi(LOG_P - log_q) - divergence.f(LOG_P - log_q)
    close(naive, gradient((q * lost.detach()) @ log_q, theta))  # E_q[(psi - f) grad log q]
    right = gradient(divergence(LOG_P, log_q), theta)
    assert (naive - right).norm() > 0.1 * right.norm()


def test_k1_as_a_loss_has_no_gradient_on_average():
    theta, log_q = six_symbols()
    k1 = log_q - LOG_P
    assert gradient(log_q.exp().detach() @ k1, theta).abs().max() < 1e-15


def test_k2_as_a_loss_follows_reverse_kl_though_its_value_is_biased():
    theta, log_q = six_symbols()
    k2 = (log_q - LOG_P).square() / 2
    value, truth = log_q.exp().detach() @ k2, fdiv.ReverseKL()(LOG_P, log_q)
    close(gradient(value, theta), gradient(truth, theta))
    assert (value - truth).abs() > 0.05 * truth


def test_k3_is_f_of_reverse_kl_and_as_a_loss_follows_forward_kl():
    theta, log_q = six_symbols()
    log_ratio = LOG_P - log_q
    k3 = log_ratio.exp() - 1 - log_ratio
    close(fdiv.ReverseKL().f(log_ratio), k3, 1e-14)
    close(MonteCarlo()(fdiv.ReverseKL(), LOG_P, log_q), k3, 1e-14)
    as_a_loss = gradient(log_q.exp().detach() @ k3, theta)
    close(as_a_loss, gradient(fdiv.KL()(LOG_P, log_q), theta))
    reverse = gradient(fdiv.ReverseKL()(LOG_P, log_q), theta)
    assert (as_a_loss - reverse).norm() > 0.1 * reverse.norm()


def test_the_symmetric_form_of_chi_square_as_a_loss_follows_half_of_it_and_forward_kl():
    theta, log_q = six_symbols()
    t = (log_q - LOG_P).exp()
    symmetric = t + 1 / t - 2
    close(MonteCarlo()(fdiv.Neyman(), LOG_P, log_q), symmetric, 1e-14)
    as_a_loss = gradient(log_q.exp().detach() @ symmetric, theta)
    mixed = 0.5 * fdiv.Neyman()(LOG_P, log_q) + fdiv.KL()(LOG_P, log_q)
    close(as_a_loss, gradient(mixed, theta))
    right = gradient(fdiv.Neyman()(LOG_P, log_q), theta)
    assert (as_a_loss - right).norm() > 0.1 * right.norm()


@each_divergence
def test_the_value_as_a_reward_loses_what_moves_in_the_divergence_itself(divergence):
    theta, log_q = six_symbols()
    value = MonteCarlo()(divergence, LOG_P, log_q)
    q, right = log_q.exp().detach(), gradient(divergence(LOG_P, log_q), theta)
    as_reward = gradient((q * value.detach()) @ log_q, theta)
    close(as_reward + gradient(q @ value, theta), right)  # the two halves of the product rule
    assert (as_reward - right).norm() > 0.1 * right.norm()


def test_k1_as_a_reward_is_right():
    """It differs from the score of reverse KL by a constant."""
    theta, log_q = six_symbols()
    k1 = MonteCarlo()(fdiv.ReverseKL(), LOG_P, log_q, control=-1.0).detach()
    close(k1, log_q.detach() - LOG_P, 1e-14)
    as_reward = gradient((log_q.exp().detach() * k1) @ log_q, theta)
    close(as_reward, gradient(fdiv.ReverseKL()(LOG_P, log_q), theta))


@each_divergence
def test_the_potential_is_wrong_at_samples_that_are_not_of_q(divergence):
    theta, log_q = six_symbols()
    h = MonteCarlo(gradient="potential").surrogate(divergence, LOG_P, log_q)
    right = gradient(divergence(LOG_P, log_q), theta)
    weight = (log_q - LOG_BEHAVIOUR).exp()
    behaviour, q = LOG_BEHAVIOUR.exp(), log_q.exp().detach()
    close(gradient(behaviour @ (weight.detach() * h), theta), right)  # the weight that it would need
    in_graph = gradient(behaviour @ (weight * h), theta)
    close(in_graph - right, gradient((q * h.detach()) @ log_q, theta))
    psi = divergence.psi(LOG_P - log_q).detach()
    at_p = gradient(LOG_P.exp() @ h, theta)
    close(at_p, gradient((LOG_P.exp() * psi) @ log_q, theta))  # where f(u)/u has psi/u
    for wrong in (in_graph, at_p, gradient(behaviour @ h, theta)):
        assert (wrong - right).norm() > 0.05 * right.norm()


def test_what_would_be_wrong_is_refused_and_what_to_write_is_said():
    for mode in ("potential", "straight-through"):
        for samples in ("p", "behaviour"):
            instead = "MonteCarlo\\('p'\\)" if samples == "p" else "MonteCarlo\\('behaviour', 'score'\\)"
            with pytest.raises(ValueError, match=instead):
                MonteCarlo(samples, mode)
            with pytest.raises(ValueError, match=instead):
                MonteCarlo(samples).surrogate(fdiv.KL(), LOG_P, LOG_P, LOG_P, mode=mode)
    with pytest.raises(ValueError, match="another divergence"):
        MonteCarlo().surrogate(fdiv.KL(), LOG_P, LOG_P, mode="value")


@each_divergence
def test_forgetting_that_another_policy_sampled_is_wrong(divergence):
    theta, log_q = six_symbols()
    right = gradient(divergence(LOG_P, log_q), theta)
    forgot = gradient(LOG_BEHAVIOUR.exp() @ MonteCarlo().surrogate(divergence, LOG_P, log_q), theta)
    assert (forgot - right).norm() > 0.05 * right.norm()


@each_estimator
def test_only_the_policy_receives_a_gradient(estimator):
    _, log_q = six_symbols()
    log_p, log_behaviour = LOG_P.clone().requires_grad_(), LOG_BEHAVIOUR.clone().requires_grad_()
    tensors = (log_p, log_q.detach().requires_grad_(), log_behaviour)[: len(estimator.evidence)]
    estimator.surrogate(fdiv.JS(0.1), *tensors).sum().backward()
    assert log_p.grad is None and log_behaviour.grad is None
    assert tensors[1].grad.any()


def test_the_sampling_log_probabilities_are_data_in_the_value_too():
    log_behaviour = LOG_BEHAVIOUR.clone().requires_grad_()
    assert not MonteCarlo("behaviour")(fdiv.JS(0.1), LOG_P, LOG_P, log_behaviour).requires_grad


def test_the_score_is_detached_from_the_policy():
    """Its derivative is 0: the surrogate is linear in log q, with the weights of the score held fixed."""
    log_q = torch.tensor([-1.3], dtype=torch.float64, requires_grad=True)
    for estimator in (MonteCarlo("q"), MonteCarlo("behaviour")):
        tensors = (torch.tensor([-0.4]).double(), log_q, torch.tensor([-0.8]).double())
        value = estimator.surrogate(fdiv.JS(0.1), *tensors[: len(estimator.evidence)])
        (first,) = torch.autograd.grad(value.sum(), log_q, create_graph=True)
        assert not first.requires_grad


@pytest.mark.parametrize("size", [200.0, 1e4])
@pytest.mark.parametrize(
    "divergence",
    [fdiv.ReverseKL(), fdiv.JS(0.1), fdiv.SkewKL(0.1), fdiv.SquaredHellinger(), fdiv.SoftenedReverseKL()],
    ids=repr,
)
def test_the_score_survives_log_ratios_that_overflow_their_exponential(divergence, size):
    log_q = torch.tensor([-size, -1.0], requires_grad=True)
    value = MonteCarlo().surrogate(divergence, torch.tensor([-1.0, -size]), log_q)
    assert torch.autograd.grad(value.sum(), log_q)[0].isfinite().all()


def test_the_surrogates_value_survives_a_large_score():
    log_q, log_p = torch.tensor([-1.0, -60.0], requires_grad=True), torch.tensor([-31.0, -30.0])
    for divergence in (fdiv.KL(), fdiv.Pearson(), fdiv.Neyman(), fdiv.ReverseKL()):
        surrogate = MonteCarlo().surrogate(divergence, log_p, log_q)
        assert torch.equal(surrogate, MonteCarlo()(divergence, log_p, log_q))


def test_where_policy_and_reference_agree_bitwise_value_and_gradient_are_zero():
    log_q = torch.tensor([-0.3, -7.0], requires_grad=True)
    for estimator in (*(e for e in ESTIMATORS if e.samples == "q"), MonteCarlo("p")):
        value = estimator.surrogate(fdiv.JS(0.7), log_q.detach(), log_q)
        assert not value.any()
        assert not torch.autograd.grad(value.sum(), log_q)[0].any()


@each_estimator
def test_at_a_kink_the_gradient_is_zero(estimator):
    log_q = torch.tensor([-0.3, -7.0], dtype=torch.float64, requires_grad=True)
    tensors = (log_q.detach(), log_q, log_q.detach())[: len(estimator.evidence)]
    value = estimator.surrogate(fdiv.TV(), *tensors)
    assert not value.any()
    assert not torch.autograd.grad(value.sum(), log_q)[0].any()


# -- a control variate ---------------------------------------------------------------------------------


@each_source
@each_divergence
def test_a_control_of_any_size_leaves_the_value_unbiased(divergence, estimator):
    _, log_q = six_symbols()
    tensors = evidence(estimator, log_q)
    for control in (-1.0, 0.3, 2.0):
        values = estimator(divergence, *tensors, control=control)
        close(chances(estimator, log_q) @ values, divergence(LOG_P, log_q))
    assert not torch.equal(values, estimator(divergence, *tensors))


def test_the_control_of_either_kl_spans_k1_and_k3():
    _, log_q = six_symbols()
    k1, u = log_q - LOG_P, (LOG_P - log_q).exp()
    for mix in (0.0, 0.4, 1.0):  # k1 + mix (u - 1)
        value = MonteCarlo()(fdiv.ReverseKL(), LOG_P, log_q, control=mix - 1)
        close(value, k1 + mix * (u - 1), 1e-14)
        value = MonteCarlo("p")(fdiv.KL(), LOG_P, log_q, control=1 - mix)
        close(value, -k1 + mix * (1 / u - 1), 1e-14)


def spread(values, log_chance):
    """The standard deviation."""
    chance = log_chance.exp()
    return (chance @ (values - chance @ values).square()).sqrt().item()


def test_k3_has_the_smaller_spread_near_p_and_the_larger_one_far_away():
    _, log_q = six_symbols()
    ratios = {}
    for distance in (0.01, 1.0, 1.5):
        q = (LOG_P + distance * (log_q.detach() - LOG_P)).log_softmax(-1)
        k3 = spread(MonteCarlo()(fdiv.ReverseKL(), LOG_P, q), q)
        ratios[distance] = k3 / spread(MonteCarlo()(fdiv.ReverseKL(), LOG_P, q, control=-1.0), q)
    assert ratios[0.01] < 0.02
    assert ratios[1.5] > 1.5


def test_a_control_that_is_fitted_to_the_same_samples_is_biased():
    _, log_q = six_symbols()
    u = (LOG_P - log_q).exp().detach() - 1
    f = MonteCarlo()(fdiv.ReverseKL(), LOG_P, log_q).detach()
    mean = 0.0
    for batch in product(range(6), repeat=3):
        x, y = u[list(batch)], f[list(batch)]
        variance = (x - x.mean()).square().sum()
        best = -((x - x.mean()) @ y) / variance if variance > 0 else 0.0
        mean += log_q.detach()[list(batch)].sum().exp() * (y + best * x).mean()
    truth = fdiv.ReverseKL()(LOG_P, log_q)
    assert (mean - truth).abs() > 0.05 * truth


# -- what is refused -----------------------------------------------------------------------------------


@each_other_object
def test_what_is_no_function_of_the_ratio_is_refused(other):
    with pytest.raises(TypeError, match="function of the ratio"):
        MonteCarlo().check(other)


def test_wrong_settings_and_missing_evidence_are_refused():
    with pytest.raises(ValueError, match="'q', 'p' or 'behaviour'"):
        MonteCarlo("r")
    with pytest.raises(ValueError, match="another divergence"):
        MonteCarlo(gradient="value")
    with pytest.raises(TypeError, match="needs log_behaviour"):
        MonteCarlo("behaviour")(fdiv.KL(), LOG_P, LOG_P)
    with pytest.raises(TypeError, match="needs log_behaviour"):
        MonteCarlo("behaviour").surrogate(fdiv.KL(), LOG_P, LOG_P)
