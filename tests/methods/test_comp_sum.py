"""Comp-sum losses: definition, members, gradients, the divergence they are, and consistency."""

import itertools
import math

import pytest
import torch
from tests.worlds import close, gradient

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.supervise.comp_sum import CompSum, TruncatedGCE, comp_sum
from fdiv.methods.supervise.consistency import consistency

TAUS = (0.0, 0.3, 0.5, 0.999999, 1.0, 1.000001, 1.3, 1.7, 2.0, 2.5)
each_tau = pytest.mark.parametrize("tau", TAUS)

LOGITS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])


def q_of(logits=LOGITS, labels=LABELS):
    return logits.softmax(-1)[torch.arange(len(labels)), labels]


# -- the loss -----------------------------------------------------------------------------------------------


@each_tau
def test_the_loss_is_phi_of_the_sum_of_exponentials_of_score_differences(tau):
    losses = []
    for h, y in zip(LOGITS, LABELS.tolist(), strict=True):
        u = sum(math.exp(h[k] - h[y]) for k in range(4) if k != y)
        losses.append(math.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau))
    expected = torch.tensor(losses, dtype=torch.float64).mean()
    close(CompSum(tau)(logits=LOGITS, labels=LABELS).loss, expected, 1e-8 if abs(tau - 1) < 1e-3 else 1e-13)


@pytest.mark.parametrize(
    ("tau", "rows"),
    [
        (0.0, lambda q: 1 / q - 1),  # the sum of exponentials
        (1.0, lambda q: -q.log()),  # cross-entropy
        (1.7, lambda q: (1 - q**0.7) / 0.7),  # generalised cross-entropy
        (2.0, lambda q: 1 - q),  # the mean absolute error, halved
        (3.0, lambda q: (1 - q**2) / 2),
    ],
)
def test_its_members_are_the_known_losses(tau, rows):
    close(CompSum(tau)(logits=LOGITS, labels=LABELS).loss, rows(q_of()).mean(), 1e-13)


def test_the_named_constructor_is_zhang_and_sabuncus():
    assert CompSum.gce() == CompSum(1.7)
    assert fdiv.parse("CompSum.gce(q=0.7)", ["fdiv.methods.supervise.comp_sum"]) == CompSum(tau=1.7)


def test_near_cross_entropy_the_loss_goes_over_into_it():
    """l(tau) = L + (1 - tau) L^2/2 + ..., in float32 too."""
    surprise = torch.tensor([0.0, 1e-6, 0.3, 5.0, 50.0])
    for error in (1e-3, 1e-6, 1e-12, -1e-3, -1e-6, -1e-12):
        series = (
            surprise.double() + error * surprise.double() ** 2 / 2 + error**2 * surprise.double() ** 3 / 6
        )
        close(comp_sum(surprise, 1 - error).double(), series, 1e-6 + 3e-4 * (abs(error) > 1e-4))


@each_tau
def test_the_gradient_is_the_softmax_less_the_label_weighted_by_a_power_of_its_probability(tau):
    logits = LOGITS.clone().requires_grad_()
    q = LOGITS.softmax(-1)
    one_hot = torch.eye(4, dtype=torch.float64)[LABELS]
    expected = q_of().unsqueeze(-1) ** (tau - 1) * (q - one_hot) / len(LABELS)
    close(gradient(CompSum(tau)(logits=logits, labels=LABELS).loss, logits), expected.flatten(), 1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 1.0, 1.3, 1.7, 1.99, 2.0])
def test_up_to_two_the_loss_is_a_divergence_from_the_label(tau):
    method = CompSum(tau)
    labels = torch.eye(4, dtype=torch.float64)[LABELS].log()
    value = method.divergence(labels, LOGITS.log_softmax(-1))
    close(method(logits=LOGITS, labels=LABELS).loss, value.mean(), 1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 1.7])
def test_the_log_probabilities_are_the_truth_where_the_loss_is_least(tau):
    """The expected loss of a known p, minimised."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    h = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [h], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def expected_loss():
        optimiser.zero_grad()
        loss = (p * comp_sum(-h.log_softmax(-1), tau)).sum()
        loss.backward()
        return loss

    optimiser.step(expected_loss)
    close(CompSum(tau).log_probs(h.detach()[None]).exp()[0], p, 1e-5)


def test_from_two_on_the_probabilities_are_those_of_softmax():
    assert torch.equal(CompSum(2.0).log_probs(LOGITS), LOGITS.log_softmax(-1))


def test_micro_batches_add_up_to_the_global_batch():
    whole = CompSum(1.4)(logits=LOGITS, labels=LABELS)
    parts = [CompSum(1.4)(logits=LOGITS[s], labels=LABELS[s], count=7) for s in (slice(0, 3), slice(3, 7))]
    close(parts[0].loss + parts[1].loss, whole.loss, 1e-13)
    close(3 / 7 * parts[0].metrics["nll"] + 4 / 7 * parts[1].metrics["nll"], whole.metrics["nll"], 1e-13)
    assert CompSum()(logits=LOGITS[:0], labels=LABELS[:0], count=7).loss == 0


@each_tau
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_that_are_worlds_apart_give_finite_values_and_gradients(tau, dtype):
    logits = torch.tensor(
        [[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [90.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype
    )
    logits.requires_grad_()
    out = CompSum(tau)(logits=logits, labels=torch.tensor([0, 0, 1, 2]))
    assert out.loss.isfinite() and gradient(out.loss, logits).isfinite().all()


def test_the_continuation_starts_where_a_float_would_soon_end():
    surprise = torch.tensor([37.0, 38.0, 2e4])
    value = comp_sum(surprise, 0.0).double()
    close(value[:2], surprise[:2].double().expm1(), 1e-6)
    close(value[2] - value[1], (surprise[2].double() - 38) * math.exp(38), 1e-5)
    close(comp_sum(surprise[:2], 0.5).double(), 2 * (surprise[:2].double() / 2).expm1(), 1e-6)


def test_a_label_without_probability_is_refused_unless_its_loss_is_finite():
    logits = torch.tensor([[-math.inf, 0.0, 1.0]], requires_grad=True)
    labels = torch.tensor([0])
    with pytest.raises(ValueError, match="logit is -inf"):
        CompSum(1.0)(logits=logits, labels=labels)
    out = CompSum(1.7)(logits=logits, labels=labels)
    close(out.loss.detach(), torch.tensor(1 / 0.7), 1e-6)
    assert gradient(out.loss, logits).isfinite().all()
    other = CompSum(0.5)(logits=logits, labels=torch.tensor([1]))  # a class that is ruled out, and no label
    assert other.loss.isfinite() and gradient(other.loss, logits).isfinite().all()


# -- the truncated one --------------------------------------------------------------------------------------


def test_below_k_the_truncated_loss_is_constant():
    method = TruncatedGCE(q=0.7, k=0.3, start=0)
    logits = LOGITS.clone().requires_grad_()
    out = method(logits=logits, labels=LABELS)
    q = q_of()
    assert 0 < (q > 0.3).sum() < 7
    close(out.loss, ((1 - q.clamp(min=0.3) ** 0.7) / 0.7).mean(), 1e-13)
    rows = gradient(out.loss, logits).reshape(7, 4)
    assert torch.equal(rows.any(-1), q > 0.3)
    close(out.metrics["kept"], (q > 0.3).double().mean())


def test_before_its_start_it_is_plain():
    plain, method = (
        CompSum.gce(0.5)(logits=LOGITS, labels=LABELS).loss,
        TruncatedGCE(q=0.5, k=0.3, start=0.25),
    )
    close(method(logits=LOGITS, labels=LABELS, progress=0.24).loss, plain, 1e-13)
    assert method(logits=LOGITS, labels=LABELS, progress=0.25).loss < plain
    assert method.reads == ("logits", "labels", "progress")
    assert TruncatedGCE(start=0).reads == ("logits", "labels")
    with pytest.raises(TypeError, match="reads progress"):
        method(logits=LOGITS, labels=LABELS)


def test_a_fresh_model_would_learn_nothing_from_the_first_step_on():
    """Ten classes, each at 0.1, below k = 0.5: this is why there is a start."""
    logits = torch.zeros(3, 10, requires_grad=True)
    out = TruncatedGCE(start=0)(logits=logits, labels=torch.tensor([0, 1, 2]))
    assert not gradient(out.loss, logits).any() and out.metrics["kept"] == 0


def test_the_truncated_one_bears_extremes():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [-math.inf, 0.0]], requires_grad=True)
    for labels in ([0, 0, 0], [1, 1, 1]):
        out = TruncatedGCE(start=0)(logits=logits, labels=torch.tensor(labels))
        assert out.loss.isfinite() and gradient(out.loss, logits).isfinite().all()


# -- consistency --------------------------------------------------------------------------------------------


def loss_of(s, tau):
    """At probability s of the label."""
    return -s.log() if tau == 1 else (s ** (tau - 1) - 1) / (1 - tau)


def least_risk(p, tau):
    """min over s of sum p l(s), at s in proportion to p^(1/(2 - tau)), from 2 on at the best class."""
    if tau >= 2:
        return (1 - p.amax(-1)) / (tau - 1)
    s = p ** (1 / (2 - tau))
    s = s / s.sum(-1, keepdim=True)
    return torch.where(p > 0, p * loss_of(s.clamp(min=1e-300), tau), 0.0).sum(-1)


def regret(p, s, tau):
    return torch.where(p > 0, p * loss_of(s, tau), 0.0).sum(-1) - least_risk(p, tau)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 1.7, 2.0, 3.0])
@pytest.mark.parametrize("beta", [0.1, 0.4, 0.9, 1.0])
def test_with_two_classes_the_transform_is_the_least_regret_of_a_wrong_choice_up_to_two(tau, beta):
    p = torch.tensor([(1 + beta) / 2, (1 - beta) / 2], dtype=torch.float64)
    s_wrong = torch.linspace(0.5, 1 - 1e-9, 20001, dtype=torch.float64)
    least = regret(p, torch.stack([1 - s_wrong, s_wrong], -1), tau).min()
    transform = consistency(tau, 2).transform(torch.tensor(beta, dtype=torch.float64))
    if tau <= 2:
        close(transform, least, 1e-9)
    assert transform <= least + 1e-9


def wrong_choices(beta, points):
    """(p, s) on grids: class 0 is the likeliest, and class 1, beta less likely, has the highest score."""
    third = torch.linspace(0, (1 - beta) / 2, points, dtype=torch.float64)
    first = (1 - third + beta) / 2
    p = torch.stack([first, first - beta, third], -1)
    p = p[(p[:, 0] >= p[:, 2]) & (p[:, 1] >= 0)]
    s = torch.tensor(
        [
            (a, b, 1 - a - b)
            for a, b in itertools.product(torch.linspace(1e-6, 1, points).tolist(), repeat=2)
            if b >= a and b >= 1 - a - b and 1 - a - b > 1e-9
        ],
        dtype=torch.float64,
    )
    return p[:, None], s[None]


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 1.7, 2.0])
def test_with_three_classes_no_wrong_choice_has_less_regret_than_the_transform(tau):
    for beta in (0.2, 0.6):
        least = regret(*wrong_choices(beta, 61), tau).min()
        bound = consistency(tau, 3).transform(torch.tensor(beta, dtype=torch.float64))
        assert bound <= least + 1e-12
        if tau <= 1:  # and the bound is attained: two classes alone, their scores equal
            p = torch.tensor([(1 + beta) / 2, (1 - beta) / 2, 0.0], dtype=torch.float64)
            s = torch.tensor([0.5, 0.5, 1e-300], dtype=torch.float64)
            close(regret(p, s, tau), bound, 1e-9)


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9999, 1.0, 1.0001, 1.3, 2.0, 3.0])
def test_the_inverse_undoes_the_transform_and_never_exceeds_one(tau):
    forth, back = consistency(tau, 2)
    beta = torch.tensor([0.0, 1e-3, 0.2, 0.7, 1.0], dtype=torch.float64)
    close(back(forth(beta)), beta, 1e-6)
    assert back(2 * forth(torch.ones(1))) == 1


def test_around_cross_entropy_the_transform_is_continuous():
    beta = torch.linspace(0, 1, 11, dtype=torch.float64)
    at = consistency(1.0, 2).transform(beta)
    for tau in (1 - 1e-6, 1 + 1e-6):
        close(consistency(tau, 2).transform(beta), at, 1e-5)


def test_worked_values_of_the_transform():
    beta = torch.tensor(0.6, dtype=torch.float64)
    close(
        consistency(0.0, 5).transform(beta), torch.tensor(1 - 0.8, dtype=torch.float64)
    )  # 1 - sqrt(1 - b^2)
    close(
        consistency(1.0, 5).transform(beta),
        torch.tensor(0.8 * math.log(1.6) + 0.2 * math.log(0.4), dtype=torch.float64),
    )
    close(consistency(2.0, 5).transform(beta), torch.tensor(0.12, dtype=torch.float64))


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [-0.1, math.inf, math.nan])
def test_a_wrong_tau_is_refused(tau):
    with pytest.raises(ValueError, match="tau is finite and >= 0"):
        CompSum(tau)
    with pytest.raises(ValueError, match="tau is finite and >= 0"):
        consistency(tau, 2)


def test_wrong_settings_and_tensors_are_refused():
    for q in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"q is in \(0, 1\]"):
            CompSum.gce(q)
        with pytest.raises(ValueError, match=r"q is in \(0, 1\]"):
            TruncatedGCE(q=q)
    with pytest.raises(ValueError, match="k is a probability"):
        TruncatedGCE(k=0.0)
    with pytest.raises(ValueError, match="start is a fraction"):
        TruncatedGCE(start=1.0)
    with pytest.raises(ValueError, match="at least two classes"):
        consistency(1.0, 1)
    with pytest.raises(ValueError, match="beta is a regret"):
        consistency(1.0, 2).transform(torch.tensor(1.2))
    with pytest.raises(ValueError, match="a regret is >= 0"):
        consistency(1.0, 2).inverse(torch.tensor(-0.1))
    with pytest.raises(ValueError, match="logits are"):
        CompSum()(logits=LOGITS[0], labels=LABELS)
    with pytest.raises(ValueError, match=r"labels are \d+ int64 numbers of classes"):
        CompSum()(logits=LOGITS, labels=LABELS.float())
    with pytest.raises(ValueError, match="labels are from 0 to 3"):
        CompSum()(logits=LOGITS, labels=LABELS + 1)


@pytest.mark.parametrize("method", [CompSum(1.3), TruncatedGCE(k=0.2)])
def test_the_object_is_its_recipe_and_keeps_the_contract(method):
    assert fdiv.parse(repr(method), ["fdiv.methods.supervise.comp_sum"]) == method
    assert isinstance(method, Method) and isinstance(CompSum(3.0), Method)
