"""FLAT: the authors' five rows that are right, the rule for every other f, and which way they push."""

import math

import pytest
import torch
from tests.thinned import thinned
from tests.worlds import DIVERGENCES, LOG_P, close, each_divergence, each_other_object, gradient, six_symbols
from torch.nn.functional import softplus

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.unlearn.flat import FLAT

V = torch.linspace(0.001, 1, 40, dtype=torch.float64)  # a mean of probabilities
ALL = (*DIVERGENCES, 2 * fdiv.JS(0.5), 2 * fdiv.SquaredHellinger(), 0.5 * fdiv.Pearson())
LOG2 = math.log(2)

# g, f* after g, and the derivatives of both.
AUTHORS = [
    (
        fdiv.KL(),
        lambda v: v,
        lambda v: (v - 1).exp(),
        lambda v: torch.ones_like(v),
        lambda v: (v - 1).exp(),
    ),
    (
        fdiv.Pearson(),
        lambda v: v,
        lambda v: v + v * v / 4,
        lambda v: torch.ones_like(v),
        lambda v: 1 + v / 2,
    ),
    (
        2 * fdiv.JS(0.5),
        lambda v: LOG2 - softplus(-v),
        lambda v: v + softplus(-v) - LOG2,
        lambda v: 1 / (1 + v.exp()),
        lambda v: 1 / (1 + (-v).exp()),
    ),
    (
        fdiv.TV(),
        lambda v: v.tanh() / 2,
        lambda v: v.tanh() / 2,
        lambda v: v.cosh() ** -2 / 2,
        lambda v: v.cosh() ** -2 / 2,
    ),
    (
        fdiv.Jeffreys(),
        lambda v: v,
        lambda v: v + v**2 / 4 + v**3 / 16,
        lambda v: torch.ones_like(v),
        lambda v: 1 + v / 2 + 3 * v**2 / 16,
    ),
]
each_row = pytest.mark.parametrize(
    ("divergence", "g", "price", "dg", "dprice"), AUTHORS, ids=[repr(row[0]) for row in AUTHORS]
)


def answers(lengths, seed=0):
    """Log-probabilities of answers' tokens, and the number of each one's answer."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(sum(lengths), generator=generator, dtype=torch.float64) * 0.9 + 0.05
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return chance.log().requires_grad_(), sequence


def loss(divergence, log_q, sequence, pairs, batch=None, **settings):
    method = FLAT(divergence, **settings)
    return method(log_q_label=log_q, sequence=sequence, pairs=pairs, pairs_in_batch=batch or pairs)


def as_losses(rows):
    """Mean probabilities as answers of one token each: the first half templates."""
    return rows.log(), torch.arange(len(rows)), len(rows) // 2


# -- rows -----------------------------------------------------------------------------------------------


@each_row
def test_the_authors_rows_that_are_right(divergence, g, price, dg, dprice):
    gain, cost = FLAT(divergence).terms(V)
    close(gain, g(V), 1e-14)
    close(cost, price(V), 1e-14)
    log_q, sequence, pairs = as_losses(V)
    close(loss(divergence, log_q, sequence, pairs).loss, (price(V[20:]) - g(V[:20])).mean(), 1e-13)


@each_row
def test_the_weights_of_template_and_forgotten_answer(divergence, g, price, dg, dprice):
    log_q, sequence = answers([3, 1, 2, 5])
    out = loss(divergence, log_q, sequence, pairs=2)
    mean = torch.stack([log_q.detach().exp()[sequence == n].mean() for n in range(4)])
    length = torch.tensor([3, 1, 2, 5])
    weight = torch.cat([-dg(mean[:2]), dprice(mean[2:])]) / 2 / length
    close(gradient(out.loss, log_q), weight[sequence] * log_q.detach().exp(), 1e-12)


def test_the_row_of_kl_is_that_of_its_standard_form_shifted_by_one():
    gain, price = FLAT(fdiv.KL()).terms(V)
    close(price - gain, fdiv.KL().conjugate(V - 1) - (V - 1), 1e-14)


def test_the_row_of_jeffreys_is_the_conjugate_up_to_the_third_order():
    v = torch.tensor([0.02, 0.01], dtype=torch.float64)
    error = fdiv.Jeffreys().conjugate(v) - FLAT(fdiv.Jeffreys()).terms(v)[1]
    assert 15 < error[0] / error[1] < 17


PLAIN = [d for d in ALL if d not in (fdiv.KL(), fdiv.Jeffreys(), 0.7 * fdiv.KL() + 0.3 * fdiv.TV())]


@pytest.mark.parametrize("divergence", PLAIN, ids=repr)
def test_the_price_is_the_conjugate_of_the_gain(divergence):
    for v in (V, -5 * V):
        gain, price = FLAT(divergence).terms(v)
        close(price, divergence.conjugate(gain), 1e-9)


@pytest.mark.parametrize("divergence", [d for d in (*PLAIN, fdiv.KL()) if d.is_smooth], ids=repr)
def test_the_right_critic_attains_the_divergence(divergence):
    """At v = log p/q the variational bound is tight; KL and Pearson read v otherwise."""
    _, log_q = six_symbols()
    log_q = log_q.detach()
    ratio = (LOG_P - log_q).exp()
    pearson = 2 * (ratio - 1)
    readings = {fdiv.KL(): 1 + ratio.log(), fdiv.Pearson(): pearson, 0.5 * fdiv.Pearson(): pearson}
    v = readings.get(divergence, ratio.log())
    gain, price = FLAT(divergence).terms(v)
    value = (LOG_P.exp() * gain).sum() - (log_q.exp() * price).sum()
    close(value, divergence(LOG_P, log_q), 1e-9)


def kinked(log_ratio):
    return log_ratio.expm1().abs() / 2


def kinked_and_smooth(log_ratio):
    return log_ratio.expm1().abs() / 2 + (log_ratio / 2).expm1().square()


def test_a_kink_is_climbed_along_tanh_whoever_wrote_it():
    for got, expected in zip(FLAT(fdiv.Generator(kinked)).terms(V), FLAT(fdiv.TV()).terms(V), strict=True):
        close(got, expected, 1e-12)
    gain, price = FLAT(fdiv.Generator(kinked_and_smooth)).terms(V)
    close(gain, V.tanh() / 2 - torch.expm1(-V / 2), 1e-9)
    assert (price.diff() > 0).all()


def test_the_loss_of_a_sum_is_the_sum_of_the_losses():
    log_q, sequence = answers([3, 1, 2, 5])
    whole = loss(0.7 * fdiv.KL() + 0.3 * fdiv.TV(), log_q, sequence, 2).loss
    one, two = (loss(d, log_q, sequence, 2).loss for d in (fdiv.KL(), fdiv.TV()))
    close(whole, 0.7 * one + 0.3 * two, 1e-14)
    nested = fdiv.Sum(((2.0, 0.35 * fdiv.KL() + 0.15 * fdiv.TV()),))
    close(loss(nested, log_q, sequence, 2).loss, whole, 1e-14)


# -- direction ------------------------------------------------------------------------------------------


def two_answers():
    """Logits of a template of two tokens and of an answer of three; the labels are 0."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.tensor([0, 0, 1, 1, 1])


def statistics(logits, sequence, stat):
    rows = logits.log_softmax(-1)[:, 0]
    rows = rows.exp() if stat == "prob" else rows
    return torch.stack([rows[sequence == n].mean() for n in (0, 1)])


@pytest.mark.parametrize("stat", ["prob", "logprob"])
@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_a_step_of_descent_raises_the_template_and_lowers_the_other(divergence, stat):
    logits, sequence = two_answers()
    before = statistics(logits, sequence, stat)
    out = loss(divergence, logits.log_softmax(-1)[:, 0], sequence, 1, stat=stat)
    (step,) = torch.autograd.grad(out.loss, logits)
    after = statistics(logits - 1e-3 * step / step.abs().max(), sequence, stat)
    assert after[0] > before[0]
    assert after[1] < before[1]


@pytest.mark.parametrize("divergence", thinned(ALL), ids=repr)
def test_descent_arrives_at_the_template(divergence):
    """Template and other answer compete for one softmax."""
    logits = torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    for _ in range(12):
        out = loss(divergence, logits.log_softmax(-1)[:2], torch.tensor([0, 1]), 1)
        (step,) = torch.autograd.grad(out.loss, logits)
        logits = (logits - step / step.norm()).detach().requires_grad_()
    template, forget = logits.softmax(-1)[:2].tolist()
    assert template > 0.9 and forget < 0.05


# -- reduction ------------------------------------------------------------------------------------------


@each_divergence
def test_how_often_an_answer_repeats_its_tokens_makes_no_difference(divergence):
    log_q, sequence = answers([3, 1, 2, 5])
    out = loss(divergence, log_q, sequence, 2)
    times = torch.tensor([1, 4, 2, 3])[sequence]
    again = loss(divergence, log_q.repeat_interleave(times), sequence.repeat_interleave(times), 2)
    close(again.loss, out.loss, 1e-13)
    close(gradient(again.loss, log_q), gradient(out.loss, log_q), 1e-12)
    for name, number in out.metrics.items():
        close(again.metrics[name], number)


def test_micro_batches_add_up_to_the_global_batch():
    log_q, sequence = answers([3, 1, 2, 5, 2, 2])  # three templates, three others
    whole = loss(fdiv.JS(0.3), log_q, sequence, 3)
    split = []
    for pairs in ([0], [1, 2]):
        mine = [*pairs, *(n + 3 for n in pairs)]
        rows = torch.cat([(sequence == n).nonzero().flatten() for n in mine])
        numbers = torch.cat([torch.full(((sequence == n).sum(),), k) for k, n in enumerate(mine)])
        split.append(loss(fdiv.JS(0.3), log_q[rows], numbers, len(pairs), batch=3).loss)
    close(sum(split), whole.loss, 1e-13)
    close(gradient(sum(split), log_q), gradient(whole.loss, log_q), 1e-12)


def test_the_metrics_are_the_mean_probabilities():
    log_q, sequence = answers([3, 1, 2, 5])
    mean = torch.stack([log_q.detach().exp()[sequence == n].mean() for n in range(4)])
    metrics = loss(fdiv.KL(), log_q, sequence, 2).metrics
    close(metrics["template"], mean[:2].mean())
    close(metrics["forget"], mean[2:].mean())
    assert not any(number.requires_grad for number in metrics.values())


# -- far from the ordinary --------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_probabilities_of_nought_and_one_and_empty_answers_are_finite(divergence):
    log_q = torch.tensor([0.0, -1e4, -math.inf, -1e4, 0.0, -math.inf, -1e-8], requires_grad=True)
    sequence = torch.tensor([0, 1, 2, 4, 5, 6, 6])  # templates 0 to 3, of which the last is empty; 7 is too
    out = loss(divergence, log_q, sequence, 4)
    assert out.loss.isfinite() and gradient(out.loss, log_q).isfinite().all()


@each_divergence
def test_log_probabilities_far_below_are_finite(divergence):
    log_q = torch.tensor([-1e4, -300.0, 0.0, -1e4], requires_grad=True)
    out = loss(divergence, log_q, torch.arange(4), 2, stat="logprob")
    assert out.loss.isfinite() and gradient(out.loss, log_q).isfinite().all()


def test_without_any_token_there_is_a_graph_and_no_gradient():
    log_q = torch.zeros(0, requires_grad=True)
    out = loss(fdiv.KL(), log_q, torch.zeros(0, dtype=torch.long), 2)
    assert out.loss.isfinite() and gradient(out.loss, log_q).numel() == 0


def test_a_token_without_probability_has_no_mean_log_probability():
    with pytest.raises(ValueError, match="write stat='prob'"):
        loss(fdiv.KL(), torch.tensor([-math.inf, -1.0]), torch.tensor([0, 1]), 1, stat="logprob")


def test_a_statistic_that_has_no_finite_price_is_refused():
    far = torch.tensor([-1e4, -1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"too small for .*write stat='prob'"):
        loss(fdiv.Alpha(-1.5), far, torch.tensor([0, 1]), 1, stat="logprob")


def test_pearsons_price_is_flat_beyond_its_slopes():
    log_q = torch.tensor([-1.0, -2.5], dtype=torch.float64, requires_grad=True)
    out = loss(fdiv.Pearson(), log_q, torch.tensor([0, 1]), 1, stat="logprob")
    assert out.loss.item() == pytest.approx(1.0 - 1.0)  # -g(-1) + f*(-2.5) = 1 - f(0)
    assert gradient(out.loss, log_q).tolist() == [-1.0, 0.0]


# -- the three rows that push the wrong way -----------------------------------------------------------------

WRONG = [
    (fdiv.ReverseKL(), lambda v: -v.exp(), lambda v: -1 - v),
    (2 * fdiv.SquaredHellinger(), lambda v: 1 - v.exp(), lambda v: (1 - v.exp()) / v.exp()),
    (fdiv.Neyman(), lambda v: 1 - v.exp(), lambda v: 2 - 2 * (1 - v).sqrt()),
]


@pytest.mark.parametrize(("divergence", "g", "price"), WRONG, ids=["ReverseKL", "Hellinger", "Neyman"])
def test_legacy_is_the_authors_code_and_lowers_the_template(divergence, g, price):
    v = V[:-1]  # 2 - 2 sqrt(1 - v) has no slope at 1
    gain, cost = FLAT(divergence, legacy=True).terms(v)
    close(gain, g(v), 1e-14)
    close(cost, price(v), 1e-14)
    assert (gain.diff() < 0).all()
    assert (FLAT(divergence).terms(v)[0].diff() > 0).all()


@pytest.mark.parametrize("divergence", [fdiv.KL(), fdiv.TV(), fdiv.KL() + fdiv.Neyman()], ids=repr)
def test_legacy_stands_for_those_three_alone(divergence):
    with pytest.raises(ValueError, match="leave legacy out"):
        FLAT(divergence, legacy=True)


# -- what is refused ----------------------------------------------------------------------------------------


@each_other_object
def test_what_is_no_f_divergence_is_refused(other):
    with pytest.raises(TypeError, match="FLAT takes an f-divergence"):
        FLAT(other)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="stat is 'prob' or 'logprob', got 'mean'"):
        FLAT(stat="mean")


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = FLAT(2 * fdiv.JS(0.5), stat="logprob")
    assert fdiv.parse(repr(method), ["fdiv.methods.unlearn.flat"]) == method
    assert isinstance(method, Method) and FLAT().divergence == fdiv.TV()
    assert FLAT.reads == ("log_q_label", "sequence", "pairs", "pairs_in_batch")
