"""Exact: the divergence itself, and no silent reading of what is not one."""

from dataclasses import dataclass

import pytest
import torch
from tests.worlds import LOG_P, close, each_divergence, gradient, random_rows, six_symbols

import fdiv
from fdiv import Exact


@dataclass(frozen=True)
class MeanGap(fdiv.MetricDivergence):
    """The squared distance of the means."""

    def between(self, x, y, log_a=None, log_b=None):
        return (log_a.exp() @ x - log_b.exp() @ y).square().sum(-1)


@each_divergence
def test_exact_is_the_divergence_a_row(divergence):
    log_p, log_q = random_rows(5, 7, seed=1), random_rows(5, 7, seed=2)
    rows = Exact()(divergence, log_p, log_q)
    assert rows.shape == (5,)
    assert torch.equal(rows, divergence(log_p, log_q))


@each_divergence
def test_the_logit_gradient_of_exact_is_the_one_fused_formula(divergence):
    theta, log_q = six_symbols()
    actual = gradient(Exact()(divergence, LOG_P, log_q), theta)
    q, psi = log_q.exp(), divergence.psi(LOG_P - log_q)
    close(actual, (q * (psi - (q * psi).sum())).detach())


@pytest.mark.parametrize(
    ("divergence", "value"),
    [
        (fdiv.KL(), 0.498223582),
        (fdiv.ReverseKL(), 0.584996498),
        (fdiv.JS(0.5), 0.125100606),
        (fdiv.JS(0.1), 0.044420725),
        (fdiv.JS(0.9), 0.050029545),
        (fdiv.SkewKL(0.1), 0.397168809),
        (fdiv.SkewReverseKL(0.1), 0.430558954),
        (fdiv.TV(), 0.4),
        (fdiv.Pearson(), 1.12),
        (fdiv.SquaredHellinger(), 0.129983041),
    ],
    ids=repr,
)
def test_exact_gives_the_values_of_the_worked_example(divergence, value):
    log_p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    log_q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    assert Exact()(divergence, log_p, log_q).item() == pytest.approx(value, abs=5e-10)


def test_a_divergence_between_points_is_refused_until_it_is_given_points():
    with pytest.raises(TypeError, match=r"`\.on\(points\)`"):
        Exact().check(MeanGap())
    points = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    divergence = MeanGap().on(points)
    Exact().check(divergence)
    log_p, log_q = random_rows(1, 3, seed=1)[0], random_rows(1, 3, seed=2)[0]
    expected = ((log_p.exp() - log_q.exp()) @ points).square().sum()
    close(Exact()(divergence, log_p, log_q), expected)


@pytest.mark.parametrize("other", ["KL", fdiv.KL, None, 0.5], ids=repr)
def test_what_is_no_divergence_object_is_refused_with_what_to_write(other):
    with pytest.raises(TypeError, match=r"write KL\(\), not 'KL' or KL"):
        Exact().check(other)


def test_renyi_and_alpha_beta_are_estimated_exactly():
    for divergence in (fdiv.Renyi(0.5), fdiv.AlphaBeta(0.5, 0.7)):
        Exact().check(divergence)
        _, log_q = six_symbols()
        assert Exact()(divergence, LOG_P, log_q) > 0


def test_supports_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="slice padded vocabularies"):
        Exact()(fdiv.KL(), random_rows(2, 5), random_rows(2, 6))
