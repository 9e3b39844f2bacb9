"""The classifier's optimum is the log-ratio, and its loss an f-GAN's."""

import math

import pytest
import torch
from scipy import stats
from tests.worlds import LOG_BEHAVIOUR, LOG_P, close, each_smooth_divergence

import fdiv
from fdiv import Variational
from fdiv.estimate.discriminator import logistic_loss, trimmed_mean


def fitted(symbols_p, symbols_q):
    """The table of six logits of least loss at samples [N] and [M]."""
    table = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = logistic_loss(table[symbols_p], table[symbols_q])
        loss.backward()
        return loss

    optimizer.step(closure)
    return table.detach()


def drawn(log_p, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return log_p.exp().multinomial(count, replacement=True, generator=generator)


def test_a_table_fitted_to_samples_is_the_log_ratio_of_their_frequencies_however_many_of_each():
    symbols_p, symbols_q = drawn(LOG_P, 4000, 0), drawn(LOG_BEHAVIOUR, 1500, 1)
    frequencies = [s.bincount(minlength=6) / len(s) for s in (symbols_p, symbols_q)]
    expected = (frequencies[0] / frequencies[1]).log().double()
    assert (fitted(symbols_p, symbols_q) - expected).abs().max() < 4e-4


def test_the_loss_is_an_f_gans_bound_on_the_jensen_shannon_divergence():
    generator = torch.Generator().manual_seed(0)
    critic_p, critic_q = (20 * torch.randn(2, n, generator=generator, dtype=torch.float64) for n in (5, 7))
    bound = Variational()(fdiv.JS(0.5), critic_p, critic_q)
    close(logistic_loss(critic_p, critic_q), 2 * math.log(2) - 2 * bound)


@each_smooth_divergence
def test_what_it_learns_tells_every_divergence(divergence):
    """At frequencies that are the chances themselves: 100 samples of p, 20 of q."""
    symbols_p = torch.arange(6).repeat_interleave(torch.tensor([31, 24, 18, 13, 9, 5]))
    symbols_q = torch.arange(6).repeat_interleave(torch.tensor([1, 3, 5, 5, 4, 2]))
    table = fitted(symbols_p, symbols_q)
    value = Variational()(divergence, table[symbols_p], table[symbols_q])
    close(value, divergence(LOG_P, LOG_BEHAVIOUR), 1e-6)


def test_the_gradient_of_a_sure_and_wrong_classifier_does_not_fade():
    critic = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = logistic_loss(critic[:1], critic[1:])
    loss.backward()
    assert loss == 2e4
    close(critic.grad, torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("trim", [0.0, 0.01, 0.1, 0.29, 0.49])
@pytest.mark.parametrize("count", [1, 7, 100, 700])
def test_the_trimmed_mean_leaves_out_as_many_at_either_end(trim, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    cut = round(1e9 * trim * count) // 10**9
    ordered = values.sort().values[cut : count - cut]
    close(trimmed_mean(values, trim), ordered.mean())
    if trim * count == int(trim * count):
        close(trimmed_mean(values, trim), torch.tensor(stats.trim_mean(values.numpy(), trim)))


def test_half_cannot_be_left_out_at_either_end():
    with pytest.raises(ValueError, match=r"in \[0, 0.5\), got 0.5"):
        trimmed_mean(torch.ones(4), 0.5)
