"""Quasi-rejection sampling against its law on a world whose probabilities are sixteenths."""

import math
from itertools import pairwise

import pytest
import torch
from tests.worlds import DIVERGENCES, close

import fdiv
from fdiv import JS, KL, TV
from fdiv.methods.decode.quasi_rejection import QuasiRejection

PLUGINS = ["fdiv.methods.decode.quasi_rejection"]
TIMES = torch.tensor([6, 4, 3, 2, 1])  # of sixteen draws, as often as each atom is likely
LOG_Q = (TIMES / 16).double().log()
P = torch.tensor([0.2, 0.0, 0.9, 0.6, 0.8], dtype=torch.float64)  # Z = 2.5, P/q up to 12.8
LOG_P = P.log()
DRAWS = torch.arange(5).repeat_interleave(TIMES)
BETAS = (0.1, 0.4, 1.0, 3.0, 4.8, 8.0, 12.8, 100.0)
each_beta = pytest.mark.parametrize("beta", BETAS)


def law(beta):
    """min(P, beta q), normalised, in logs."""
    cut = torch.minimum(P, beta * LOG_Q.exp())
    return (cut / cut.sum()).log()


@each_beta
def test_accepted_draws_have_the_law_and_the_rate_of_the_paper(beta):
    """Each atom tried at a fine grid of uniform numbers."""
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    rule = QuasiRejection(beta)
    rates = torch.stack(
        [rule.accept(LOG_P[i].expand(20000), LOG_Q[i].expand(20000), grid).double().mean() for i in range(5)]
    )
    close(rates, torch.minimum(torch.ones(()).double(), P / (beta * LOG_Q.exp())), 2e-4)
    accepted = rates * LOG_Q.exp()
    close(accepted / accepted.sum(), law(beta).exp(), 2e-2 if beta > 50 else 2e-3)
    told = rule.diagnostics(LOG_P[DRAWS], LOG_Q[DRAWS])
    assert told.acceptance == pytest.approx(accepted.sum().item(), rel=1e-2)


@each_beta
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_divergences_from_the_target_are_exact_on_draws_as_frequent_as_they_are_likely(beta, divergence):
    told = QuasiRejection(beta, (divergence,)).diagnostics(LOG_P[DRAWS], LOG_Q[DRAWS])
    wanted = divergence((P / 2.5).log(), law(beta)).item()
    assert told.divergences[0] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@each_beta
def test_the_other_diagnostics_are_closed_forms(beta):
    told = QuasiRejection(beta).diagnostics(LOG_P[DRAWS] + 900, LOG_Q[DRAWS] + 900 - 0.0)
    q = LOG_Q.exp()
    assert told.acceptance == pytest.approx(torch.minimum(P / beta, q).sum().item())
    assert told.log_partition == pytest.approx(math.log(2.5))
    assert told.covered == pytest.approx((P[beta * q >= P * (1 - 1e-12)].sum() / 2.5).item())
    assert told.ess == pytest.approx(16 * 2.5**2 / (P.square() / q).sum().item())


def test_a_larger_beta_is_nearer_to_the_target_and_keeps_less():
    told = [QuasiRejection(b, DIVERGENCES).diagnostics(LOG_P[DRAWS], LOG_Q[DRAWS]) for b in BETAS]
    for one, next_ in pairwise(told):
        assert next_.acceptance <= one.acceptance
        assert all(
            b <= a * (1 + 1e-12) + 1e-12 for a, b in zip(one.divergences, next_.divergences, strict=True)
        )


def test_beyond_the_largest_ratio_it_is_rejection_sampling():
    told = QuasiRejection(12.8, (TV(), KL())).diagnostics(LOG_P[DRAWS], LOG_Q[DRAWS])
    assert told.divergences == pytest.approx((0, 0), abs=1e-12)
    assert told.acceptance == pytest.approx(2.5 / 12.8) and told.covered == pytest.approx(1)


def test_a_small_beta_samples_the_proposal_where_the_target_has_mass():
    close(law(1e-9).exp(), torch.where(P > 0, LOG_Q.exp(), 0.0) / 0.75)
    rule = QuasiRejection(1e-9)
    assert rule.accept(LOG_P, LOG_Q, torch.full((5,), 1 - 1e-12, dtype=torch.float64)).tolist() == [
        True,
        False,
    ] + 3 * [True]


def test_what_the_target_excludes_is_never_accepted_and_ratios_may_be_large():
    rule, zero = QuasiRejection(1e-300), torch.zeros(2, dtype=torch.float64)
    assert (
        rule.accept(torch.tensor([-math.inf, -1e4]), torch.tensor([-1e4, 1e4]), zero).tolist() == [False] * 2
    )
    assert rule.accept(torch.tensor([1e4, 3.0]), torch.tensor([-1e4, 3.0]), zero + 0.99).all()
    told = QuasiRejection(1e300).diagnostics(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4]))
    assert told.divergences == pytest.approx((0, 0), abs=1e-12) and told.ess == pytest.approx(1)


def test_wrong_settings_and_inputs_are_refused():
    for make, message in (
        (lambda: QuasiRejection(0.0), "finite number > 0"),
        (lambda: QuasiRejection(math.inf), "finite number > 0"),
        (lambda: QuasiRejection(1.0, (fdiv.Renyi(2.0),)), "QuasiRejection takes an f-divergence"),
        (lambda: QuasiRejection(1.0, TV()), "are a tuple"),
        (lambda: QuasiRejection().accept(LOG_P, LOG_Q, torch.zeros(4)), "as many uniform numbers"),
        (lambda: QuasiRejection().accept(LOG_P, LOG_Q, torch.ones(5)), r"in \[0, 1\)"),
        (lambda: QuasiRejection().diagnostics(LOG_P, LOG_Q[:3]), r"\[N\] both"),
        (lambda: QuasiRejection().diagnostics(LOG_P, LOG_Q - math.inf), "nan or infinite"),
        (lambda: QuasiRejection().diagnostics(LOG_P - math.inf, LOG_Q), "no mass at any of 5 draws"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


def test_the_object_is_its_recipe():
    rule = QuasiRejection(3.0, (TV(), JS(0.3)))
    assert fdiv.parse(repr(rule), PLUGINS) == rule
