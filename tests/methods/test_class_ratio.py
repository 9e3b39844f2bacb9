"""Class ratios: certain and balanced predictions, and which way round the divergence is."""

import math

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.adapt.class_ratio import ClassRatio

B, K = 6, 4
PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
UNIFORM = torch.full((K,), 1 / K, dtype=torch.float64)


def predictions(seed=0):
    """(scores with gradient, probabilities)."""
    z = random_rows(B, K, seed).requires_grad_()
    return z, z.softmax(-1)


def entropy(q):
    return -(q * q.log()).sum(-1)


def test_a_uniform_prior_gives_the_mutual_information():
    """L = log K - I(x; k) for the batch's inputs, each of probability 1/B."""
    z, q = predictions()
    joint = q / B
    information = (joint * (joint / (joint.sum(1, keepdim=True) * joint.sum(0))).log()).sum()
    out = ClassRatio()(logits=z, log_prior=UNIFORM.log())
    close(out.loss, math.log(K) - information, 1e-13)
    close(out.metrics["information"], information, 1e-13)
    close(gradient(out.loss, z), gradient(-information, z), 1e-12)


def test_the_kl_is_from_the_prediction_to_the_prior():
    """The authors' direction, which is the reverse one here: p is the prior."""
    z, q = predictions()
    mean = q.mean(0)
    expected = entropy(q).mean() + 0.7 * (mean * (mean / PRIOR).log()).sum()
    close(ClassRatio(weight=0.7, floor=0.0)(logits=z, log_prior=PRIOR.log()).loss, expected, 1e-13)
    other = entropy(q).mean() + 0.7 * (PRIOR * (PRIOR / mean).log()).sum()
    close(ClassRatio(fdiv.KL(), weight=0.7, floor=0.0)(logits=z, log_prior=PRIOR.log()).loss, other, 1e-13)
    assert (expected - other).abs() > 1e-3 and ClassRatio().divergence == fdiv.ReverseKL()


@each_divergence
def test_any_divergence_is_of_the_prior_and_the_mean_prediction(divergence):
    z, q = predictions()
    out = ClassRatio(divergence, weight=2.0, floor=0.0)(logits=z, log_prior=PRIOR.log())
    value = divergence(PRIOR.log(), q.mean(0).log())
    close(out.loss, entropy(q).mean() + 2 * value, 1e-12)
    close(out.metrics["divergence"], value, 1e-12)
    close(out.metrics["entropy"], entropy(q).mean(), 1e-12)
    close(gradient(out.loss, z), gradient(entropy(q).mean() + 2 * value, z), 1e-11)


def test_a_divergence_that_is_no_f_divergence_serves_too():
    z, q = predictions()
    out = ClassRatio(fdiv.Renyi(2.0), floor=0.0)(logits=z, log_prior=PRIOR.log())
    close(out.loss, entropy(q).mean() + (PRIOR**2 / q.mean(0)).sum().log(), 1e-12)


def test_without_weight_it_is_the_entropy_alone():
    z, q = predictions()
    close(ClassRatio(weight=0.0)(logits=z, log_prior=PRIOR.log()).loss, entropy(q).mean(), 1e-13)


def test_classes_weigh_as_they_are_told():
    z, q = predictions()
    weights = (0.1, 0.9, 0.5, 1.0)
    terms = -(q * q.log()) * torch.tensor(weights, dtype=torch.float64)
    out = ClassRatio(weight=0.0, class_weights=weights)(logits=z, log_prior=PRIOR.log())
    close(out.loss, terms.sum(1).mean(), 1e-13)
    close(out.metrics["entropy"], entropy(q).mean(), 1e-13)


@each_divergence
def test_certain_predictions_in_the_right_ratio_cost_nothing(divergence):
    """Ten examples, of which four, three, two and one belong to the classes."""
    labels = torch.arange(K).repeat_interleave((10 * PRIOR).round().long())
    z = 60.0 * torch.nn.functional.one_hot(labels, K).double()
    method = ClassRatio(divergence)
    assert method(logits=z, log_prior=PRIOR.log()).loss.abs() < 1e-8
    others = 60.0 * torch.nn.functional.one_hot(torch.zeros_like(labels), K).double()
    assert method(logits=others, log_prior=PRIOR.log()).loss > 0.05


def test_entropy_alone_lets_classes_vanish_and_the_prior_keeps_them():
    z = torch.full((B, K), 0.0, dtype=torch.float64)
    z[:, 0] = 1.0  # every example leans to the first class, some of them more to the others than the rest
    z[:3, 1:] += 0.2 * torch.eye(3, dtype=torch.float64)
    shares = {}
    for weight in (0.0, 4.0):
        moved = z.clone().requires_grad_()
        optimiser = torch.optim.Adam([moved], lr=0.2)
        for _ in range(100):
            loss = ClassRatio(weight=weight)(logits=moved, log_prior=UNIFORM.log()).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        shares[weight] = moved.softmax(-1).mean(0).detach()
    assert shares[0.0][0] > 0.99
    assert (shares[4.0] > 0.1).all()


# -- the prior -----------------------------------------------------------------------------------------------


def test_the_floor_mixes_the_prior_with_a_uniform_one():
    close(ClassRatio(floor=0.1).log_target(PRIOR.log()).exp(), (PRIOR + 0.1) / 1.4, 1e-14)
    close(ClassRatio(floor=0.1).log_target(UNIFORM.log()), UNIFORM.log(), 1e-14)


def test_a_class_that_the_prior_leaves_out_has_the_authors_price():
    z, q = predictions()
    prior = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    out = ClassRatio()(logits=z, log_prior=prior.log())
    mean = q.mean(0)
    expected = entropy(q).mean() + (mean * (mean.log() - (prior + 1e-10).log())).sum()
    close(out.loss, expected, 1e-8)
    assert gradient(out.loss, z).isfinite().all()


def test_without_a_floor_it_is_refused_and_says_what_to_write():
    z, _ = predictions()
    log_prior = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    with pytest.raises(ValueError, match="leaves a class out that the other one has; write floor=1e-6"):
        ClassRatio(floor=0.0)(logits=z, log_prior=log_prior)
    assert ClassRatio(fdiv.KL(), floor=0.0)(logits=z, log_prior=log_prior).loss.isfinite()


# -- extremes ------------------------------------------------------------------------------------------------


@each_divergence
def test_scores_far_beyond_the_range_of_exp_give_finite_values_and_gradients(divergence):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 100.0], [50.0, -50.0, 90.0]], requires_grad=True)
    out = ClassRatio(divergence)(logits=z, log_prior=torch.tensor([0.2, 0.3, 0.5]).log())
    assert out.loss.isfinite() and gradient(out.loss, z).isfinite().all()


@each_divergence
def test_equal_scores_give_a_finite_gradient(divergence):
    z = torch.zeros(B, K, requires_grad=True)
    out = ClassRatio(divergence)(logits=z, log_prior=UNIFORM.float().log())
    assert out.loss.isfinite() and gradient(out.loss, z).abs().max() < 1e-6


def test_a_class_that_no_example_can_have_is_left_out_of_the_gradient():
    z = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.0, 0.5]], requires_grad=True)
    out = ClassRatio()(logits=z, log_prior=torch.tensor([0.2, 0.3, 0.5]).log())
    assert out.loss.isfinite() and gradient(out.loss, z).isfinite().all()


def test_no_example_costs_nothing():
    z = torch.zeros(0, K, requires_grad=True)
    out = ClassRatio()(logits=z, log_prior=PRIOR.log())
    assert out.loss == 0 and gradient(out.loss, z).shape == (0,)


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_part_of_the_batch_is_refused():
    z, _ = predictions()
    assert ClassRatio()(logits=z, log_prior=PRIOR.log(), count=float(B)).loss.isfinite()
    with pytest.raises(ValueError, match="got 6 examples of 12; leave micro_batch out"):
        ClassRatio()(logits=z, log_prior=PRIOR.log(), count=12.0)
    assert ClassRatio.unit == "batch"


def test_what_is_not_of_one_size_is_refused():
    z, _ = predictions()
    with pytest.raises(ValueError, match="log_prior has one number for each of 4 classes"):
        ClassRatio()(logits=z, log_prior=torch.zeros(3))
    with pytest.raises(ValueError, match="class_weights has one number for each of 4 classes"):
        ClassRatio(class_weights=(0.1, 0.9))(logits=z, log_prior=PRIOR.log())


def test_wrong_settings_are_refused():
    for wrong in ({"weight": -1.0}, {"weight": math.nan}, {"floor": -1e-3}, {"floor": math.inf}):
        with pytest.raises(ValueError, match="is finite and >= 0"):
            ClassRatio(**wrong)
    with pytest.raises(ValueError, match="class_weights are finite and >= 0"):
        ClassRatio(class_weights=(-0.1, 1.0))
    with pytest.raises(TypeError):
        ClassRatio("KL")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on"):
        ClassRatio(fdiv.Energy())  # type: ignore[arg-type]


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = ClassRatio(fdiv.JS(0.3), weight=2.0, class_weights=(0.1, 0.9), floor=1e-6)
    assert fdiv.parse(repr(method), ["fdiv.methods.adapt.class_ratio"]) == method
    assert isinstance(method, Method) and ClassRatio.reads == ("logits", "log_prior")
