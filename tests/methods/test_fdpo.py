"""f-DPO: the paper's scores in fdiv's direction, its gradient, and the optimum that it must find.

The paper's ratio is t = policy / reference; here u = reference / policy = 1 / t and l = log t.
"""

import math
from functools import cache
from itertools import combinations

import pytest
import torch
from tests.worlds import DIVERGENCES, close, gradient, kl_and_twice_its_reverse
from torch.nn.functional import logsigmoid, softplus

import fdiv
from fdiv import FDPO
from fdiv.methods._method import Method

L = torch.tensor([-9.0, -3.0, -0.4, 0.0, 0.2, 1.7, 8.0], dtype=torch.float64)

ADMISSIBLE = (
    fdiv.ReverseKL(),
    fdiv.KL(),
    fdiv.Jeffreys(),
    fdiv.JS(0.1),
    fdiv.JS(0.7),
    2 * fdiv.JS(0.5),
    fdiv.SkewReverseKL(0.1),
    fdiv.Alpha(0.3),
    fdiv.Alpha(1.7),
    fdiv.SquaredHellinger(),
    fdiv.Pearson(),
    fdiv.SoftenedKL(),
    fdiv.ChiKL(0.5),
    fdiv.ChiKL(0.5).reverse,
    0.7 * fdiv.KL() + 0.3 * fdiv.TV(),
    fdiv.Generator(kl_and_twice_its_reverse),
)
# The paper's chi-square, Le Cam, alpha < 0 of ours (its power above 1), skewed reverse and softened KL.
INADMISSIBLE = (
    fdiv.Neyman(),
    fdiv.TV(),
    fdiv.Triangular(),
    fdiv.Alpha(-0.5),
    fdiv.SkewKL(0.1),
    fdiv.SoftenedReverseKL(),
)
each_admissible = pytest.mark.parametrize("divergence", ADMISSIBLE, ids=repr)
each_smooth = pytest.mark.parametrize("divergence", [d for d in ADMISSIBLE if d.is_smooth], ids=repr)


def pairs(log_ratio_chosen, log_ratio_rejected):
    """A method's arguments, with a reference of log-probability -1 everywhere."""
    p = torch.full_like(log_ratio_chosen, -1.0)
    return {
        "log_p_chosen": p,
        "log_p_rejected": p,
        "log_q_chosen": p + log_ratio_chosen,
        "log_q_rejected": p + log_ratio_rejected,
    }


# -- scores --------------------------------------------------------------------------------------------

SCORES = [
    (fdiv.ReverseKL(), lambda x: x),
    (fdiv.KL(), lambda x: 1 - (-x).exp()),
    (2 * fdiv.JS(0.5), lambda x: math.log(2) + logsigmoid(x)),
    (fdiv.Alpha.fdpo(0.3), lambda x: (1 - (-0.3 * x).exp()) / 0.3),
    (fdiv.Alpha.fdpo(0.7), lambda x: (1 - (-0.7 * x).exp()) / 0.7),
    (fdiv.ChiKL(0.5).reverse, lambda x: x + x.exp() - 1),  # chi-PO
    (fdiv.Jeffreys(), lambda x: x - torch.expm1(-x)),
    (fdiv.SquaredHellinger(), lambda x: -torch.expm1(-x / 2) / 2),
    (fdiv.Pearson(), lambda x: -torch.expm1(-2 * x)),
    (fdiv.SoftenedKL(), lambda x: softplus(-x) - math.log(2) - torch.expm1(-x)),
]
# w(t) = t f''(t), the weight of a log-probability in the gradient.
WEIGHTS = [
    (fdiv.ReverseKL(), lambda t: torch.ones_like(t)),
    (fdiv.KL(), lambda t: 1 / t),
    (2 * fdiv.JS(0.5), lambda t: 1 / (1 + t)),
    (2 * fdiv.SquaredHellinger(), lambda t: t**-0.5 / 2),
    (fdiv.Pearson(), lambda t: 2 * t**-2),
    (fdiv.Jeffreys(), lambda t: 1 + 1 / t),
    (fdiv.Alpha.fdpo(0.3), lambda t: t**-0.3),
    (fdiv.ChiKL(0.5).reverse, lambda t: 1 + t),
    (fdiv.SoftenedKL(), lambda t: 1 / (t * (1 + t))),
]


def by_divergence(rows, name):
    return pytest.mark.parametrize(("divergence", name), rows, ids=[repr(d) for d, _ in rows])


@by_divergence(SCORES, "score")
def test_the_scores_are_the_papers(divergence, score):
    close(FDPO(divergence).score(torch.zeros_like(L), L), score(L), 1e-12)


def test_trl_mirrors_the_papers_alpha():
    assert fdiv.Alpha.trl(0.3) == fdiv.Alpha.fdpo(0.7) != fdiv.Alpha.fdpo(0.3)
    a = 0.3  # TRL >= 0.29: (e^((a - 1) l) - 1) / (a - 1)
    close(FDPO(fdiv.Alpha.trl(a)).score(torch.zeros_like(L), L), torch.expm1((a - 1) * L) / (a - 1), 1e-12)
    close(FDPO(fdiv.Alpha.trl(1.0)).score(torch.zeros_like(L), L), L, 1e-14)  # DPO


def test_reverse_kl_is_dpo():
    loss = FDPO(beta=0.3)(**pairs(L, L.flip(0) / 2)).loss
    close(loss, -logsigmoid(0.3 * (L - L.flip(0) / 2)).mean(), 1e-14)


# -- gradient ------------------------------------------------------------------------------------------


@by_divergence(WEIGHTS, "weight")
def test_the_gradient_is_the_papers_with_its_weights(divergence, weight):
    chosen = L.clone().requires_grad_()
    rejected = (L.flip(0) / 2 - 0.3).requires_grad_()
    method = FDPO(divergence, beta=0.7)
    out = method(**pairs(chosen, rejected))
    zero = torch.zeros_like(L)
    margin = 0.7 * (method.score(zero, chosen) - method.score(zero, rejected))
    push = (0.7 * torch.sigmoid(-margin) / len(L)).detach()
    close(gradient(out.loss, chosen), -push * weight(chosen.detach().exp()), 1e-10)
    close(gradient(out.loss, rejected), push * weight(rejected.detach().exp()), 1e-10)


def test_at_the_reference_all_smooth_divergences_agree_up_to_their_curvature():
    steps = []
    for divergence in (d for d in ADMISSIBLE if d.is_smooth):
        at_reference = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        loss = FDPO(divergence)(**pairs(at_reference, torch.zeros_like(at_reference))).loss
        steps.append(gradient(loss, at_reference) / divergence.curvature_at_one)
    close(torch.cat(steps), torch.full((len(steps),), -0.05, dtype=torch.float64))


def test_the_reference_receives_no_gradient():
    tensors = {name: t.requires_grad_() for name, t in pairs(L, L.flip(0)).items() if "q" in name}
    reference = torch.full_like(L, -1.0).requires_grad_()
    FDPO()(log_p_chosen=reference, log_p_rejected=reference, **tensors).loss.backward()
    assert reference.grad is None


@pytest.mark.parametrize("size", [95.0, 200.0, 1e4])
@each_admissible
def test_log_ratios_far_beyond_the_range_of_exp_give_finite_values_and_gradients(divergence, size):
    far = torch.tensor([size, size, -size, -size, 0.0])
    log_ratios = [
        far.clone().requires_grad_(),
        torch.tensor([-size, size, size, -size, size]).requires_grad_(),
    ]
    method = FDPO(divergence)
    out = method(**pairs(*log_ratios))
    assert method.score(torch.zeros_like(far), far).isfinite().all()
    assert out.loss.isfinite()
    assert gradient(out.loss, *log_ratios).isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())


# -- the optimum ---------------------------------------------------------------------------------------

STRENGTHS = torch.tensor([1, 2, 3, 4])
REWARDS = STRENGTHS.double().log()  # so that answer i beats j in i of i + j comparisons
REFERENCE = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)


def halve(function, low, high, steps=38):
    """The root of an increasing function, elementwise."""
    for _ in range(steps):
        middle = (low + high) / 2
        below = function(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@cache
def optimum(divergence, beta):
    """argmax over pi of E_pi[r] - beta D(reference, pi): where beta psi = r - multiplier, by bisection."""

    def log_ratio(multiplier):  # [...] -> [..., answers]
        target = (REWARDS - multiplier.unsqueeze(-1)) / beta
        bounds = torch.full_like(target, -12.0), torch.full_like(target, 12.0)
        return halve(lambda x: divergence.psi(-x) - target, *bounds)

    low, high = REWARDS.min(), REWARDS.max()  # of the multiplier: pi/reference is 1 on average
    for _ in range(4):
        grid = torch.lerp(low, high, torch.linspace(0, 1, 1025, dtype=torch.float64))
        mass = (REFERENCE * log_ratio(grid).exp()).sum(-1)  # falls as the multiplier grows
        first = int((mass <= 1).nonzero()[0])
        low, high = grid[max(first - 1, 0)], grid[first]
    return REFERENCE * log_ratio((low + high) / 2).exp()


def every_comparison():
    """Winners and losers, each pair as often as Bradley and Terry's chances have it."""
    rows = [
        (i, j)
        for a, b in combinations(range(4), 2)
        for i, j, times in ((a, b, STRENGTHS[a]), (b, a, STRENGTHS[b]))
        for _ in range(times)
    ]
    return torch.tensor(rows).T


def compared(log_policy):
    winners, losers = every_comparison()
    return {
        "log_p_chosen": REFERENCE.log()[winners],
        "log_p_rejected": REFERENCE.log()[losers],
        "log_q_chosen": log_policy[winners],
        "log_q_rejected": log_policy[losers],
    }


def test_the_oracle_is_the_closed_form_of_reverse_kl():
    closed = REFERENCE * (REWARDS / 0.5).exp()
    close(optimum(fdiv.ReverseKL(), beta=0.5), closed / closed.sum(), 1e-10)


@each_smooth
def test_reward_differences_are_read_off_the_optimum(divergence):
    best = optimum(divergence, beta=2.0)
    assert abs(best.sum() - 1) < 1e-9
    rewards = 2.0 * FDPO(divergence, beta=2.0).score(REFERENCE.log(), best.log())
    close(rewards - rewards[0], REWARDS - REWARDS[0], 1e-8)


@each_smooth
def test_training_on_all_comparisons_converges_to_the_optimum(divergence):
    method = FDPO(divergence, beta=2.0)
    logits = REFERENCE.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=100, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = method(**compared(logits.log_softmax(-1))).loss
        loss.backward()
        return loss

    optimiser.step(closure)
    close(logits.detach().softmax(-1), optimum(divergence, beta=2.0), 1e-6)


@pytest.mark.parametrize("divergence", INADMISSIBLE, ids=repr)
def test_a_bounded_price_for_leaving_a_response_is_refused_with_the_reason(divergence):
    with pytest.raises(TypeError, match="optima drop responses and no reward can be recovered") as refusal:
        FDPO(divergence)
    assert f"{divergence!r} + 0.1 * ReverseKL()" in str(refusal.value)
    FDPO(divergence + 0.1 * fdiv.ReverseKL())  # what the message says to write


def test_every_divergence_of_the_catalogue_is_listed_on_one_side():
    assert {repr(d) for d in DIVERGENCES} <= {repr(d) for d in ADMISSIBLE + INADMISSIBLE}


def test_what_is_no_f_divergence_is_refused():
    for other in (fdiv.Renyi(0.5), "reverse_kl", fdiv.KL):
        with pytest.raises(TypeError, match="FDPO takes an f-divergence"):
            FDPO(other)


# -- losses and metrics --------------------------------------------------------------------------------


def test_label_smoothing_hinge_and_ipo_have_their_closed_values():
    chosen, rejected = L, L.flip(0) / 2
    gap = (-rejected).exp() - (-chosen).exp()  # of the scores 1 - 1/t
    arguments = pairs(chosen, rejected)

    def loss(**settings):
        return FDPO(fdiv.KL(), beta=0.2, **settings)(**arguments).loss

    margin = 0.2 * gap
    close(loss(), -logsigmoid(margin).mean())
    close(loss(label_smoothing=0.1), -(0.9 * logsigmoid(margin) + 0.1 * logsigmoid(-margin)).mean())
    close(loss(loss="hinge"), (1 - margin).relu().mean())
    close(loss(loss="ipo"), (gap - 1 / 0.4).square().mean())


def test_ipo_is_zero_at_its_margin():
    chosen, rejected = torch.tensor([2.5 + 1.0]).double(), torch.tensor([1.0]).double()
    assert FDPO(beta=0.2, loss="ipo")(**pairs(chosen, rejected)).loss < 1e-20


@each_admissible
def test_the_metrics_are_of_the_reward_that_is_optimised(divergence):
    chosen, rejected = L, torch.full_like(L, 0.1)
    method = FDPO(divergence, beta=0.3)
    metrics = method(**pairs(chosen, rejected)).metrics
    zero = torch.zeros_like(L)
    rewards = [0.3 * method.score(zero, side) for side in (chosen, rejected)]
    close(metrics["reward_chosen"], rewards[0].mean())
    close(metrics["reward_rejected"], rewards[1].mean())
    close(metrics["margin"], (rewards[0] - rewards[1]).mean())
    assert metrics["accuracy"].item() == pytest.approx((rewards[0] > rewards[1]).double().mean().item())
    close(metrics["log_ratio_chosen"], chosen.mean())
    close(metrics["log_ratio_rejected"], rejected.mean())
    assert metrics["linearised"] == 0
    assert not any(value.requires_grad for value in metrics.values())


def test_log_ratios_that_were_continued_linearly_are_counted():
    metrics = FDPO(fdiv.KL())(**pairs(torch.tensor([0.0, 500.0]), torch.tensor([-500.0, -20.0]))).metrics
    assert metrics["linearised"] == 0.5


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"beta": 0.0}, "beta must be > 0"),
        ({"loss": "exo"}, "'sigmoid', 'hinge' or 'ipo'"),
        ({"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "belongs to loss='sigmoid'"),
    ):
        with pytest.raises(ValueError, match=message):
            FDPO(**settings)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = FDPO(fdiv.ChiKL(0.5).reverse, beta=0.3, loss="hinge")
    assert fdiv.parse(repr(method)) == method
    assert isinstance(method, Method)
