"""f-SFT: its weights in closed form, SFT at its ends, and the imitation problem that it solves."""

import math

import pytest
import torch
from tests.thinned import fewer
from tests.worlds import DIVERGENCES, LOG_P, close, each_divergence, each_other_object, gradient, random_rows

import fdiv
from fdiv import JS, KL, SFT, TV, Neyman, Pearson, ReverseKL, SquaredHellinger
from fdiv.methods._method import Method
from fdiv.methods.prefer.implicit_reward_sft import ImplicitRewardSFT, implicit_reward

HELLINGER = 2 * SquaredHellinger()  # sum (sqrt p - sqrt q)^2
REWARDS = torch.tensor([-0.6, -0.3, 0.0, 0.4, 1.3, 2.5, 7.0], dtype=torch.float64)
# phi and its derivative, of IQ-Learn's table; its divergences are of (policy, demonstrations).
TABLE = [
    (TV(), lambda r: r, torch.ones_like),
    (ReverseKL(), lambda r: 1 - (-r).exp(), lambda r: (-r).exp()),
    (Neyman(), lambda r: torch.where(r < 2, r - r * r / 4, 1.0), lambda r: (1 - r / 2).clamp(min=0)),
    (HELLINGER, lambda r: r / (1 + r), lambda r: (1 + r) ** -2),
    (2 * JS(0.5), lambda r: (2 - (-r).exp()).log(), lambda r: (-r).exp() / (2 - (-r).exp())),
    (KL(), lambda r: (1 + r).log(), lambda r: 1 / (1 + r)),
    (Pearson(), lambda r: 2 * (1 + r).sqrt() - 2, lambda r: (1 + r) ** -0.5),
]
each_row = pytest.mark.parametrize(
    ("divergence", "phi", "weight"), TABLE, ids=[repr(row[0]) for row in TABLE]
)

SEQUENCE = torch.tensor([0, 0, 0, 1, 3, 3])  # response 2 is empty
LENGTHS = torch.tensor([3, 1, 0, 2])


def text(scale=0.4):
    """The reference's and the policy's log-probabilities of six tokens; the policy's are parameters."""
    log_p, log_q = (scale * rows - 1.5 for rows in random_rows(2, 6))
    return log_p, log_q.detach().requires_grad_()


def loss_of(method, log_p, log_q, **more):
    return method(log_p_label=log_p, log_q_label=log_q, sequence=SEQUENCE, **more)


def log_ratios(log_p, log_q):
    """Summed over each response."""
    return torch.stack([(log_q - log_p)[response == SEQUENCE].sum() for response in range(4)])


# -- weights -------------------------------------------------------------------------------------------


@each_row
def test_phi_and_the_weight_are_iq_learns(divergence, phi, weight):
    value, slope, linearised = ImplicitRewardSFT(divergence).imitation(REWARDS)
    if divergence != TV():
        assert not linearised.any()
    close(value, phi(REWARDS), 1e-8)
    close(slope, weight(REWARDS), 1e-8)


@fewer(each_divergence)
def test_phi_is_concave_and_has_its_weight_as_derivative(divergence):
    reward = torch.linspace(-5.0, 5.0, 41, dtype=torch.float64).requires_grad_()
    method = ImplicitRewardSFT(divergence)
    value, weight, _ = method.imitation(reward)
    close(gradient(value.sum(), reward), weight)
    rises = value.diff() / reward.diff()
    assert (rises.diff() <= 1e-9).all() and (rises >= -1e-9).all()
    at_zero = method.imitation(torch.zeros(1, dtype=torch.float64))
    close(torch.cat(at_zero[:2]), torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d.is_smooth], ids=repr)
def test_the_weight_is_the_ratio_at_which_the_divergence_has_the_reward_as_its_slope(divergence):
    weight = torch.tensor([0.05, 0.6, 1.0, 1.7, 20.0], dtype=torch.float64)
    reward = -divergence.reverse.phi(weight.log())
    close(ImplicitRewardSFT(divergence).imitation(reward)[1], weight, 1e-8)


def test_the_gradient_of_a_token_is_its_responses_weight():
    log_p, log_q = text()
    average = log_ratios(log_p, log_q).detach() / LENGTHS.clamp(min=1)
    weights = torch.exp(-0.7 * average)  # of KL(policy, demonstrations)
    loss = loss_of(ImplicitRewardSFT(ReverseKL(), beta=0.7), log_p, log_q).loss
    close(gradient(loss, log_q), -weights[SEQUENCE] / 6)
    weights = torch.exp(-0.7 * log_ratios(log_p, log_q).detach())
    loss = loss_of(ImplicitRewardSFT(ReverseKL(), beta=0.7, average=False), log_p, log_q).loss
    close(gradient(loss, log_q), -weights[SEQUENCE] / 6)


# -- the ends that are SFT -----------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_total_variation_is_sft_however_far_the_policy_is(average, scale):
    log_p, log_q = text(scale)
    ours = loss_of(ImplicitRewardSFT(TV(), beta=2.0, average=average), log_p, log_q)
    close(gradient(ours.loss, log_q), gradient(SFT()(log_q=log_q).loss, log_q))
    close(ours.loss, (log_p - log_q).mean())
    assert ours.metrics["weight"] == 1 and ours.metrics["stopped"] == 0


@each_divergence
def test_a_small_beta_is_sft_and_the_next_order_a_pull_by_the_curvature(divergence):
    """weight = 1 - beta l / f''(1) + O(beta^2); f'' = inf at a kink."""
    log_p, log_q = text()
    sft = gradient(SFT()(log_q=log_q).loss, log_q)
    average = (log_ratios(log_p, log_q) / LENGTHS.clamp(min=1)).detach()[SEQUENCE]
    loss = loss_of(ImplicitRewardSFT(divergence, beta=1e-5), log_p, log_q).loss
    pull = (gradient(loss, log_q) - sft) / 1e-5
    close(pull, average / 6 / divergence.curvature_at_one, 2e-3)


@each_divergence
def test_at_the_reference_it_is_sft(divergence):
    log_p, _ = text()
    log_q = log_p.clone().requires_grad_()
    ours = loss_of(ImplicitRewardSFT(divergence, beta=3.0), log_p, log_q)
    close(gradient(ours.loss, log_q), gradient(SFT()(log_q=log_q).loss, log_q))
    assert ours.loss == 0


@pytest.mark.parametrize("divergence", [ReverseKL(), Neyman(), KL()], ids=repr)
def test_v_fitted_to_one_demonstration_takes_the_divergence_out_of_the_objective(divergence):
    """max over V of phi(beta l + V) - V is beta l: SFT's, at V = -beta l, where every weight is 1."""
    method = ImplicitRewardSFT(divergence)
    for scaled in (-0.4, 0.3, 1.5):
        values = torch.linspace(-3.0, 3.0, 6001, dtype=torch.float64)
        objective = method.imitation(scaled + values)[0] - values
        best = objective.argmax()
        assert objective[best].item() == pytest.approx(scaled, abs=1e-6)
        assert values[best].item() == pytest.approx(-scaled, abs=1e-2)
        # With V = 0 the objective does depend on the divergence.
        assert method.imitation(torch.tensor(scaled, dtype=torch.float64))[0].item() < scaled - 1e-3


# -- the problem that it solves ------------------------------------------------------------------------

REFERENCE = random_rows(1, 6, seed=4)[0]


def minimised(objective, *parameters):
    """The least value that L-BFGS finds."""
    solver = torch.optim.LBFGS(parameters, max_iter=60, tolerance_grad=1e-9, tolerance_change=1e-14,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        solver.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    solver.step(closure)
    return objective().detach()


@pytest.mark.parametrize("divergence", [ReverseKL(), KL(), SquaredHellinger(), fdiv.Alpha(0.3)], ids=repr)
def test_its_optimum_over_policy_and_v_minimises_the_divergence_plus_beta_kl_to_the_reference(divergence):
    beta, method = 0.7, ImplicitRewardSFT(divergence)
    logits = LOG_P.clone().requires_grad_()
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def imitation():
        log_ratio = logits.log_softmax(-1) - REFERENCE
        value = method.imitation(implicit_reward(REFERENCE, REFERENCE + log_ratio, beta) + v)[0]
        return v - (LOG_P.exp() * value).sum()

    theta = LOG_P.clone().requires_grad_()

    def primal():
        log_q = theta.log_softmax(-1)
        return divergence(LOG_P, log_q) + beta * ReverseKL()(REFERENCE, log_q)

    best, least = -minimised(imitation, logits, v), minimised(primal, theta)
    close(best, least, 1e-6)
    close(logits.log_softmax(-1).exp().detach(), theta.log_softmax(-1).exp().detach(), 1e-4)
    other = divergence.reverse(LOG_P, theta.log_softmax(-1)).detach()
    if divergence in (ReverseKL(), KL()):  # the other orientation would be noticed
        assert (other - divergence(LOG_P, theta.log_softmax(-1)).detach()).abs() > 1e-4


def test_the_implicit_reward_says_what_the_policy_is_optimal_for():
    reward = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7, -0.2], dtype=torch.float64)
    tilted = REFERENCE + reward / 0.5
    partition = tilted.logsumexp(-1)
    read = implicit_reward(REFERENCE, tilted - partition, 0.5)
    close(read - read[0], reward - reward[0])
    close(implicit_reward(REFERENCE, tilted - partition, 0.5, value=0.5 * partition.item()), reward)


# -- the ends of phi -----------------------------------------------------------------------------------


def test_a_barrier_is_continued_linearly_and_counted():
    log_p = torch.zeros(6, dtype=torch.float64)
    # Average log-ratios -0.5, -3 and 4 of the three responses with tokens: the barrier is at -1.
    log_q = torch.tensor([-0.5, -0.5, -0.5, -3.0, 4.0, 4.0], dtype=torch.float64, requires_grad=True)
    out = loss_of(ImplicitRewardSFT(HELLINGER, steepest=25.0), log_p, log_q)
    slope = -gradient(out.loss, log_q) * 6
    expected = torch.tensor([4.0, 4.0, 4.0, 25.0, 0.04, 0.04], dtype=torch.float64)
    close(slope, expected, 1e-6)
    # Left at weight 25, which is r = -0.8 and phi = -4; the slope goes on from there.
    value = torch.tensor([-1.0, -4 - 25 * 2.2, 0.8], dtype=torch.float64)
    close(out.loss, -(value * torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)).sum() / 6, 1e-6)
    assert out.metrics["linearised"].item() == pytest.approx(1 / 3)
    assert out.metrics["reward"].item() == pytest.approx((-0.5 - 3 + 4) / 3)
    assert out.metrics["weight"].item() == pytest.approx((4 + 25 + 0.04) / 3)


def test_a_demonstration_that_is_learned_well_enough_stops():
    log_p = torch.zeros(6, dtype=torch.float64)
    log_q = torch.tensor([1.0, 1.0, 1.0, 2.5, 0.2, 0.2], dtype=torch.float64, requires_grad=True)
    out = loss_of(ImplicitRewardSFT(Neyman()), log_p, log_q)  # weight (1 - r/2)_+
    close(-gradient(out.loss, log_q) * 6, torch.tensor([0.5, 0.5, 0.5, 0.0, 0.9, 0.9], dtype=torch.float64))
    assert out.metrics["stopped"].item() == pytest.approx(1 / 3) and out.metrics["linearised"] == 0


def test_what_goes_on_beyond_a_jump_is_counted_of_total_variation_too():
    rewards = torch.tensor([-0.7, -0.4, 0.4, 0.7], dtype=torch.float64)
    value, weight, linearised = ImplicitRewardSFT(TV()).imitation(rewards)
    close(value, rewards, 1e-8)
    assert linearised.tolist() == [True, False, False, True] and (weight == 1).all()


@each_divergence
def test_it_is_finite_however_far_the_policy_is_in_float32(divergence):
    sizes = torch.tensor([-1e4, -200.0, -40.0, 40.0, 200.0, 1e4])
    log_q = (sizes - 1).requires_grad_()
    out = ImplicitRewardSFT(divergence, average=False)(
        log_p_label=torch.full((6,), -1.0), log_q_label=log_q, sequence=torch.arange(6)
    )
    slope = gradient(out.loss, log_q)
    assert out.loss.isfinite() and slope.isfinite().all() and (slope <= 0).all()
    assert (slope.abs() <= 100 / 6 * 1.001).all() and all(m.isfinite() for m in out.metrics.values())
    assert (slope.diff() >= -1e-6).all()  # the better a demonstration is known, the less it weighs


# -- batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
def test_micro_batches_sum_to_the_batch(average):
    log_p, log_q = text()
    method = ImplicitRewardSFT(HELLINGER, average=average)
    whole = loss_of(method, log_p, log_q).loss
    first = method(log_p_label=log_p[:3], log_q_label=log_q[:3], sequence=SEQUENCE[:3], count=6).loss
    rest = method(
        log_p_label=log_p[3:], log_q_label=log_q[3:], sequence=torch.tensor([0, 2, 2]), count=6
    ).loss
    close(first + rest, whole)
    close(gradient(first + rest, log_q), gradient(whole, log_q))


def test_metrics_are_means_over_responses_with_tokens():
    log_p, log_q = text()
    out = loss_of(ImplicitRewardSFT(ReverseKL(), beta=0.7), log_p, log_q)
    present = LENGTHS > 0
    reward = 0.7 * log_ratios(log_p, log_q)[present].detach() / LENGTHS[present]
    close(out.metrics["reward"], reward.mean())
    close(out.metrics["weight"], (-reward).exp().mean())


def test_without_any_token_the_loss_is_zero_and_its_graph_intact():
    empty = torch.zeros(0, requires_grad=True)
    out = ImplicitRewardSFT()(
        log_p_label=empty.detach(), log_q_label=empty, sequence=torch.zeros(0, dtype=torch.long)
    )
    assert out.loss == 0 and gradient(out.loss, empty).shape == (0,)
    assert all(value == 0 for value in out.metrics.values())


def test_text_that_a_model_cannot_write_is_refused():
    log_p, log_q = text()
    nothing = torch.full((6,), -math.inf, dtype=torch.float64)
    with pytest.raises(ValueError, match="no finite log-probability under the reference"):
        loss_of(ImplicitRewardSFT(), nothing, log_q)
    with pytest.raises(ValueError, match="no finite log-probability under the policy"):
        loss_of(ImplicitRewardSFT(), log_p, nothing)


# -- the object ----------------------------------------------------------------------------------------


def test_it_is_a_method_that_prints_as_its_recipe():
    method = ImplicitRewardSFT(2 * JS(0.5), beta=0.3)
    assert isinstance(method, Method) and method.consumes == "responses"
    names = vars(fdiv) | {"ImplicitRewardSFT": ImplicitRewardSFT}
    assert eval(repr(ImplicitRewardSFT()), names) == ImplicitRewardSFT()


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="takes an f-divergence"):
        ImplicitRewardSFT(other)


def test_bad_numbers_are_refused():
    for bad in ({"beta": 0.0}, {"beta": math.nan}, {"steepest": 1.0}, {"steepest": math.inf}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ImplicitRewardSFT(**bad)
