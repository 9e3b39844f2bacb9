"""f-DPO: training on all comparisons of four answers finds the policy that maximises E[r] - beta D(ref, pi).

That policy is made by searching grids for the roots of beta psi = r - multiplier, without any method.
"""

import math
from functools import cache
from itertools import combinations

import pytest
import torch
from tests.thinned import thinned
from tests.worlds import DIVERGENCES, close

import fdiv
from fdiv import FDPO

# The catalogue in both directions, as far as it is admissible; see test_fdpo.py for the others.
CATALOGUE = {repr(d): d for given in DIVERGENCES for d in (given, given.reverse)}
ADMISSIBLE = [d for d in CATALOGUE.values() if d.reverse.slope_at_zero == -math.inf]
SMOOTH = [2 * fdiv.JS(0.5), *(d for d in ADMISSIBLE if d.is_smooth)]
KINKED = [d for d in ADMISSIBLE if not d.is_smooth]

STRENGTHS = (1, 2, 3, 4)
REWARDS = torch.tensor(STRENGTHS).double().log()  # so that answer i beats j in i of i + j comparisons
REFERENCE = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
BETA = 0.5


def root(increasing, low, high):
    """Where an increasing function is 0, elementwise: the cell of a grid where its sign changes, refined."""
    for _ in range(9):
        points = torch.linspace(0, 1, 33, dtype=torch.float64)
        grid = torch.lerp(low.unsqueeze(-1), high.unsqueeze(-1), points)
        above = (increasing(grid) < 0).sum(-1, keepdim=True).clamp(1, 32)
        low, high = (grid.gather(-1, i).squeeze(-1) for i in (above - 1, above))
    return (low + high) / 2


@cache
def optimum(divergence, beta=BETA):
    """argmax over pi of E_pi[r] - beta D(reference, pi), where pi/reference averages to 1; [4]."""

    def ratio(multiplier):  # [...] -> [..., 4]
        target = (REWARDS - multiplier.unsqueeze(-1)) / beta
        bounds = torch.full_like(target, -40.0), torch.full_like(target, 40.0)
        return root(lambda x: divergence.psi(-x) - target.unsqueeze(-1), *bounds).exp()

    def spare(multiplier):
        return 1 - (REFERENCE * ratio(multiplier)).sum(-1)

    return REFERENCE * ratio(root(spare, REWARDS.min(), REWARDS.max()))


def comparisons(wins):
    """Winners and losers, i over j in `wins(i, j)` rows; [rows] each."""
    both_ways = [pair for a, b in combinations(range(4), 2) for pair in ((a, b), (b, a))]
    return torch.tensor([(i, j) for i, j in both_ways for _ in range(wins(STRENGTHS[i], STRENGTHS[j]))]).T


BRADLEY_TERRY = comparisons(lambda i, j: i)  # of i + j
FLIPPED = comparisons(lambda i, j: 4 * i + j)  # of 5 (i + j): each label is wrong with chance 1/5


def compared(log_policy, rows):
    winners, losers = rows
    return {
        "log_p_chosen": REFERENCE.log()[winners],
        "log_p_rejected": REFERENCE.log()[losers],
        "log_q_chosen": log_policy[winners],
        "log_q_rejected": log_policy[losers],
    }


def trained(method, rows=BRADLEY_TERRY, start=REFERENCE):
    """The policy after Newton's steps on the method's own loss over all comparisons, from `start`; [4]."""

    def policy(free):  # the first logit stays
        return (start.log() + torch.cat([free.new_zeros(1), free])).log_softmax(-1)

    def loss(free):
        return method(**compared(policy(free), rows)).loss

    free = torch.zeros(3, dtype=torch.float64)
    for _ in range(40):
        at = free.clone().requires_grad_()
        value = loss(at)
        (slope,) = torch.autograd.grad(value, at)
        if slope.abs().max() < 1e-14:
            break
        curvatures, axes = torch.linalg.eigh(torch.autograd.functional.hessian(loss, free))
        step = -axes @ ((axes.T @ slope) / curvatures.abs().clamp(min=1e-6))  # downhill from a saddle, too
        while step.abs().max() > 1e-7 and loss(free + step) > value:
            step = step / 2
        free = free + step
    return policy(free).exp()


def read_off(divergence, policy, beta=BETA):
    """The rewards that a policy implies, less the first one's."""
    rewards = beta * FDPO(divergence).score(REFERENCE.log(), policy.log())
    return rewards - rewards[0]


def test_the_oracle_has_the_closed_forms_of_kl_and_chi_po():
    closed = REFERENCE * (REWARDS / BETA).exp()
    close(optimum(fdiv.ReverseKL()), closed / closed.sum(), 1e-10)
    forward = REFERENCE / optimum(fdiv.KL())  # 1 - (r - multiplier) / beta
    close(REWARDS + BETA * forward, (REWARDS + BETA * forward).mean().expand(4), 1e-10)
    t = optimum(fdiv.ChiKL(0.5).reverse) / REFERENCE
    close(REWARDS - BETA * (t + t.log()), (REWARDS - BETA * (t + t.log())).mean().expand(4), 1e-9)


@pytest.mark.parametrize("divergence", thinned(SMOOTH), ids=repr)
def test_training_on_all_comparisons_converges_to_the_optimum(divergence):
    best = optimum(divergence)
    assert abs(best.sum() - 1) < 1e-10
    close(trained(FDPO(divergence, beta=BETA)), best, 1e-8)


@pytest.mark.parametrize("divergence", SMOOTH, ids=repr)
def test_reward_differences_are_read_off_the_optimum(divergence):
    close(read_off(divergence, optimum(divergence)), REWARDS - REWARDS[0], 1e-9)


@pytest.mark.parametrize("divergence", KINKED, ids=repr)
def test_a_kink_is_trained_where_no_reward_falls_into_it(divergence):
    dpo = optimum(fdiv.ReverseKL(), beta=0.2)  # a start: at the reference the slope is no slope
    close(trained(FDPO(divergence, beta=0.2), start=dpo), optimum(divergence, beta=0.2), 1e-8)


@pytest.mark.parametrize(("divergence", "beta"), [(KINKED[0], 0.4), (KINKED[1], 0.3)], ids=repr)
def test_a_kink_keeps_answers_at_the_reference_and_hides_their_rewards(divergence, beta):
    best = optimum(divergence, beta)
    stays = (best / REFERENCE - 1).abs() < 1e-9
    assert stays.tolist() == [False, False, True, False]
    error = (read_off(divergence, best, beta) - (REWARDS - REWARDS[0])).abs()
    assert error[~stays].max() < 1e-9 and error[stays].min() > 1e-3


@pytest.mark.parametrize("divergence", [fdiv.ReverseKL(), fdiv.KL(), 2 * fdiv.JS(0.5)], ids=repr)
def test_robust_training_undoes_labels_that_are_flipped(divergence):
    best = optimum(divergence)
    robust = trained(FDPO(divergence, beta=BETA, loss="robust", label_smoothing=0.2), FLIPPED)
    close(robust, best, 1e-8)
    assert (trained(FDPO(divergence, beta=BETA), FLIPPED) - best).abs().max() > 0.01
