"""R2PVI: exact robust value iteration on tables, its regressions, its penalties, and what it refuses."""

import math

import pytest
import torch
from tests.worlds import close

from fdiv import JS, KL, TV, Alpha, Neyman, Pearson, Renyi, SquaredHellinger
from fdiv.methods.robust.r2pvi import R2PVI, Plan, best_level
from fdiv.notation import parse

STATES, ACTIONS, STEPS, VISITS = 4, 2, 3, 20
RIDGE = 0.3
SHRUNK = [(KL(), 0.4), (KL(), 5.0), (Pearson(), 0.2), (Pearson(), 3.0)]
OTHERS = [(Alpha(1.5), 0.5), (SquaredHellinger(), 0.6), (Neyman(), 0.5)]


def table():
    """Counts of what followed [steps - 1, state-actions, states], and rewards [steps, state-actions]."""
    source = torch.Generator().manual_seed(0)
    pairs = STATES * ACTIONS
    chances = torch.rand(STEPS - 1, pairs, STATES, generator=source, dtype=torch.float64) ** 2
    draws = chances.flatten(0, 1).multinomial(VISITS, replacement=True, generator=source)
    counts = torch.zeros(len(draws), STATES, dtype=torch.float64)
    counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    rewards = torch.rand(STEPS, pairs, generator=source, dtype=torch.float64)
    return counts.view(STEPS - 1, pairs, STATES), rewards


def transitions(counts):
    """The same as rows with one-hot features of state and action."""
    pairs = STATES * ACTIONS
    done = torch.eye(pairs, dtype=torch.float64).repeat_interleave(VISITS, 0)
    of_state = torch.eye(pairs, dtype=torch.float64).view(STATES, ACTIONS, pairs)
    followed = [
        torch.cat([torch.arange(STATES).repeat_interleave(row.long()) for row in step]) for step in counts
    ]
    return done.expand(STEPS, -1, -1), torch.stack([of_state[states] for states in followed])


def dual(values, chances, divergence, lam):
    """The largest eta - lam E f*((eta - v)/lam) for each row of chances, by golden sections."""

    def height(eta):
        slope = (eta - values) / lam
        return (eta - lam * (chances * divergence.conjugate(slope)).sum(-1, keepdim=True)).nan_to_num(
            -math.inf
        )

    spread = values.max() - values.min()
    low = values.min() + lam * max(divergence.slope_at_zero, -50.0) + 0 * chances[:, :1]
    high = low.maximum(values.min() + min(spread + 5 * lam, lam * divergence.slope_at_infinity))
    for _ in range(45):
        inner = 0.618034 * (high - low)
        left, right = high - inner, low + inner
        better = height(left) > height(right)
        low, high = torch.where(better, low, left), torch.where(better, right, high)
    return height((low + high) / 2).squeeze(-1)


def exact(counts, rewards, worst):
    """Value iteration; worst(values [states], counts [state-actions, states]) are the robust expectations."""
    action_values = rewards[-1]
    for step in range(STEPS - 2, -1, -1):
        seen = counts[step].sum(0) > 0
        values = action_values.view(STATES, ACTIONS).amax(-1)
        action_values = rewards[step] + worst(values[seen], counts[step][:, seen])
    return action_values


def planned(method, counts, rewards):
    features, next_features = transitions(counts)
    plan = method(features, next_features, theta=rewards)
    return method.action_values(plan, 0, torch.eye(STATES * ACTIONS, dtype=torch.float64))


# -- tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "lam"), SHRUNK + OTHERS, ids=repr)
def test_on_a_table_it_is_exact_robust_value_iteration(divergence, lam):
    """The ridge adds as many observations of the value 0 as it weighs."""
    counts, rewards = table()

    def worst(values, counts):
        counts = torch.cat([counts, torch.full((len(counts), 1), RIDGE)], -1)
        return dual(torch.cat([values, torch.zeros(1)]), counts / (VISITS + RIDGE), divergence, lam)

    method = R2PVI(divergence, lam, beta=0.0, ridge=RIDGE)
    close(planned(method, counts, rewards), exact(counts, rewards, worst), 1e-8)


@pytest.mark.parametrize("lam", [0.1, 0.5, 3.0])
def test_on_a_table_total_variation_is_exact_too(lam):
    counts, rewards = table()

    def worst(values, counts):
        return counts @ values.clamp(max=values.min() + lam) / (VISITS + RIDGE)

    close(planned(R2PVI(TV(), lam, 0.0, RIDGE), counts, rewards), exact(counts, rewards, worst))


@pytest.mark.parametrize("divergence", [KL(), TV(), Pearson(), JS(0.5)], ids=repr)
def test_an_infinite_price_is_nominal_value_iteration_and_a_large_one_comes_close(divergence):
    counts, rewards = table()
    nominal = exact(counts, rewards, lambda values, counts: counts @ values / (VISITS + RIDGE))
    close(planned(R2PVI(divergence, math.inf, 0.0, RIDGE), counts, rewards), nominal)
    close(planned(R2PVI(divergence, 1e6, 0.0, RIDGE), counts, rewards), nominal, 1e-5)
    robust = planned(R2PVI(divergence, 0.3, 0.0, RIDGE), counts, rewards)
    assert (robust <= nominal + 1e-12).all() and (robust < nominal - 1e-3).any()


# -- regressions ---------------------------------------------------------------------------------------


def one_feature(method, values):
    """nu of a single feature that was seen once for each value; the stopping values are what follows."""
    rows = len(values)
    plan = method(torch.ones(2, rows, 1).double(), torch.ones(1, rows, 1, 1).double(), next_stop=values[None])
    return plan.weights[0, 0]


def test_the_authors_regression_of_kl_is_optimistic_and_the_other_one_is_not():
    values, lam, ridge = torch.tensor([0.2, 0.9, 1.4], dtype=torch.float64), 0.5, 0.7
    settings = {"divergence": KL(), "lam": lam, "ridge": ridge, "beta": 0.0, "reward_max": 5.0}
    unbiased = -lam * ((-values / lam).exp().mean()).log()
    zeros = one_feature(R2PVI(**settings, shrink_to="zeros"), values)
    close(zeros, unbiased + lam * math.log(1 + ridge / 3))
    ones = one_feature(R2PVI(**settings), values)
    close(ones, -lam * ((((-values / lam).exp().sum() + ridge) / (3 + ridge)).log()))
    assert ones < unbiased < zeros


def test_a_factor_without_data_is_worth_nothing_or_by_the_authors_everything():
    features = torch.tensor([[[1.0, 0.0]]]).double().expand(2, 1, 2)
    stop = torch.tensor([[1.5]]).double()
    for shrink_to, worth in (("ones", 0.0), ("zeros", 6.0)):
        method = R2PVI(KL(), reward_max=3.0, beta=0.0, shrink_to=shrink_to)
        plan = method(features, features[:1, :, None], next_stop=stop)
        assert plan.weights[0, 1].item() == pytest.approx(worth, abs=1e-12)
    for divergence in (TV(), Pearson(), JS(0.5)):
        plan = R2PVI(divergence, beta=0.0)(features, features[:1, :, None], next_stop=stop)
        assert plan.weights[0, 1].item() == pytest.approx(0.0, abs=1e-12)


def test_the_best_level_is_that_of_a_fine_grid_also_with_negative_weights():
    source = torch.Generator().manual_seed(3)
    weights = torch.randn(6, 9, generator=source, dtype=torch.float64) / 3
    weights[0] = torch.rand(9, generator=source).double() / 9
    values = torch.cat([torch.rand(8, generator=source).double() * 2, torch.tensor([0.0]).double()])
    levels = torch.linspace(0, values.max().item(), 20001, dtype=torch.float64)
    capped = values.minimum(levels[:, None])
    for lam in (0.05, 0.4, 4.0):
        mean, square = capped @ weights.T, capped.square() @ weights.T
        grid = (mean + (mean.square() - square) / (4 * lam)).amax(0)
        found = best_level(weights, values, lam)
        assert (found >= grid - 1e-12).all()
        close(found, grid, 1e-5)


def test_soft_features_take_the_three_duals_of_the_paper_and_no_other():
    source = torch.Generator().manual_seed(1)
    features = torch.rand(3, 30, 5, generator=source).double().softmax(-1)
    following = torch.rand(2, 30, 2, 5, generator=source).double().softmax(-1)
    theta = torch.rand(3, 5, generator=source).double()
    for divergence in (KL(), TV(), 0.5 * TV() + 0.5 * TV(), Pearson()):
        plan = R2PVI(divergence, beta=0.01)(features, following, theta=theta)
        assert plan.weights.isfinite().all()
    with pytest.raises(ValueError, match=r"negative weights .*take TV\(\), KL\(\) or Pearson\(\)"):
        R2PVI(JS(0.5), beta=0.01)(features, following, theta=theta)


# -- penalties, limits and refusals --------------------------------------------------------------------


def test_the_two_penalties_are_their_formulas_and_the_papers_is_the_larger():
    inverse = torch.tensor([[[0.5, 0.1], [0.1, 0.2]]], dtype=torch.float64)
    plan = Plan(torch.tensor([[0.9, 0.6]], dtype=torch.float64), inverse)
    phi = torch.tensor([0.3, 0.7], dtype=torch.float64)
    paper, authors = (
        R2PVI(beta=0.4, penalty=penalty).action_values(plan, 0, phi) for penalty in ("paper", "authors")
    )
    value = 0.3 * 0.9 + 0.7 * 0.6
    close(paper, torch.tensor(value - 0.4 * (0.3 * math.sqrt(0.5) + 0.7 * math.sqrt(0.2))).double(), 1e-7)
    close(authors, torch.tensor(value - 0.4 * math.sqrt(0.09 * 0.5 + 0.49 * 0.2)).double(), 1e-7)
    assert paper < authors
    one_hot = torch.eye(2, dtype=torch.float64)
    close(
        R2PVI(beta=0.4).action_values(plan, 0, one_hot),
        R2PVI(beta=0.4, penalty="authors").action_values(plan, 0, one_hot),
    )


def test_values_stay_between_nothing_and_what_is_left_to_win():
    plan = Plan(torch.full((3, 1), 9.0), torch.full((3, 1, 1), 0.1))
    phi = torch.ones(1)
    assert [R2PVI(reward_max=2.0).action_values(plan, h, phi).item() for h in range(3)] == [6.0, 4.0, 2.0]
    assert R2PVI(beta=100.0).action_values(plan, 0, phi).item() == 0.0


@pytest.mark.parametrize("divergence", [KL(), TV(), Pearson(), JS(0.5)], ids=repr)
def test_extreme_prices_and_values_stay_finite(divergence):
    for values in (torch.tensor([0.0, 1e4, 20.0]), torch.tensor([7.0, 7.0, 7.0])):
        for lam in (1e-6, 1e6):
            method = R2PVI(divergence, lam, beta=0.0, ridge=1e-3, reward_max=1e4)
            nu = one_feature(method, values.double())
            assert nu.isfinite() and -1e-9 <= nu <= values.mean() + 1e-6
    shrink_to_zeros = R2PVI(KL(), 1e-6, beta=0.0, reward_max=1e4, shrink_to="zeros")
    assert one_feature(shrink_to_zeros, torch.tensor([3.0, 1e4]).double()).item() == pytest.approx(
        3.0, abs=1e-4
    )


def test_what_cannot_be_planned_is_refused():
    for settings, message in (
        ({"lam": 0.0}, "lam is > 0"),
        ({"lam": math.nan}, "lam is > 0"),
        ({"ridge": 0.0}, "ridge is > 0"),
        ({"reward_max": -1.0}, "reward_max is > 0"),
        ({"beta": -0.1}, "beta is >= 0"),
        ({"penalty": "none"}, "'paper' or 'authors'"),
        ({"divergence": TV(), "shrink_to": "zeros"}, r"'zeros' for KL\(\) alone"),
        ({"shrink_to": "zero"}, r"'zeros' for KL\(\) alone"),
    ):
        with pytest.raises(ValueError, match=message):
            R2PVI(**settings)
    with pytest.raises(TypeError, match="R2PVI takes an f-divergence"):
        R2PVI(Renyi(2.0))
    one = torch.ones(2, 3, 1)
    for features, following in ((one, one), (one, torch.ones(1, 2, 1, 1)), (one[:, :0], one[:1, :0, None])):
        with pytest.raises(ValueError, match=r"features are \[steps, rows >= 1, d\]"):
            R2PVI()(features, following)
    for features in (2 * one, -one):
        with pytest.raises(ValueError, match="sum to one"):
            R2PVI()(features, one[:1, :, None])


def test_the_object_is_its_recipe():
    method = R2PVI(TV(), lam=0.3, beta=0.5, penalty="authors")
    assert eval(repr(method), {"R2PVI": R2PVI, "TV": TV}) == method
    assert parse(repr(method.divergence)) == method.divergence
