"""GDC's lambdas by Newton: moments, the I-projection and refusals, on 27 answers with known probabilities."""

import math

import pytest
import torch
from tests.worlds import TRAJECTORIES, along_trajectories, close, of_tokens, prefix_table

from fdiv.divergences.kl import KL
from fdiv.methods.match.gdc import fit
from fdiv.methods.match.target import Exponential, Target

LOG_A = of_tokens(along_trajectories(prefix_table(seed=1))).sum(-1)  # [27]
A = LOG_A.exp()
SUMS = TRAJECTORIES.double().sum(1)
FIRST_IS_2 = (TRAJECTORIES[:, 0] == 2).double()
REPEATS = (TRAJECTORIES[:, 1] == TRAJECTORIES[:, 2]).double()
PHI = torch.stack([SUMS, FIRST_IS_2, REPEATS], 1)


def exact(features, moments, log_a=LOG_A, **options):
    """Fitted to all atoms with their own weights."""
    return fit(features, moments, log_weights=log_a, least_ess=0, **options)


def law(features, lambdas, log_a=LOG_A):
    return (log_a + features @ torch.tensor(lambdas, dtype=torch.float64)).log_softmax(0)


@pytest.mark.parametrize(
    ("features", "moments"),
    [
        (PHI[:, 1:2], (0.5,)),
        (PHI[:, 1:2], (0.999,)),
        (PHI[:, 2:], (1e-6,)),
        (PHI[:, :1], (5.9,)),
        (PHI, (2.5, 0.6, 0.2)),
        (PHI * torch.tensor([1e4, 1.0, 1e-4]), (2.5e4, 0.6, 0.2e-4)),
    ],
)
def test_the_fitted_law_has_the_moments(features, moments):
    found = exact(features, moments)
    mu = torch.tensor(moments, dtype=torch.float64)
    reached = law(features, found.lambdas).exp() @ features
    assert ((reached - mu).abs() < 1e-8 * mu.abs()).all()
    assert found.moments == pytest.approx(moments, rel=1e-8)
    assert found.iterations <= 25


def test_one_boolean_feature_has_a_closed_form():
    """lambda = logit(mu) - logit(E_a phi)."""
    rate = (A @ FIRST_IS_2).item()
    found = exact(FIRST_IS_2[:, None], (0.7,))
    assert found.lambdas[0] == pytest.approx(math.log(0.7 / 0.3) - math.log(rate / (1 - rate)), rel=1e-12)


def test_moments_that_the_base_model_has_need_no_lambda():
    found = exact(PHI, tuple((A @ PHI).tolist()))
    assert found.lambdas == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_fitted_law_is_the_projection_of_the_base_model():
    """KL(r, a) = KL(r, p) + KL(p, a) for every law r with the moments of p."""
    moments = (2.5, 0.6, 0.2)
    log_p = law(PHI, exact(PHI, moments).lambdas)
    for seed in range(3):
        tilt = torch.randn(27, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        log_b = (LOG_A + tilt).log_softmax(0)
        log_r = law(PHI, exact(PHI, moments, log_b).lambdas, log_b)
        close(log_r.exp() @ PHI, torch.tensor(moments, dtype=torch.float64), 1e-8)
        close(KL()(log_r, LOG_A), KL()(log_r, log_p) + KL()(log_p, LOG_A), 1e-8)
        assert KL()(log_r, LOG_A) > KL()(log_p, LOG_A) + 1e-3


def test_lambdas_make_the_target_of_the_moments():
    found = exact(PHI[:, :2], (2.5, 0.6))
    features = (lambda ids, mask: ids.sum(1), lambda ids, mask: ids[:, 0] == 2)
    target = Target() * Exponential(features, found.lambdas)
    log_p = target.log_score(LOG_A, TRAJECTORIES, torch.ones(27, 3).bool(), None)
    close(log_p.softmax(0) @ PHI[:, :2], torch.tensor([2.5, 0.6], dtype=torch.float64))


def test_samples_of_the_base_model_give_nearly_the_same():
    index = torch.multinomial(A, 20000, replacement=True, generator=torch.Generator().manual_seed(0))
    moments = (2.5, 0.6, 0.2)
    sampled, wanted = fit(PHI[index], moments), exact(PHI, moments)
    assert sampled.moments == pytest.approx(moments, rel=1e-10)  # of the samples
    assert sampled.lambdas == pytest.approx(wanted.lambdas, abs=0.1)
    weights = (law(PHI, wanted.lambdas) - LOG_A).exp()
    assert sampled.ess == pytest.approx(20000 / (A @ weights.square()).item(), rel=0.1)


def test_samples_of_another_model_count_by_their_log_weights():
    """27 samples, one of each answer: of the uniform law, with weights a / uniform."""
    found = fit(PHI, (2.5, 0.6, 0.2), log_weights=LOG_A + math.log(27) + 800, least_ess=0)
    assert found.lambdas == pytest.approx(exact(PHI, (2.5, 0.6, 0.2)).lambdas, rel=1e-9)


def test_samples_without_weight_are_left_out():
    """A hard constraint beside a distributional one: moments among the accepted answers."""
    log_a = torch.where(REPEATS == 1, LOG_A, -math.inf)
    kept = REPEATS == 1
    found, wanted = exact(PHI[:, :1], (2.5,), log_a), exact(PHI[kept, :1], (2.5,), LOG_A[kept])
    assert found == wanted


def test_each_prompt_is_normalised_on_its_own():
    """Two prompts with base models of their own share one lambda; the moment is the mean of both means."""
    other = of_tokens(along_trajectories(prefix_table(seed=4))).sum(-1)
    group = torch.arange(2).repeat_interleave(27)
    both = torch.cat([LOG_A, other + 5.0])  # a prompt's own scale does not matter
    found = exact(PHI[:, :2].repeat(2, 1), (2.5, 0.6), both, group=group)
    means = [law(PHI[:, :2], found.lambdas, log_a).exp() @ PHI[:, :2] for log_a in (LOG_A, other)]
    close(sum(means) / 2, torch.tensor([2.5, 0.6], dtype=torch.float64), 1e-8)
    assert (means[0] - means[1]).abs().max() > 0.01


def test_the_effective_sample_size_is_that_of_the_weights():
    features = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    found = fit(features, (0.5,), least_ess=1)
    assert found.ess == pytest.approx(1 / (3 * (1 / 6) ** 2 + 1 / 4))
    with pytest.raises(ValueError, match=r"only 3 of 4 samples carry .* least_ess 10: draw more"):
        fit(features, (0.5,))


@pytest.mark.parametrize("moment", [-0.1, 0.0, 6.0, 7.5])
def test_a_moment_outside_the_range_or_on_its_edge_is_refused_with_the_range(moment):
    with pytest.raises(ValueError, match=r"feature 1 .* between 0 and 6, both excluded"):
        exact(PHI[:, [1, 0]], (0.5, moment))


def test_the_range_is_that_of_the_samples_with_weight_in_each_prompt():
    features = torch.tensor([[0.0], [1.0], [1.0], [4.0], [-9.0]])
    logs, group = torch.tensor([0.0, 0, 0, 0, -math.inf]), torch.tensor([0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"between 0\.5 and 2\.5"):
        fit(features, (3.0,), log_weights=logs, group=group, least_ess=0)
    fit(features, (2.4,), log_weights=logs, group=group, least_ess=0)


def test_a_boolean_feature_that_is_to_hold_always_is_a_matter_of_accept():
    with pytest.raises(ValueError, match=r"feature 0 is to hold always.*write Accept\(feature\)"):
        exact(FIRST_IS_2[:, None], (1.0,))


@pytest.mark.parametrize("moments", [(0.5, 0.9), (0.3, 0.7), (0.3, 0.7 + 1e-13), (0.2, 0.8 - 1e-3 + 2e-3)])
def test_moments_that_are_possible_alone_but_not_together_are_refused(moments):
    """Two events that exclude each other: the sum of their chances is at most 1, and 1 is its edge."""
    events = torch.stack([FIRST_IS_2, (TRAJECTORIES[:, 0] == 1).double()], 1)
    with pytest.raises(ValueError, match="cannot be reached together"):
        exact(events, moments)
    exact(events, (0.3, 0.6999))


def test_features_that_depend_on_one_another_are_fitted_if_the_moments_agree():
    doubled = torch.cat([PHI[:, :1], 2 * PHI[:, :1], torch.ones(27, 1)], 1)
    found = exact(doubled, (2.5, 5.0, 1.0))
    assert found.moments == pytest.approx((2.5, 5.0, 1.0), rel=1e-9)
    assert found.lambdas[2] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="depend on one another"):
        exact(doubled, (2.5, 5.1, 1.0))
    with pytest.raises(ValueError, match=r"feature 2 .* between 1 and 1"):
        exact(doubled, (2.5, 5.0, 0.9))


def test_wrong_inputs_are_refused():
    for arguments, options, message in (
        ((PHI, (1.0,)), {}, "one column a moment"),
        ((PHI[:, 0], (1.0,)), {}, "one column a moment"),
        ((PHI[:, :0], ()), {}, "one column a moment"),
        ((PHI, (1.0, 0.5, math.nan)), {}, "finite"),
        ((PHI, (1.0, 0.5, 0.5)), {"log_weights": LOG_A[:3]}, "one each"),
        ((PHI, (1.0, 0.5, 0.5)), {"log_weights": LOG_A + math.inf}, "finite"),
        ((PHI, (1.0, 0.5, 0.5)), {"log_weights": LOG_A - math.inf}, "no sample has weight"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(*arguments, **options)
