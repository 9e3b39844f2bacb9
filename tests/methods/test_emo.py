"""EMO: the transport of a guess to one token, and its mixtures with the likelihood."""

import math
from dataclasses import replace

import pytest
import torch
from tests.estimate.test_fused_linear import PeakMemory
from tests.worlds import close, gradient
from torch.nn.functional import cross_entropy, normalize

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.supervise.emo import EMO, unit_rows

ROWS, VOCAB, WIDTH = 11, 101, 5
DOUBLE = torch.float64
VARIANTS = [
    EMO(),
    EMO("emo2"),
    EMO(adaptive=True),
    EMO("emo2", adaptive=True),
    EMO(largest_ratio=3.0),
    EMO(cost="reference"),
]
each_variant = pytest.mark.parametrize("method", VARIANTS, ids=repr)


def problem(rows=ROWS, dtype=DOUBLE, seed=0):
    """hidden, weight, labels"""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator, dtype=DOUBLE) for n in (rows, VOCAB))
    labels = torch.randint(VOCAB, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def other_head():
    return torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(7), dtype=DOUBLE)


def evidence(method, hidden, weight, labels):
    extra = {"p_weight": other_head()} if method.cost == "reference" else {}
    return {"q_hidden": hidden, "q_weight": weight, "labels": labels} | extra


def dense(method, hidden, weight, labels, points):
    """The rows' losses by autograd, as the equations are written."""
    logits = hidden @ weight.T
    e = normalize(points.detach(), dim=-1)
    nll = cross_entropy(logits, labels, reduction="none")
    q = logits.softmax(-1)
    q_label = q.gather(-1, labels[:, None]).squeeze(-1).detach()
    transport = 1 - (e[labels] * (q @ e)).sum(-1)
    shown = transport + q_label if method.adaptive else transport
    if method.mix == "emo1":
        ratio = (nll / shown).clamp(max=method.largest_ratio or math.inf).detach()
        return (nll + ratio * shown) / 2
    return shown + (shown / nll).clamp(max=method.largest_ratio or math.inf).detach() * nll


def alone(q, embedding, label):
    """(transport, its gradient in the logits) of one guess: emo1 twice, less the likelihood, by the ratio."""
    log_q = torch.tensor(q, dtype=DOUBLE).log()
    hidden, weight = log_q[None].requires_grad_(), torch.eye(len(q), dtype=DOUBLE)
    points = unit_rows(torch.tensor(embedding, dtype=DOUBLE))
    loss, nll, transport = EMO().rows(hidden, weight, torch.tensor([label]), points)
    mixed = 2 * gradient(loss.sum(), hidden)
    likelihood = gradient(cross_entropy(hidden, torch.tensor([label])), hidden)
    return transport.item(), (mixed - likelihood) * (transport / nll)


# -- the transport ----------------------------------------------------------------------------------------


def test_worked_numbers():
    value, slope = alone((0.2, 0.3, 0.5), ((1.0, 0.0), (0.0, 1.0), (0.6, 0.8)), 0)
    assert value == pytest.approx(0.5, abs=1e-12)  # .3 * 1 + .5 * .4
    close(slope, torch.tensor([-0.1, 0.15, -0.05], dtype=DOUBLE), 1e-8)


def test_it_is_the_cost_of_the_best_plan_to_a_single_token():
    ot = pytest.importorskip("ot")
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randn(7, 4, generator=generator, dtype=DOUBLE)
    q = torch.rand(7, generator=generator, dtype=DOUBLE)
    q = q / q.sum()
    cost = 1 - normalize(embedding) @ normalize(embedding).T
    one_hot = torch.eye(7, dtype=DOUBLE)[2]
    exact = ot.emd2(q.numpy(), one_hot.numpy(), cost.clamp(min=0).numpy())
    value, slope = alone(q.tolist(), embedding.tolist(), 2)
    assert value == pytest.approx(exact, abs=1e-12)
    close(slope, q * (cost[2] - value), 1e-8)


def test_of_a_guess_that_is_right_it_is_zero_and_of_one_on_an_opposite_token_two():
    embedding = ((1.0, 0.0), (-2.0, 0.0), (0.0, 1.0))
    assert alone((1.0, 1e-300, 1e-300), embedding, 0)[0] == pytest.approx(0, abs=1e-12)
    value, slope = alone((1e-12, 1 - 2e-12, 1e-12), embedding, 0)
    assert value == pytest.approx(2, abs=1e-9)
    assert slope.abs().max() < 1e-9  # sure and wrong: nothing to learn, hence the likelihood beside it


def test_the_length_of_embeddings_is_nothing_to_it_and_a_row_of_zeros_is_as_far_as_an_orthogonal_one():
    q = (0.2, 0.3, 0.5)
    short = alone(q, ((1.0, 0.0), (0.0, 1.0), (0.6, 0.8)), 0)
    long = alone(q, ((9.0, 0.0), (0.0, 0.1), (60.0, 80.0)), 0)
    assert long[0] == pytest.approx(short[0], abs=1e-12)
    assert alone(q, ((0.0, 0.0), (0.0, 1.0), (0.6, 0.8)), 0)[0] == pytest.approx(0.8, abs=1e-12)


# -- the mixtures -----------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("chunk", [4, None])
def test_values_and_gradients_are_those_of_autograd_on_full_logits(method, chunk):
    method = replace(method, chunk=chunk)
    hidden, weight, labels = problem()
    points = other_head() if method.cost == "reference" else weight
    out = method(**evidence(method, hidden, weight, labels), count=ROWS + 5)
    loss = dense(method, hidden, weight, labels, points).sum() / (ROWS + 5)
    close(out.loss, loss, 1e-8)
    close(gradient(out.loss, hidden, weight), gradient(loss, hidden, weight), 1e-8)


@each_variant
def test_rows_with_weights_of_their_own_have_their_own_gradients(method):
    hidden, weight, labels = problem()
    points = other_head() if method.cost == "reference" else weight
    upstream = torch.linspace(-1, 2, ROWS, dtype=DOUBLE)
    loss, _, _ = method.rows(hidden, weight, labels, unit_rows(points))
    expected = dense(method, hidden, weight, labels, points)
    close(gradient(upstream @ loss, hidden, weight), gradient(upstream @ expected, hidden, weight), 1e-8)


def test_emo1_is_as_large_as_the_likelihood_and_emo2_as_twice_the_transport():
    hidden, weight, labels = problem()
    for method, times, name in ((EMO(), 1, "nll"), (EMO("emo2"), 2, "transport")):
        out = method(q_hidden=hidden, q_weight=weight, labels=labels)
        close(out.loss, times * out.metrics[name], 1e-8)


def test_adaptive_changes_the_ratio_and_not_the_slope_of_the_transport():
    """emo1 gradients differ by the ratio alone: nll / (L + q_y) for nll / L."""
    hidden, weight, labels = problem(rows=1)
    likelihood = gradient(cross_entropy(hidden @ weight.T, labels), hidden)
    plain, lifted = (
        2 * gradient(EMO(adaptive=a).rows(hidden, weight, labels, unit_rows(weight))[0], hidden) - likelihood
        for a in (False, True)
    )
    transport = EMO().rows(hidden, weight, labels, unit_rows(weight))[2]
    q_label = (hidden @ weight.T).softmax(-1)[0, labels]
    close(lifted, plain * transport / (transport + q_label), 1e-8)


def test_the_ratio_stops_at_its_largest_value():
    nll, transport, none = (torch.tensor([x], dtype=DOUBLE) for x in (8.0, 0.5, 0.0))
    assert EMO().ratio(nll, transport, none).item() == pytest.approx(16)
    assert EMO(largest_ratio=3.0).ratio(nll, transport, none).item() == 3
    assert EMO("emo2").ratio(nll, transport, none).item() == pytest.approx(1 / 16)


def test_the_transports_pull_is_bounded_by_the_likelihoods_size():
    """sum_v q_v |c_v - L| <= 2 L, so that a small transport under a large nll cannot blow up."""
    hidden, weight, labels = problem(rows=200)
    weight.data[1::2] = weight.data[::2][: len(weight.data[1::2])]  # pairs of tokens at cost 0
    logits = (30 * hidden.detach() @ weight.detach().T).requires_grad_()
    loss, nll, _ = EMO().rows(logits, torch.eye(VOCAB, dtype=DOUBLE), labels, unit_rows(weight))
    slope = gradient(loss.sum(), logits).reshape(logits.shape)
    likelihood = gradient(cross_entropy(logits, labels, reduction="sum"), logits).reshape(logits.shape)
    pull = (2 * slope - likelihood).abs().sum(-1)
    assert (pull <= 2 * nll + 1e-9).all() and (pull > 0.5 * nll).any()


def test_neither_the_costs_nor_the_references_head_get_a_gradient():
    hidden, weight, labels = problem()
    other = other_head().requires_grad_()
    EMO(cost="reference")(q_hidden=hidden, q_weight=weight, labels=labels, p_weight=other).loss.backward()
    assert other.grad is None and weight.grad is not None
    through_logits_alone = gradient(dense(EMO(), hidden, weight, labels, weight).mean(), weight)
    close(
        gradient(EMO()(q_hidden=hidden, q_weight=weight, labels=labels).loss, weight),
        through_logits_alone,
        1e-8,
    )


# -- what it tells ----------------------------------------------------------------------------------------


def test_metrics_are_means_over_tokens_and_tell_how_alike_the_embeddings_are():
    hidden, weight, labels = problem()
    metrics = EMO()(q_hidden=hidden, q_weight=weight, labels=labels).metrics
    e = normalize(weight.detach())
    cosines = e @ e.T
    close(metrics["anisotropy"], cosines.mean(), 1e-12)
    close(metrics["uniform transport"], (1 - cosines)[labels].mean(), 1e-12)
    close(metrics["nll"], cross_entropy(hidden @ weight.T, labels).detach(), 1e-12)
    same = torch.ones(VOCAB, WIDTH, dtype=DOUBLE)
    flat = EMO(cost="reference")(q_hidden=hidden, q_weight=weight, labels=labels, p_weight=same).metrics
    assert flat["anisotropy"].item() == pytest.approx(1)
    assert flat["transport"].item() == pytest.approx(0, abs=1e-12)


@each_variant
def test_its_repr_is_its_recipe(method):
    assert fdiv.parse(repr(method), ["fdiv.methods.supervise.emo"]) == method


def test_it_is_a_method():
    assert isinstance(EMO(), Method) and EMO().reads == ("q_hidden", "q_weight", "labels")
    assert EMO(cost="reference").reads == ("q_hidden", "q_weight", "labels", "p_weight")


# -- memory, precision, edges -----------------------------------------------------------------------------


def test_rows_times_vocabulary_is_never_held_forward_or_backward():
    rows, chunk = 512, 8
    hidden, weight, labels = problem(rows, torch.float32)
    with PeakMemory(floor=chunk * VOCAB) as fused:
        EMO(chunk=chunk)(q_hidden=hidden, q_weight=weight, labels=labels).loss.backward()
    with PeakMemory(floor=chunk * VOCAB) as full:
        dense(EMO(), hidden, weight, labels, weight).sum().backward()
    assert fused.largest <= max(chunk * VOCAB, rows * WIDTH)
    assert full.largest == rows * VOCAB  # the measure sees what it should
    assert fused.peak < rows * VOCAB * 4 < full.peak


@each_variant
def test_a_bfloat16_model_gives_float32_and_the_gradient_of_float64_on_the_same_values(method):
    hidden, weight, labels = problem(dtype=torch.bfloat16)
    out = method(**evidence(method, hidden, weight, labels))
    assert out.loss.dtype == torch.float32
    states, head = (t.detach().double().requires_grad_() for t in (hidden, weight))
    points = other_head() if method.cost == "reference" else head
    expected = dense(method, states, head, labels, points).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    actual = gradient(out.loss, hidden, weight).double()
    wanted = gradient(expected, states, head)
    assert (actual - wanted).norm() < 2**-7 * wanted.norm()


def test_autocast_does_not_lower_the_precision():
    hidden, weight, labels = problem(dtype=torch.float32)
    plain = EMO()(q_hidden=hidden, q_weight=weight, labels=labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = EMO()(q_hidden=hidden, q_weight=weight, labels=labels)
    assert torch.equal(out.loss, plain.loss)
    assert all(torch.equal(out.metrics[name], value) for name, value in plain.metrics.items())


@each_variant
@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_logits_as_flat_or_as_far_apart_as_can_be_have_finite_values_and_slopes(method, scale):
    hidden, weight, labels = problem(dtype=torch.float32)
    hidden = (hidden.detach() * scale).requires_grad_()
    out = method(**evidence(method, hidden, weight, labels))
    assert out.loss.isfinite() and gradient(out.loss, hidden, weight).isfinite().all()


@each_variant
def test_a_sure_and_right_guess_in_float32_costs_nothing_to_move(method):
    head, labels = torch.eye(VOCAB), torch.arange(5)
    hidden = (1e4 * head[:5]).requires_grad_()
    extra = {"p_weight": torch.randn(VOCAB, 3)} if method.cost == "reference" else {}
    out = method(q_hidden=hidden, q_weight=head, labels=labels, **extra)
    assert out.metrics["transport"] == 0 and out.metrics["nll"] == 0  # and not what rounding leaves of 1 - 1
    assert out.loss.item() == (1.0 if method.mix == "emo2" and method.adaptive else 0.0)  # q(y) itself
    assert gradient(out.loss, hidden).abs().max() == 0


@each_variant
@pytest.mark.parametrize("lead", [8.0, 17.0, 25.0])
def test_an_almost_sure_guess_has_in_float32_the_gradient_of_float64(method, lead):
    head, labels, points = torch.eye(VOCAB), torch.arange(5), other_head()
    noise = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(5))
    logits = noise + lead * head[:5]

    def slope(z: torch.Tensor):
        loss, _, _ = method.rows(z, head.to(z), labels, unit_rows(points.to(z)))
        return gradient(loss.sum(), z)

    exact, rounded = (slope(z.requires_grad_()) for z in (logits.double(), logits.clone()))
    assert (rounded.double() - exact).norm() <= 1e-4 * exact.norm()


@each_variant
def test_without_a_token_the_loss_is_zero_and_keeps_its_graph(method):
    hidden, weight, labels = problem(rows=0)
    out = method(**evidence(method, hidden, weight, labels))
    assert out.loss.item() == 0 and not gradient(out.loss, weight).any()
    assert all(value.isfinite() for value in out.metrics.values())


def test_costs_between_other_tokens_and_a_reference_that_is_missing_or_too_much_are_refused():
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match="between 101 tokens, got rows of 99"):
        EMO(cost="reference")(q_hidden=hidden, q_weight=weight, labels=labels, p_weight=other_head()[:99])
    with pytest.raises(TypeError, match="takes a p_weight"):
        EMO(cost="reference")(q_hidden=hidden, q_weight=weight, labels=labels)
    with pytest.raises(TypeError, match="takes no p_weight"):
        EMO()(q_hidden=hidden, q_weight=weight, labels=labels, p_weight=other_head())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mix": "alone"}, "always mixed with the likelihood"),
        ({"cost": "frozen"}, "'current' or 'reference'"),
        ({"adaptive": 1}, "True or False"),
        ({"largest_ratio": 0.0}, r"write SFT\(\)"),
        ({"largest_ratio": math.nan}, "is > 0 or None"),
        ({"chunk": 0}, "rows >= 1"),
    ],
)
def test_parameters_out_of_range_are_refused_when_built(arguments, match):
    with pytest.raises(ValueError, match=match):
        EMO(**arguments)
