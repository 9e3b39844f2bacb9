"""Discriminative classification: the paper's losses, their optimum, and which score is the class."""

import math

import pytest
import torch
from tests.worlds import close, each_other_object, each_smooth_divergence, gradient
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.supervise.discriminative import HEADS, Discriminative, log_softplus

SHIFTED_LOG = fdiv.SkewReverseKL(0.5)
B, K = 5, 4
LABELS = torch.tensor([0, 3, 1, 1, 2])
P = torch.tensor([0.45, 0.3, 0.2, 0.05], dtype=torch.float64)  # a posterior


def head(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, generator=generator, dtype=torch.float64).requires_grad_()


def same_up_to_a_constant(method, published, scale=1.0):
    """Two heads, one difference of losses; and the gradients."""
    losses, gradients = [], []
    for seed in (0, 1):
        z = head(seed)
        ours, theirs = method(logits=z, labels=LABELS).loss, scale * published(z)
        losses.append(ours - theirs)
        gradients.append(gradient(ours, z) - gradient(theirs, z))
    assert (losses[0] - losses[1]).abs() < 1e-12
    assert max(g.abs().max() for g in gradients) < 1e-12


def own(rows):
    return rows.gather(1, LABELS.unsqueeze(1)).squeeze(1)


# -- the shifted log -----------------------------------------------------------------------------------------


def test_the_shifted_log_is_the_kl_from_q_to_the_midpoint():
    """f(u) = -log(1 + u) + log 2, which needs (u - 1)/2 to have f'(1) = 0."""
    log_ratio = torch.linspace(-6, 6, 25, dtype=torch.float64)
    u = log_ratio.exp()
    close(SHIFTED_LOG.f(log_ratio), -(1 + u).log() + math.log(2) + (u - 1) / 2, 1e-13)
    close(SHIFTED_LOG.phi(log_ratio), -1 / (1 + u) + 0.5, 1e-13)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    kl_to_midpoint = (q * (2 * q / (P + q)).log()).sum()
    close(SHIFTED_LOG(P.log(), q.log()), kl_to_midpoint, 1e-13)
    assert Discriminative().divergence == SHIFTED_LOG


@pytest.mark.parametrize("alpha", [0.8, 1.0, 3.0])
def test_with_a_sigmoid_head_it_is_the_authors_loss(alpha):
    """mean D_y - alpha mean (log D - D), D the sigmoid of the network's score."""

    def published(z):
        d = z.sigmoid()
        return own(d).mean() - alpha * (d.log() - d).mean()

    same_up_to_a_constant(Discriminative(weight=alpha, head="sigmoid"), published)


def test_the_sheets_stable_form_of_it():
    def stable(z):
        return (own(z.sigmoid()) + (softplus(-z) + z.sigmoid()).mean(1)).mean()

    same_up_to_a_constant(Discriminative(head="sigmoid"), stable)


# -- the paper's other losses, as functions of its D ---------------------------------------------------------


def kl(z):
    d = z.exp()
    return (-own(d).log() + d.sum(1)).mean()


def reverse_kl(z):
    d = (-z).exp()
    return own(d).mean() - d.log().mean()


def hellinger(z):
    d = (-z / 2).exp()
    return own(d).mean() + (1 / d).mean()


def pearson(z):
    d = z.exp()
    return -2 * own(d).mean() + d.square().mean()


def gan(z):
    """Binary cross-entropy: the label's D to 0, everybody's to 1."""
    right = binary_cross_entropy_with_logits(own(-z), torch.zeros(B, dtype=z.dtype))
    return right + binary_cross_entropy_with_logits(-z, torch.ones_like(z))


@pytest.mark.parametrize(
    ("divergence", "weight", "published"),
    [
        (fdiv.KL(), float(K), kl),
        (fdiv.ReverseKL(), 1.0, reverse_kl),
        (2 * fdiv.SquaredHellinger(), 1.0, hellinger),
        (fdiv.Pearson(), 1.0, pearson),
        (2 * fdiv.JS(0.5), 1.0, gan),
    ],
    ids=lambda v: getattr(v, "__name__", repr(v)),
)
def test_the_papers_losses_are_recovered(divergence, weight, published):
    same_up_to_a_constant(Discriminative(divergence, weight), published)


@pytest.mark.parametrize(
    ("divergence", "weight_of"),
    [
        (SHIFTED_LOG, lambda r: (r / (1 + r)) ** 2),
        (fdiv.KL(), lambda r: r),
        (fdiv.Pearson(), lambda r: 2 * r**2),
    ],
    ids=lambda v: getattr(v, "__name__", repr(v)),
)
def test_a_wrong_class_is_pushed_down_by_the_curvature(divergence, weight_of):
    """u r^2 f''(r): bounded for the shifted log alone."""
    z = torch.tensor([[8.0, 0.0, -3.0, 2.0]], dtype=torch.float64, requires_grad=True)
    slope = gradient(Discriminative(divergence)(logits=z, labels=torch.tensor([1])).loss, z)
    close(slope[[0, 2, 3]], weight_of(z.detach().exp()[0, [0, 2, 3]]) / K, 1e-10)


# -- the optimum ---------------------------------------------------------------------------------------------


def expected_loss(method, z):
    """Of 20 examples that share their scores z [K], with labels as often as the posterior says."""
    labels = torch.arange(K).repeat_interleave((20 * P).round().long())
    return method(logits=z.expand(20, K), labels=labels).loss


@pytest.mark.parametrize("weight", [1.0, 0.8, float(K)])
@each_smooth_divergence
def test_the_optimum_is_the_log_ratio_and_its_value_the_divergence(divergence, weight):
    log_u = torch.full((K,), weight / K, dtype=torch.float64).log()
    z = (P.log() - log_u).requires_grad_()
    method = Discriminative(divergence, weight)
    loss = expected_loss(method, z)
    assert gradient(loss, z).abs().max() < 1e-10
    close(-loss, divergence(P.log(), log_u), 1e-10)
    close(method.log_probs(z), P.log(), 1e-12)
    step = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
    for size in (0.01, -0.5, 2.0):
        assert expected_loss(method, z + size * step) > loss
    metrics = method(logits=z.unsqueeze(0), labels=LABELS[:1]).metrics
    assert metrics["log_mass"].abs() < 1e-12


def test_descent_finds_the_posterior():
    for divergence in (SHIFTED_LOG, fdiv.KL(), fdiv.ReverseKL(), fdiv.SquaredHellinger(), fdiv.JS(0.5)):
        method, z = Discriminative(divergence), torch.zeros(K, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(method=method, z=z, optimiser=optimiser):
            optimiser.zero_grad()
            loss = expected_loss(method, z)
            loss.backward()
            return loss

        optimiser.step(closure)
        close(method.log_probs(z.detach()).exp(), P, 1e-4)


def test_a_kl_critic_whose_mass_is_one_is_cross_entropy():
    """Its minimum over a constant added to each example's scores."""
    z = head()
    z = z - (z.logsumexp(1, keepdim=True) - math.log(K))
    out = Discriminative(fdiv.KL())(logits=z, labels=LABELS)
    close(out.loss, cross_entropy(z, LABELS) - math.log(K), 1e-12)
    for shift in (-0.1, 0.1):
        assert Discriminative(fdiv.KL())(logits=z + shift, labels=LABELS).loss > out.loss


@each_smooth_divergence
def test_a_class_that_is_certain_has_the_largest_log_ratio_at_the_optimum(divergence):
    z = torch.zeros(K, requires_grad=True, dtype=torch.float64)
    slope = gradient(Discriminative(divergence)(logits=z.unsqueeze(0), labels=torch.tensor([2])).loss, z)
    assert slope[2] < 0 and (slope[[0, 1, 3]] > 0).all()


# -- the head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ratio", "smallest"),
    [
        ("log-ratio", torch.exp, False),
        ("softplus", softplus, False),
        ("sigmoid", lambda v: (1 - v.sigmoid()) / v.sigmoid(), True),
        ("inverse softplus", lambda v: 1 / softplus(v), True),
    ],
)
def test_every_head_has_its_ratio_and_its_class(name, ratio, smallest):
    v, method = head(), Discriminative(head=name)
    r = ratio(v)
    close(method.log_ratio(v), r.log(), 1e-12)
    close(method.log_probs(v), (r / r.sum(1, keepdim=True)).log(), 1e-12)
    assert torch.equal(method.log_probs(v).argmax(1), v.argmin(1) if smallest else v.argmax(1))
    other = Discriminative()(logits=r.log(), labels=LABELS).loss
    close(method(logits=v, labels=LABELS).loss, other, 1e-12)


def test_the_authors_softplus_heads_of_kl_and_reverse_kl():
    def kl_of(v):
        d = softplus(v)
        return -own(d).log().mean() + d.sum(1).mean()

    def reverse_kl_of(v):
        d = softplus(v)
        return own(d).mean() - d.log().mean()

    same_up_to_a_constant(Discriminative(fdiv.KL(), float(K), "softplus"), kl_of)
    same_up_to_a_constant(Discriminative(fdiv.ReverseKL(), 1.0, "inverse softplus"), reverse_kl_of)


def test_the_log_of_a_softplus_is_accurate_everywhere():
    v = torch.tensor(
        [-1e4, -200.0, -40.0, -10.1, -10.0, -9.9, -1.0, 0.0, 3.0, 50.0, 1e4], dtype=torch.float64
    )
    exact = torch.where(v < -30, v, v.exp().log1p().log())
    exact = torch.where(v > 30, v.clamp(min=1).log(), exact)
    close(log_softplus(v), exact, 1e-15)
    slope = torch.func.grad(lambda x: log_softplus(x).sum())(v)
    expected = torch.where(v < -30, 1.0, v.sigmoid() / torch.where(v > 30, v, v.exp().log1p()))
    close(slope, expected, 1e-10)


# -- the batch -----------------------------------------------------------------------------------------------


def test_micro_batches_sum_to_the_batch():
    z, method = head(), Discriminative()
    parts = [method(logits=z[a:b], labels=LABELS[a:b], count=B).loss for a, b in ((0, 2), (2, 5))]
    close(sum(parts), method(logits=z, labels=LABELS).loss, 1e-14)


def test_no_example_costs_nothing():
    z = torch.zeros(0, K, requires_grad=True)
    out = Discriminative()(logits=z, labels=LABELS[:0], count=8)
    assert out.loss == 0 and gradient(out.loss, z).shape == (0,)


# -- extremes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(HEADS))
@each_smooth_divergence
def test_scores_far_beyond_the_range_of_exp_give_finite_values_and_gradients(divergence, name):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 100.0], [50.0, -50.0, 90.0]], requires_grad=True)
    out = Discriminative(divergence, head=name)(logits=z, labels=torch.tensor([1, 1, 0]))
    assert out.loss.isfinite() and gradient(out.loss, z).isfinite().all()
    assert all(number.isfinite() for number in out.metrics.values())


@each_smooth_divergence
def test_a_class_without_mass_is_priced_at_f_of_zero_or_refused(divergence):
    z = torch.tensor([[0.3, -math.inf, 0.5, -0.2]], dtype=torch.float64, requires_grad=True)
    tensors = {"logits": z, "labels": torch.tensor([0])}
    if math.isinf(divergence.f_at_zero):
        with pytest.raises(FloatingPointError, match="log-ratios from -inf"):
            Discriminative(divergence)(**tensors)
        return
    out = Discriminative(divergence)(**tensors)
    rest = -divergence.phi(z[0, 0]) - divergence.psi(z[0, [0, 2, 3]]).sum() / K
    close(out.loss, rest - divergence.f_at_zero / K, 1e-12)
    assert gradient(out.loss, z).isfinite().all()
    assert out.metrics["log_mass"].isfinite()


def test_a_loss_that_no_number_holds_is_refused():
    z = torch.tensor([[1e4, -1e4, 0.0]])
    with pytest.raises(FloatingPointError, match=r"too far for Alpha\(alpha=5.0\) in torch.float32"):
        Discriminative(fdiv.Alpha(5.0))(logits=z, labels=torch.tensor([1]))


def test_half_precision_is_computed_in_float32():
    z = head().detach()
    low = Discriminative()(logits=z.bfloat16(), labels=LABELS).loss
    assert low.dtype == torch.float32
    close(low, Discriminative()(logits=z.bfloat16().float(), labels=LABELS).loss, 1e-7)


@pytest.mark.parametrize("divergence", [fdiv.TV(), fdiv.KL() + fdiv.TV()], ids=repr)
def test_a_kink_is_refused(divergence):
    with pytest.raises(TypeError, match="it tells no ratio"):
        Discriminative(divergence)


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="Discriminative takes an f-divergence"):
        Discriminative(other)


def test_wrong_settings_are_refused():
    for weight in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="weight is the reference's mass"):
            Discriminative(weight=weight)
    with pytest.raises(
        ValueError, match="head is one of 'log-ratio', 'softplus', 'sigmoid', 'inverse softplus'"
    ):
        Discriminative(head="logit")  # type: ignore[arg-type]


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = Discriminative(2 * fdiv.JS(0.5), weight=0.8, head="sigmoid")
    assert fdiv.parse(repr(method), ["fdiv.methods.supervise.discriminative"]) == method
    assert isinstance(method, Method) and Discriminative.reads == ("logits", "labels")
