"""Noisy labels: what noise does to the variational difference, by enumeration, and what undoes it."""

import math
from itertools import product

import pytest
import torch
from tests.worlds import (
    DIVERGENCES,
    close,
    each_divergence,
    each_other_object,
    each_smooth_divergence,
    gradient,
)
from torch.nn.functional import cross_entropy

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.supervise.label_noise import NoisyLabels
from fdiv.methods.unlearn.flat import FLAT

# A world: five inputs of probability 1/5 each, three classes, p(y|x), and scores of a network.
INPUTS, K = 5, 3
POSTERIOR = torch.tensor(
    [[0.7, 0.2, 0.1], [0.1, 0.85, 0.05], [0.3, 0.3, 0.4], [0.0, 0.6, 0.4], [0.25, 0.05, 0.7]],
    dtype=torch.float64,
)
SCORES = torch.tensor(
    [[1.2, 0.3, -0.7], [-0.4, 1.1, 0.2], [0.1, -0.3, 0.6], [-1.0, 0.4, 0.3], [0.2, -0.9, 0.8]],
    dtype=torch.float64,
)
RATES = (0.1, 0.25, 0.05)  # e_j: of turning into j, whatever the label
PLACES = torch.meshgrid(torch.arange(INPUTS), torch.arange(K), indexing="ij")  # of input and label
METHODS = [NoisyLabels(d) for d in DIVERGENCES] + [
    NoisyLabels(d, critic="log-ratio") for d in DIVERGENCES if d.is_smooth
]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def noisy(posterior):
    """With P(label j | true i) = e_j for j != i."""
    e = torch.tensor(RATES, dtype=torch.float64)
    transition = e.repeat(K, 1).fill_diagonal_(0.0)
    transition += torch.diag(1 - transition.sum(1))
    return posterior @ transition


def critic(method, scores, log_prior):
    """(g, f*(g)) at all [inputs, classes], by hand."""
    q = scores.softmax(-1)
    if method.critic == "probability":
        return FLAT(method.divergence).terms(q)
    log_ratio = q.log() - log_prior
    return method.divergence.phi(log_ratio), -method.divergence.psi(log_ratio)


def difference(method, posterior, scores, log_prior):
    """VD, every input with every label: of the joint less that of the product of its marginals."""
    gain, price = critic(method, scores, log_prior)
    joint = posterior / INPUTS
    marginals = joint.sum(1, keepdim=True) * joint.sum(0)
    return (joint * gain).sum() - (marginals * price).sum()


def expected(method, posterior, scores, log_prior):
    """The method's loss, every input with every label as often as it has it: all chances are of 400."""
    counts = 400 * posterior
    close(counts, counts.round(), 1e-12)
    times = counts.round().long().flatten()
    index, labels = (t.flatten().repeat_interleave(times) for t in PLACES)
    return method(logits=scores[index], labels=labels, log_prior=log_prior).loss


def with_rates(method):
    return NoisyLabels(method.divergence, critic=method.critic, rates=RATES)


# -- what it is ----------------------------------------------------------------------------------------------


@each_method
def test_the_loss_is_minus_the_variational_difference(method):
    log_prior = POSTERIOR.mean(0).log()
    close(
        expected(method, POSTERIOR, SCORES, log_prior),
        -difference(method, POSTERIOR, SCORES, log_prior),
        1e-12,
    )


@each_method
def test_it_is_below_the_divergence_of_joint_and_product(method):
    """Whatever the network and the critic, but for the paper's polynomial in place of Jeffreys' f*."""
    log_prior = POSTERIOR.mean(0).log()
    marginal = torch.full((INPUTS, 1), 1 / INPUTS, dtype=torch.float64).log()
    value = method.divergence((POSTERIOR / INPUTS).log().flatten(), (marginal + log_prior).flatten())
    for scale in (0.0, 0.5, 1.0, 3.0, -1.0):
        if method.critic == "log-ratio" or method.divergence != fdiv.Jeffreys():
            assert difference(method, POSTERIOR, scale * SCORES, log_prior) <= value + 1e-12


@each_smooth_divergence
def test_at_the_true_posterior_the_log_ratio_critic_tells_the_divergence(divergence):
    posterior = noisy(POSTERIOR)  # without zeros
    log_prior = posterior.mean(0).log()
    method = NoisyLabels(divergence, critic="log-ratio")
    joint, marginals = (posterior / INPUTS).log().flatten(), (log_prior - math.log(INPUTS)).repeat(INPUTS)
    close(expected(method, posterior, posterior.log(), log_prior), -divergence(joint, marginals), 1e-11)


def test_the_log_ratio_critic_of_kl_is_cross_entropy():
    """Less the entropy of the labels."""
    labels, log_prior = torch.tensor([0, 1, 2, 1, 0]), POSTERIOR.mean(0).log()
    loss = NoisyLabels(fdiv.KL(), critic="log-ratio")(logits=SCORES, labels=labels, log_prior=log_prior).loss
    close(loss, cross_entropy(SCORES, labels) + log_prior[labels].mean(), 1e-12)


def test_the_papers_rows():
    v = torch.linspace(0, 1, 11, dtype=torch.float64)
    log_q = torch.stack([v, 1 - v], -1).log()
    rows = {
        fdiv.KL(): (v, (v - 1).exp()),
        fdiv.Pearson(): (v, v**2 / 4 + v),
        fdiv.TV(): (v.tanh() / 2, v.tanh() / 2),
        2 * fdiv.JS(0.5): (math.log(2) - (1 + (-v).exp()).log(), v + (1 + (-v).exp()).log() - math.log(2)),
        fdiv.Jeffreys(): (v, v + v**2 / 4 + v**3 / 16),
    }
    for divergence, expected_terms in rows.items():
        terms = NoisyLabels(divergence).terms(log_q, torch.zeros(2))
        for actual, row in zip(terms, expected_terms, strict=True):
            close(actual[:, 0], row, 1e-12)


@each_divergence
def test_a_label_that_becomes_likelier_lowers_the_loss_where_labels_are_sure(divergence):
    """Also for reverse KL, squared Hellinger and Neyman, whose g falls in the authors' code."""
    scores = torch.zeros(1, K, dtype=torch.float64, requires_grad=True)
    log_prior = torch.full((K,), 1 / K, dtype=torch.float64).log()
    loss = NoisyLabels(divergence)(logits=scores, labels=torch.tensor([1]), log_prior=log_prior).loss
    slope = gradient(loss, scores)
    assert slope[1] < 0 and (slope[[0, 2]] > 0).all()


# -- noise ---------------------------------------------------------------------------------------------------


@each_method
def test_noise_scales_the_difference_and_adds_a_bias(method):
    log_prior, e = POSTERIOR.mean(0).log(), torch.tensor(RATES, dtype=torch.float64)
    clean = difference(method, POSTERIOR, SCORES, log_prior)
    gain, price = critic(method, SCORES, log_prior)
    bias = ((gain - price).mean(0) * e).sum()
    close(difference(method, noisy(POSTERIOR), SCORES, log_prior), (1 - e.sum()) * clean + bias, 1e-12)


def test_total_variation_has_no_bias():
    gain, price = NoisyLabels().terms(SCORES.log_softmax(-1), torch.zeros(K))
    assert torch.equal(gain, price)
    shrunk = 0.6 * expected(NoisyLabels(), POSTERIOR, SCORES, POSTERIOR.mean(0).log())
    close(expected(NoisyLabels(), noisy(POSTERIOR), SCORES, noisy(POSTERIOR).mean(0).log()), shrunk, 1e-12)


@each_method
def test_with_the_rates_noisy_labels_give_the_clean_loss_and_gradient(method):
    """For a fixed critic: that of the log-ratio knows the noisy prior alone."""
    dirty = noisy(POSTERIOR)
    log_prior, scores = dirty.mean(0).log(), SCORES.clone().requires_grad_()
    corrected = expected(with_rates(method), dirty, scores, log_prior)
    clean = -difference(method, POSTERIOR, scores, log_prior)
    close(corrected, clean, 1e-11)
    close(gradient(corrected, scores), gradient(clean, scores), 1e-11)
    if method.divergence != fdiv.TV():
        plain = expected(method, dirty, scores, log_prior)
        assert (plain / 0.6 - clean).abs() > 1e-6


# -- the product of marginals --------------------------------------------------------------------------------


def test_the_product_is_the_mean_over_all_pairings_and_varies_less_than_a_second_batch():
    """The authors' second batch pairs inputs and labels at random; enumerated for batches of two of five."""
    labels = torch.tensor([0, 1, 2, 1, 1])
    log_prior = (torch.bincount(labels, minlength=K).double() / 5).log()
    method = NoisyLabels(fdiv.Pearson())
    _, price = method.terms(SCORES.log_softmax(-1), log_prior)
    ours, theirs = [], []
    for batch in product(range(INPUTS), repeat=2):
        index = list(batch)
        ours.append((price[index] * log_prior.exp()).sum(1).mean())
        for pairing in product(range(INPUTS), repeat=2):
            theirs.append(price[index, labels[list(pairing)]].mean())
    full = torch.stack([price[i, labels[j]] for i in range(INPUTS) for j in range(INPUTS)]).mean()
    close(torch.stack(ours).mean(), full, 1e-13)
    close(torch.stack(theirs).mean(), full, 1e-13)
    assert torch.stack(ours).var() < 0.5 * torch.stack(theirs).var()


@each_method
def test_micro_batches_sum_to_the_batch(method):
    labels, log_prior = torch.tensor([0, 1, 2, 1, 0]), POSTERIOR.mean(0).log()
    tensors = {"log_prior": log_prior, "count": INPUTS}
    parts = [method(logits=SCORES[a:b], labels=labels[a:b], **tensors).loss for a, b in ((0, 2), (2, 5))]
    close(sum(parts), method(logits=SCORES, labels=labels, log_prior=log_prior).loss, 1e-13)


# -- warm-up -------------------------------------------------------------------------------------------------


def test_it_starts_with_cross_entropy():
    labels, log_prior = torch.tensor([0, 1, 2, 1, 0]), POSTERIOR.mean(0).log()
    method = NoisyLabels(warmup=0.3)
    losses = {
        progress: method(logits=SCORES, labels=labels, log_prior=log_prior, progress=progress)
        for progress in (0.0, 0.29, 0.3, 0.9)
    }
    close(losses[0.0].loss, cross_entropy(SCORES, labels), 1e-13)
    assert losses[0.29].loss == losses[0.0].loss != losses[0.3].loss == losses[0.9].loss
    for out in losses.values():
        close(out.metrics["cross_entropy"], cross_entropy(SCORES, labels), 1e-13)
        close(out.metrics["variational"], -losses[0.3].loss, 1e-13)


# -- extremes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, *map(with_rates, METHODS)], ids=repr)
def test_scores_far_beyond_the_range_of_exp_give_finite_values_and_gradients(method):
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 100.0], [50.0, -50.0, 90.0]], requires_grad=True)
    log_prior = torch.tensor([0.5, 0.3, 0.2]).log()
    out = method(logits=scores, labels=torch.tensor([1, 1, 0]), log_prior=log_prior)
    assert out.loss.isfinite() and gradient(out.loss, scores).isfinite().all()


@each_method
def test_a_class_without_labels_costs_nothing_and_has_a_finite_gradient(method):
    scores = torch.tensor([[0.3, -0.2, 0.1], [1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    log_prior = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64).log()
    out = method(logits=scores, labels=torch.tensor([1, 0]), log_prior=log_prior)
    assert out.loss.isfinite() and gradient(out.loss, scores).isfinite().all()
    with pytest.raises(ValueError, match="a label has the prior probability 0"):
        method(logits=scores, labels=torch.tensor([1, 2]), log_prior=log_prior)


def test_no_example_costs_nothing():
    scores = torch.zeros(0, K, requires_grad=True)
    out = NoisyLabels()(
        logits=scores, labels=torch.zeros(0, dtype=torch.long), log_prior=torch.zeros(K), count=8
    )
    assert out.loss == 0 and gradient(out.loss, scores).shape == (0,)


# -- refusals ------------------------------------------------------------------------------------------------


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="NoisyLabels takes an f-divergence"):
        NoisyLabels(other)


def test_a_kink_has_no_log_ratio_critic():
    with pytest.raises(TypeError, match="write critic='probability'"):
        NoisyLabels(fdiv.TV(), critic="log-ratio")


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="critic is 'probability' or 'log-ratio'"):
        NoisyLabels(critic="ratio")  # type: ignore[arg-type]
    for rates in ((0.5, 0.5), (-0.1, 0.1), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="a sum below 1"):
            NoisyLabels(rates=rates)
    for warmup in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="warmup is a fraction of the training"):
            NoisyLabels(warmup=warmup)


def test_what_is_not_of_one_size_is_refused():
    tensors = {"logits": SCORES, "labels": torch.tensor([0, 1, 2, 1, 0])}
    with pytest.raises(ValueError, match="log_prior has one number for each of 3 classes"):
        NoisyLabels()(**tensors, log_prior=torch.zeros(4))
    with pytest.raises(ValueError, match="rates has one number for each of 3 classes"):
        NoisyLabels(rates=(0.1, 0.1))(**tensors, log_prior=POSTERIOR.mean(0).log())


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = NoisyLabels(fdiv.Pearson(), critic="log-ratio", rates=(0.1, 0.2), warmup=0.5)
    assert fdiv.parse(repr(method), ["fdiv.methods.supervise.label_noise"]) == method
    assert isinstance(method, Method) and NoisyLabels().divergence == fdiv.TV()
