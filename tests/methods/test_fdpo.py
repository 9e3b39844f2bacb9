"""f-DPO: the paper's scores in fdiv's direction, its losses and their gradients.

The paper's ratio is t = policy / reference; here u = reference / policy = 1 / t and l = log t.
"""

import math

import pytest
import torch
from tests.thinned import thinned
from tests.worlds import DIVERGENCES, close, gradient
from torch.nn.functional import logsigmoid, softplus

import fdiv
from fdiv import FDPO
from fdiv.methods._method import Method

L = torch.tensor([-9.0, -3.0, -0.4, 0.0, 0.2, 1.7, 8.0], dtype=torch.float64)

# The catalogue in both directions. Refused, with their f'(0): the paper's chi-square, total variation, Le
# Cam, powers above 1 (ours below 0), skewed reverse KL and softened KL.
CATALOGUE = {repr(d): d for given in DIVERGENCES for d in (given, given.reverse)}
CATALOGUE |= {repr(d): d for d in (2 * fdiv.JS(0.5), fdiv.JS(0.5))}
INADMISSIBLE = {
    fdiv.Neyman(): -2.0,
    fdiv.TV(): -0.5,
    fdiv.Triangular(): -3.0,
    fdiv.Alpha(-0.5): -1 / 0.5,
    fdiv.Alpha(1.7).reverse: -1 / 0.7,
    fdiv.SkewKL(0.1): -(0.9**2) / 0.1,
    fdiv.SoftenedReverseKL(): -math.log(2),
}
ADMISSIBLE = [d for name, d in CATALOGUE.items() if name not in map(repr, INADMISSIBLE)]
each_admissible = pytest.mark.parametrize("divergence", ADMISSIBLE, ids=repr)
each_smooth = pytest.mark.parametrize("divergence", [d for d in ADMISSIBLE if d.is_smooth], ids=repr)


def pairs(log_ratio_chosen, log_ratio_rejected, lengths=None):
    """A method's arguments, with a reference of log-probability -1 everywhere."""
    p = torch.full_like(log_ratio_chosen, -1.0)
    given = {
        "log_p_chosen": p,
        "log_p_rejected": p,
        "log_q_chosen": p + log_ratio_chosen,
        "log_q_rejected": p + log_ratio_rejected,
    }
    if lengths is not None:
        given |= {"length_chosen": lengths[0], "length_rejected": lengths[1]}
    return given


# -- scores --------------------------------------------------------------------------------------------


def mixed(x, share):
    """log(share t + 1 - share)."""
    return torch.logaddexp(x + math.log(share), torch.full_like(x, math.log(1 - share)))


SCORES = [
    (fdiv.ReverseKL(), lambda x: x),
    (fdiv.KL(), lambda x: 1 - (-x).exp()),
    (2 * fdiv.JS(0.5), lambda x: math.log(2) + logsigmoid(x)),
    (fdiv.Alpha.fdpo(0.3), lambda x: (1 - (-0.3 * x).exp()) / 0.3),
    (fdiv.Alpha.fdpo(0.7), lambda x: (1 - (-0.7 * x).exp()) / 0.7),
    (fdiv.Alpha(1.7), lambda x: torch.expm1(-1.7 * x) / -1.7),  # the power 1 - 1.7
    (fdiv.JS(0.5), lambda x: (math.log(2) - softplus(-x)) / 2),
    (fdiv.JS(0.1), lambda x: 0.9 * (x - mixed(x, 0.9))),  # 0.9 is the policy's share of the mixture
    (fdiv.SkewReverseKL(0.1), lambda x: x - mixed(x, 0.1) + 0.1 - 0.1 * (x - mixed(x, 0.1)).exp()),
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


# sup f', which bounds the reward from above at beta times it.
BOUNDS = [
    (fdiv.KL(), 1.0),
    (2 * fdiv.JS(0.5), math.log(2)),
    (fdiv.Alpha.fdpo(0.3), 1 / 0.3),
    (fdiv.SquaredHellinger(), 0.5),
    (fdiv.Pearson(), 1.0),
    (fdiv.SoftenedKL(), 1 - math.log(2)),
    (fdiv.SkewReverseKL(0.1), -math.log(0.1) - 0.9),
    (fdiv.ReverseKL(), math.inf),
    (fdiv.ChiKL(0.5).reverse, math.inf),
]


@by_divergence(BOUNDS, "bound")
def test_rewards_range_from_minus_infinity_to_the_slope_at_infinity(divergence, bound):
    assert divergence.f_at_zero == pytest.approx(bound)
    high = FDPO(divergence).score(torch.zeros(2).double(), torch.tensor([90.0, 200.0]).double())
    if bound < math.inf:
        close(high, torch.full((2,), bound, dtype=torch.float64), 1e-9)
    else:
        assert high[1] > 2 * high[0] > 0


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


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "robust", "exo"])
@pytest.mark.parametrize("size", thinned([1e4, 95.0, 200.0]))
@each_admissible
def test_log_ratios_far_beyond_the_range_of_exp_give_finite_values_and_gradients(divergence, size, loss):
    far = torch.tensor([size, size, -size, -size, 0.0])
    log_ratios = [
        far.clone().requires_grad_(),
        torch.tensor([-size, size, size, -size, size]).requires_grad_(),
    ]
    method = FDPO(divergence, loss=loss, label_smoothing=0.1 if loss in ("robust", "exo") else 0.0)
    out = method(**pairs(*log_ratios))
    assert method.score(torch.zeros_like(far), far).isfinite().all()
    assert out.loss.isfinite()
    assert gradient(out.loss, *log_ratios).isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "slope"), INADMISSIBLE.items(), ids=repr)
def test_a_bounded_price_for_leaving_a_response_is_refused_with_the_reason(divergence, slope):
    with pytest.raises(TypeError, match="optima drop responses and no reward can be recovered") as refusal:
        FDPO(divergence)
    assert f"f'(0) = {slope:.4g} > -inf" in str(refusal.value)
    assert f"{divergence!r} + 0.1 * ReverseKL()" in str(refusal.value)
    FDPO(divergence + 0.1 * fdiv.ReverseKL())  # what the message says to write


@each_admissible
def test_all_others_of_the_catalogue_are_admitted(divergence):
    assert FDPO(divergence).divergence == divergence
    low = FDPO(divergence).score(torch.zeros(2).double(), torch.tensor([-20.0, -200.0]).double())
    assert low[1] < 2 * low[0] < 0  # f' falls without bound


def test_what_is_no_f_divergence_is_refused():
    for other in (fdiv.Renyi(0.5), "reverse_kl", fdiv.KL):
        with pytest.raises(TypeError, match="FDPO takes an f-divergence"):
            FDPO(other)


# -- losses ---------------------------------------------------------------------------------------------


def at(margin, **settings):
    """The loss of a single pair under reverse KL at beta 1, whose margin is this."""
    margin = torch.as_tensor(margin, dtype=torch.float64).reshape(1)
    return FDPO(beta=1.0, **settings)(**pairs(margin, torch.zeros_like(margin))).loss


def test_every_loss_has_its_closed_value():
    chosen, rejected = L, L.flip(0) / 2
    gap = (-rejected).exp() - (-chosen).exp()  # of the scores 1 - 1/t
    arguments = pairs(chosen, rejected)

    def loss(**settings):
        return FDPO(fdiv.KL(), beta=0.2, **settings)(**arguments).loss

    margin = 0.2 * gap
    right, wrong = logsigmoid(margin), logsigmoid(-margin)
    close(loss(), -right.mean())
    close(loss(label_smoothing=0.1), -(0.9 * right + 0.1 * wrong).mean())
    close(loss(loss="hinge"), (1 - margin).relu().mean())
    close(loss(loss="ipo"), (gap - 1 / 0.4).square().mean())
    close(loss(loss="robust", label_smoothing=0.1), (0.1 * wrong - 0.9 * right).mean() / 0.8)
    q = torch.stack([margin.sigmoid(), (-margin).sigmoid()], -1)
    kl = fdiv.KL()(q.log(), torch.tensor([0.9, 0.1], dtype=torch.float64).log().expand_as(q))
    close(loss(loss="exo", label_smoothing=0.1), kl.mean())


def test_robust_is_the_plain_loss_on_average_over_flipped_labels():
    for margin in (-2.0, 0.3, 5.0):
        both = [at(m, loss="robust", label_smoothing=0.3) for m in (margin, -margin)]
        close(0.7 * both[0] + 0.3 * both[1], at(margin), 1e-12)
    close(at(0.7, loss="robust"), at(0.7), 1e-14)


def test_robust_has_no_lower_bound_on_a_single_pair():
    assert at(1e4, loss="robust", label_smoothing=0.1) == pytest.approx(-0.1 / 0.8 * 1e4)


@pytest.mark.parametrize("loss", ["sigmoid", "exo"])
def test_smoothed_labels_are_fitted_by_their_log_odds(loss):
    margin = torch.tensor(math.log(9), dtype=torch.float64, requires_grad=True)
    value = at(margin, loss=loss, label_smoothing=0.1)
    assert abs(gradient(value, margin)) < 1e-15
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert value.item() == pytest.approx({"sigmoid": entropy, "exo": 0.0}[loss], abs=1e-14)
    for other in (-3.0, 1.0, 3.0, 40.0):
        assert at(other, loss=loss, label_smoothing=0.1) > value


def test_ipo_is_zero_at_its_margin():
    chosen, rejected = torch.tensor([2.5 + 1.0]).double(), torch.tensor([1.0]).double()
    assert FDPO(beta=0.2, loss="ipo")(**pairs(chosen, rejected)).loss < 1e-20


def test_ipo_squares_what_has_a_square_and_says_what_has_not():
    far, zero = torch.tensor([1e4, -1e4]), torch.zeros(2)
    close(FDPO(loss="ipo")(**pairs(far, zero)).loss, torch.tensor((9995**2 + 10005**2) / 2), 1e-6)
    with pytest.raises(ValueError, match=r"square a margin of \d.*e\+.*loss='sigmoid', or a divergence"):
        FDPO(fdiv.KL(), loss="ipo")(**pairs(far, zero))
    with pytest.raises(ValueError, match=r"too large for torch.float64"):
        FDPO(fdiv.Pearson(), loss="ipo")(**pairs(far.double(), zero.double()))


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_a_score_that_no_number_holds_is_refused(loss):
    """Two infinite scores have no difference."""
    far = torch.tensor([-1e4, 0.0])
    with pytest.raises(ValueError, match=r"score of Alpha\(alpha=2.5\) at log reference/policy = 1e\+04"):
        FDPO(fdiv.Alpha(2.5), loss=loss)(**pairs(far, far))


# -- lengths --------------------------------------------------------------------------------------------

LENGTHS = (torch.tensor([1.0, 2, 3, 4, 5, 6, 7]).double(), torch.tensor([7.0, 3, 2, 9, 1, 2, 4]).double())


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_scores_are_divided_by_lengths_before_their_difference(loss):
    chosen, rejected = L, L.flip(0) / 2
    per_token = -torch.expm1(-chosen) / LENGTHS[0] + torch.expm1(-rejected) / LENGTHS[1]
    value = {
        "sigmoid": -logsigmoid(0.2 * per_token),
        "hinge": (1 - 0.2 * per_token).relu(),
        "ipo": (per_token - 2.5).square(),
    }[loss]
    method = FDPO(fdiv.KL(), beta=0.2, loss=loss, length_normalised=True)
    out = method(**pairs(chosen, rejected, LENGTHS))
    close(out.loss, value.mean())
    close(out.metrics["margin"], 0.2 * per_token.mean())  # the reward that is optimised
    close(out.metrics["reward_chosen"], -0.2 * (torch.expm1(-chosen) / LENGTHS[0]).mean())
    close(out.metrics["log_ratio_chosen"], chosen.mean())  # the plain one
    close(FDPO(fdiv.KL(), loss=loss, length_normalised=True)(**pairs(L, L / 2, [torch.ones(7)] * 2)).loss,
          FDPO(fdiv.KL(), loss=loss)(**pairs(L, L / 2)).loss)  # fmt: skip


@each_admissible
def test_an_answer_that_is_as_likely_as_before_has_score_zero_at_any_length(divergence):
    """A constant in f' would cancel between equal lengths and nowhere else."""
    zero = torch.zeros(7, dtype=torch.float64)
    out = FDPO(divergence, length_normalised=True)(**pairs(zero, zero, LENGTHS))
    assert out.metrics["reward_chosen"].abs() < 1e-14 and out.metrics["reward_rejected"].abs() < 1e-14
    close(out.loss, torch.tensor(math.log(2), dtype=torch.float64), 1e-12)


@each_smooth
def test_an_empty_answer_has_score_zero_and_no_gradient(divergence):
    chosen, rejected = torch.tensor([0.0, 1.0]).requires_grad_(), torch.tensor([0.3, 0.0]).requires_grad_()
    lengths = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])
    method = FDPO(divergence, length_normalised=True)
    out = method(**pairs(chosen, rejected, lengths))
    slopes = [gradient(out.loss, side) for side in (chosen, rejected)]
    assert slopes[0][0] == 0 and slopes[1][1] == 0
    assert slopes[0][1] < 0 < slopes[1][0]
    assert out.loss.isfinite() and all(value.isfinite() for value in out.metrics.values())


def test_lengths_are_read_where_they_are_used():
    assert FDPO().reads == ("log_p_chosen", "log_p_rejected", "log_q_chosen", "log_q_rejected")
    assert FDPO(length_normalised=True).reads == (*FDPO().reads, "length_chosen", "length_rejected")
    with pytest.raises(TypeError, match=r"write FDPO\(length_normalised=True\)"):
        FDPO()(**pairs(L, L, LENGTHS))
    with pytest.raises(TypeError, match="needs both length_chosen and length_rejected"):
        FDPO(length_normalised=True)(**pairs(L, L))
    with pytest.raises(TypeError, match="needs both"):
        FDPO(length_normalised=True)(**pairs(L, L), length_chosen=LENGTHS[0])


# -- degenerate batches -----------------------------------------------------------------------------------


@each_smooth
def test_pairs_of_equal_answers_pull_as_much_as_they_push(divergence):
    chosen, rejected = (torch.full((3,), 0.7).requires_grad_() for _ in range(2))
    out = FDPO(divergence)(**pairs(chosen, rejected))
    close(out.loss, torch.tensor(math.log(2)), 1e-6)
    close(gradient(out.loss, chosen), -gradient(out.loss, rejected))
    assert out.metrics["accuracy"] == 0


def test_no_pairs_at_all_have_loss_zero_and_keep_the_graph():
    for loss in ("sigmoid", "ipo"):
        none = torch.zeros(0, requires_grad=True)
        out = FDPO(loss=loss)(**pairs(none, none))
        assert out.loss == 0 and gradient(out.loss, none).shape == (0,)


@pytest.mark.parametrize("whose", ["reference", "policy"])
@pytest.mark.parametrize("divergence", [fdiv.ReverseKL(), fdiv.KL()], ids=repr)
def test_an_answer_without_mass_is_named(divergence, whose):
    given = pairs(torch.zeros(3), torch.zeros(3))
    side = "log_p_rejected" if whose == "reference" else "log_q_chosen"
    given[side] = torch.tensor([-1.0, -2.0, -math.inf])
    with pytest.raises(ValueError, match=f"the {whose} gives probability 0 to a response of pair 2.*leave"):
        FDPO(divergence)(**given)


def test_half_precision_is_computed_in_float32():
    """The difference of two log-probabilities near -300 has no digits left in bfloat16."""
    p, q = (torch.tensor([x], dtype=torch.bfloat16) for x in (-300.0, -302.0))
    out = FDPO(beta=1.0)(log_p_chosen=p, log_p_rejected=p, log_q_chosen=q, log_q_rejected=p)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(2.0)))


# -- metrics --------------------------------------------------------------------------------------------


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
        ({"loss": "exo_pair"}, "one of 'sigmoid', 'robust', 'exo', 'hinge', 'ipo', got 'exo_pair'"),
        ({"loss": "exo"}, "infinite for certain ones; write label_smoothing=0.001"),
        ({"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "belongs to loss='sigmoid', 'robust' or 'exo'"),
    ):
        with pytest.raises(ValueError, match=message):
            FDPO(**settings)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = FDPO(fdiv.ChiKL(0.5).reverse, beta=0.3, loss="hinge", length_normalised=True)
    assert fdiv.parse(repr(method)) == method
    assert isinstance(method, Method)
