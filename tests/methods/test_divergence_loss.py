"""DivergenceLoss: the mean of a divergence, as a module."""

import pytest
import torch
from tests.worlds import close, each_divergence, random_rows

from fdiv import JS, KL, DivergenceLoss, FusedLinear, MonteCarlo, ReverseKL

MASK = torch.tensor([True, False, True, True])


def rows():
    return random_rows(4, 7, 0), random_rows(4, 7, 1)


@each_divergence
def test_it_is_the_mean_over_rows(divergence):
    log_p, log_q = rows()
    close(DivergenceLoss(divergence)(log_p, log_q), divergence(log_p, log_q).mean())
    close(DivergenceLoss(divergence)(log_p, log_q, mask=MASK), divergence(log_p[MASK], log_q[MASK]).mean())


def test_the_count_of_the_global_batch_is_its_denominator():
    log_p, log_q = rows()
    close(DivergenceLoss()(log_p, log_q, count=8.0), KL()(log_p, log_q).sum() / 8)


def test_it_is_a_module_that_says_what_it_is():
    loss = torch.nn.Sequential(DivergenceLoss(JS(0.3), FusedLinear()))
    assert "JS(beta=0.3), FusedLinear" in repr(loss)
    assert not list(loss.parameters())


def test_it_refuses_what_it_cannot_train_when_it_is_built():
    with pytest.raises(TypeError, match="whole vocabulary"):
        DivergenceLoss(ReverseKL(), MonteCarlo())
    with pytest.raises(TypeError, match="log_p, log_q; got 3"):
        DivergenceLoss()(*rows(), MASK)
