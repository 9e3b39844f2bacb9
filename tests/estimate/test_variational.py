"""Variational: below the divergence for any critic, and equal to it for the right one."""

import pytest
import torch
from tests.worlds import close, each_divergence, each_other_object, each_smooth_divergence, gradient

import fdiv
from fdiv import Variational

# Six symbols with chances that are counts: repeating a symbol by its count is the exact expectation.
P_COUNTS = torch.tensor([6, 5, 4, 2, 2, 1])
Q_COUNTS = torch.tensor([1, 2, 3, 5, 3, 1])
LOG_P = (P_COUNTS / P_COUNTS.sum().double()).log()
LOG_Q = (Q_COUNTS / Q_COUNTS.sum().double()).log()


def bound(divergence, critic):
    """The estimate on all samples, from the critic's log-ratio at each symbol [..., 6]."""
    on_p = critic.repeat_interleave(P_COUNTS, dim=-1)
    return Variational()(divergence, on_p, critic.repeat_interleave(Q_COUNTS, dim=-1))


@each_divergence
def test_any_critic_gives_a_lower_bound(divergence):
    generator = torch.Generator().manual_seed(0)
    critics = 2 * torch.randn(50, 6, generator=generator, dtype=torch.float64)
    values = bound(divergence, critics)
    assert values.shape == (50,)
    assert (values <= divergence(LOG_P, LOG_Q) + 1e-12).all()


@each_divergence
def test_the_true_log_ratio_is_tight_and_stationary(divergence):
    critic = (LOG_P - LOG_Q).requires_grad_()
    value = bound(divergence, critic)
    close(value, divergence(LOG_P, LOG_Q))
    assert gradient(value, critic).abs().max() < 1e-12


@each_smooth_divergence
def test_a_critic_trained_by_the_bound_finds_the_log_ratio(divergence):
    critic = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([critic], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = -bound(divergence, critic)
        loss.backward()
        return loss

    optimiser.step(closure)
    close(critic.detach(), LOG_P - LOG_Q, 1e-4)


def test_a_constant_critic_of_zero_says_nothing():
    for divergence in (fdiv.KL(), fdiv.JS(0.5), fdiv.TV()):
        assert bound(divergence, torch.zeros(6, dtype=torch.float64)) == 0


def test_the_two_samples_may_differ_in_size():
    critic_p, critic_q = torch.zeros(3, 5), torch.ones(3, 8)
    assert Variational()(fdiv.KL(), critic_p, critic_q).shape == (3,)


@each_other_object
def test_what_has_no_potentials_is_refused(other):
    with pytest.raises(TypeError, match="potentials of the ratio"):
        Variational().check(other)
