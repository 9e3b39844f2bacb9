"""Sinkhorn divergences by geomloss, in fdiv's conventions."""

import pytest
import torch
from tests.transport.problems import cloud, weights

from fdiv import Sinkhorn

pytest.importorskip("geomloss")

from fdiv.adapters.geomloss import between


@pytest.mark.parametrize("divergence", [Sinkhorn(1.0), Sinkhorn(1.0, p=1), Sinkhorn(1.0, debias=False)])
def test_value_and_gradient_are_ours(divergence):
    x, y, log_a, log_b = cloud(7, 2).requires_grad_(), cloud(5, 2, seed=1), weights(7), weights(5, seed=2)
    ours = divergence.between(x, y, log_a, log_b)
    theirs = between(divergence, x, y, log_a, log_b, scaling=0.999)
    assert theirs.item() == pytest.approx(ours.item(), rel=2e-4)
    gradients = (torch.autograd.grad(value, x)[0] for value in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_finer_descent_is_closer():
    x, y, divergence = cloud(7, 2), cloud(5, 2, seed=1), Sinkhorn(0.3)
    ours = divergence.between(x, y)
    errors = [(between(divergence, x, y, scaling=s) / ours - 1).abs().item() for s in (0.5, 0.9, 0.99)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 5e-3


def test_batches_of_any_shape_are_problems_one_by_one():
    x, y = (torch.stack([cloud(n, 2, seed=s) for s in range(6)]).reshape(2, 3, n, 2) for n in (7, 5))
    found = between(Sinkhorn(1.0), x, y, scaling=0.999)
    torch.testing.assert_close(found, Sinkhorn(1.0).between(x, y), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("divergence", "options", "said"),
    [
        (Sinkhorn(0.3, tolerance=1e-3), {}, "leave tolerance and chunk out"),
        (Sinkhorn(0.3, p=1.5), {}, "p = 1 and p = 2"),
        (Sinkhorn(0.3), {"scaling": 1.0}, r"scaling is in \(0, 1\)"),
    ],
)
def test_what_geomloss_would_ignore_is_refused(divergence, options, said):
    with pytest.raises(ValueError, match=said):
        between(divergence, cloud(7, 2), cloud(5, 2), **options)
