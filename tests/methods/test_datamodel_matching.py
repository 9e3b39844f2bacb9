"""Datamodel matching: datamodels where they are exact, what the loss leads to, and KL of margins."""

import math

import pytest
import torch
from tests.worlds import close

from fdiv import JS, KL, ReverseKL, SquaredHellinger
from fdiv.adapters.datamodels import fit_datamodels
from fdiv.methods.unlearn.datamodel_matching import DatamodelMatching, Datamodels, klom, margins

TRAINING, FEATURES, CLASSES = 12, 4, 3


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data():
    """x [training, features], y [training], and points to look at."""
    return draw(TRAINING, FEATURES), draw(TRAINING, seed=1), draw(5, FEATURES, seed=2)


def ridge_outputs(included, strength):
    """Predictions [models, points] of ridge regressions on the included examples."""
    x, y, points = data()
    kept = included.double()
    gram = torch.einsum("mi,ij,ik->mjk", kept, x, x) + strength * torch.eye(FEATURES)
    return torch.linalg.solve(gram, (kept * y) @ x) @ points.T


def subsets(models, seed=3):
    return torch.rand(models, TRAINING, generator=torch.Generator().manual_seed(seed)) < 0.5


# -- datamodels ----------------------------------------------------------------------------------------


def test_where_examples_add_up_the_datamodel_is_what_they_add():
    """A kernel sum: f(x; S) = 1 + sum over S of k(x, x_i) y_i."""
    x, y, points = data()
    parts = torch.exp(-torch.cdist(x, points).square() / 4) * y[:, None]
    included = subsets(60)
    fitted = fit_datamodels(included, 1 + included.double() @ parts)
    assert fitted.weights.shape == (TRAINING, 5)
    close(fitted.weights, parts, 1e-3)  # but for the least ridge, 0.001
    close(fitted.bias, torch.ones(5, dtype=torch.float64), 1e-3)
    forget = torch.tensor([2, 5, 7])
    kept = torch.ones(1, TRAINING).double()
    full = 1 + parts.sum(0)
    close(fitted.without(full, forget), full - parts[forget].sum(0), 1e-3)
    kept[0, forget] = 0
    close(fitted.predict(kept)[0], full - parts[forget].sum(0), 1e-3)


def test_a_ridge_regression_is_linear_in_its_examples_up_to_one_over_its_strength():
    """strength f(x; S) -> sum over S of x'x_i y_i."""
    x, y, points = data()
    limit = (x * y[:, None]) @ points.T
    included = subsets(60)
    errors = []
    for strength in (1e3, 1e4, 1e5):
        fitted = fit_datamodels(included, strength * ridge_outputs(included, strength))
        retrained = torch.ones(1, TRAINING).double()
        retrained[0, [2, 5, 7]] = 0
        exact = strength * ridge_outputs(retrained, strength)
        full = strength * ridge_outputs(torch.ones(1, TRAINING), strength)
        errors.append((fitted.without(full, torch.tensor([2, 5, 7])) - exact).abs().max().item())
        assert (fitted.weights - limit).abs().max() < 40 / strength * limit.abs().max() + 1e-3
    assert errors[0] > 5 * errors[1] and errors[1] > errors[2]


def test_through_all_but_one_subsets_the_datamodel_is_the_leave_one_out_identity():
    """f(x; S) - f(x; S - i) = x' A^-1 x_i (y_i - f(x_i)) / (1 - h_i), A = X'X + strength."""
    x, y, points = data()
    included = torch.cat([torch.ones(1, TRAINING), 1 - torch.eye(TRAINING)]).double()
    outputs = ridge_outputs(included, 0.5)
    weights = outputs[:1] - outputs[1:]
    inverse = torch.linalg.inv(x.T @ x + 0.5 * torch.eye(FEATURES))
    residual = y - x @ inverse @ x.T @ y
    leverage = ((x @ inverse) * x).sum(-1)
    identity = (x @ inverse @ points.T) * (residual / (1 - leverage))[:, None]
    close(weights, identity, 1e-10)
    # The same, as the datamodel that passes through those thirteen models.
    bias = outputs[0] - weights.sum(0)
    close(Datamodels(weights, bias).predict(included), outputs)
    close(Datamodels(weights, bias).without(outputs[0], torch.tensor([4])), outputs[5])


def test_a_lasso_finds_which_examples_matter():
    included = subsets(80)
    parts = torch.zeros(TRAINING, 2).double()
    parts[3], parts[8, 1] = 2.0, -1.0
    outputs = included.double() @ parts + 0.01 * draw(80, 2, seed=5)
    fitted = fit_datamodels(included, outputs, penalty="lasso")
    close(fitted.weights, parts, 2e-2)
    assert (fitted.weights == 0).sum() > TRAINING


def test_outputs_keep_their_shape_and_type():
    included = subsets(20)
    fitted = fit_datamodels(included, draw(20, 5, CLASSES).float())
    assert fitted.weights.shape == (TRAINING, 5, CLASSES) and fitted.bias.shape == (5, CLASSES)
    assert fitted.weights.dtype == torch.float32
    assert fitted.predict(included).shape == (20, 5, CLASSES)
    single = fit_datamodels(included, draw(20))
    assert single.weights.shape == (TRAINING,) and single.bias.shape == ()
    for bad in (draw(19), draw(1)):
        with pytest.raises(ValueError, match="included is"):
            fit_datamodels(included[: len(bad) + (len(bad) > 1)], bad)
    with pytest.raises(ValueError, match="'ridge' or 'lasso'"):
        fit_datamodels(included, draw(20), penalty="none")


# -- matching ------------------------------------------------------------------------------------------


def fine_tuned(method, target, start):
    """The logistic model x @ w that the loss leads to from `start`."""
    x, _, _ = data()
    w = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [w], max_iter=400, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = method(target=target, logits=x @ w).loss
        loss.backward()
        return loss

    optimiser.step(closure)
    return x @ w.detach()


@pytest.mark.parametrize("divergence", [KL(), ReverseKL(), JS(0.5), SquaredHellinger(), None], ids=repr)
def test_fine_tuning_a_linear_model_to_the_retrained_one_makes_it_that_one(divergence):
    x, _, _ = data()
    target = x @ (0.5 * draw(FEATURES, CLASSES, seed=6))
    found = fine_tuned(DatamodelMatching(divergence), target, 0.5 * draw(FEATURES, CLASSES, seed=7))
    labels = torch.arange(TRAINING) % CLASSES
    close(margins(found, labels), margins(target, labels), 1e-5)


def test_the_loss_is_the_mean_divergence_of_the_softmax():
    target, logits = draw(6, CLASSES), draw(6, CLASSES, seed=1)
    out = DatamodelMatching(JS(0.3))(target=target, logits=logits)
    rows = JS(0.3)(target.log_softmax(-1), logits.log_softmax(-1))
    close(out.loss, rows.mean())
    close(DatamodelMatching(None)(target=target, logits=logits).loss, (target - logits).square().mean())
    assert DatamodelMatching()(target=target, logits=target + 7.0).loss.abs() < 1e-12  # the level is free
    mask = torch.tensor([True, False, True, False, False, False])
    part = DatamodelMatching(JS(0.3))(target=target, logits=logits, mask=mask, count=10)
    close(part.loss, rows[mask].sum() / 10)
    agree = (target.argmax(-1) == logits.argmax(-1)).double()
    close(out.metrics["agreement"], agree.mean())
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("divergence", [KL(), ReverseKL(), None], ids=repr)
def test_extreme_logits_give_finite_losses_and_gradients_and_the_target_none(divergence):
    target = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    logits = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    out = DatamodelMatching(divergence)(target=target, logits=logits)
    out.loss.backward()
    assert out.loss.isfinite() and logits.grad.isfinite().all() and target.grad is None
    empty = DatamodelMatching(divergence)(target=target[:0], logits=logits[:0])
    assert empty.loss == 0
    none = torch.zeros(2, dtype=torch.bool)
    assert DatamodelMatching(divergence)(target=target, logits=logits, mask=none).loss == 0


def test_it_fine_tunes_on_the_forget_set_and_thrice_as_many_others():
    forget = torch.tensor([3, 7])
    rows = DatamodelMatching().rows(forget, TRAINING, torch.Generator().manual_seed(0))
    assert rows[:2].tolist() == [3, 7] and len(set(rows.tolist())) == 8
    assert len(DatamodelMatching(retained=0.0).rows(forget, TRAINING)) == 2
    assert sorted(DatamodelMatching(retained=100.0).rows(forget, TRAINING).tolist()) == list(range(TRAINING))


# -- margins and their divergence ----------------------------------------------------------------------


def test_a_margin_is_the_log_odds_of_the_right_class():
    logits, labels = draw(4, 5, CLASSES), torch.tensor([0, 1, 2, 1, 0])
    p = logits.softmax(-1).gather(-1, labels.expand(4, 5).unsqueeze(-1)).squeeze(-1)
    close(margins(logits, labels), (p / (1 - p)).log())
    close(margins(logits + 3.0, labels), margins(logits, labels))
    far = margins(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1]))
    assert far.item() == -2e4


def test_the_histogram_of_two_bins_is_counted_by_hand():
    unlearned = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    retrained = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    expected = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert klom(unlearned, retrained, bins=2).item() == pytest.approx(expected, abs=1e-12)
    swapped = klom(unlearned, retrained, divergence=ReverseKL(), bins=2).item()
    assert swapped == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1 / 3), abs=1e-12)


def test_apart_the_histogram_is_the_log_of_its_least_mass():
    value = klom(torch.full((3, 1), 5.0), torch.full((3, 1), -5.0)).item()
    assert value == pytest.approx(math.log((1 + 1e-5) / 1e-5), abs=1e-9)


def test_the_histogram_approaches_the_divergence_of_the_densities():
    """Margins at the quantiles of N(0.5, 1) and N(0, 1.5^2)."""
    levels = (torch.arange(20_000).double() + 0.5) / 20_000
    normal = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    p, q = normal[:, None] + 0.5, 1.5 * normal[:, None]
    exact = math.log(1.5) + (1 + 0.25) / (2 * 2.25) - 0.5
    assert klom(p, q, bins=100).item() == pytest.approx(exact, abs=5e-3)
    assert klom(p, q, estimate="gaussian").item() == pytest.approx(exact, abs=1e-3)


def test_the_gaussian_estimate_is_its_closed_form_and_blind_to_scale_and_shift():
    p, q = draw(9, 4), 2 * draw(7, 4, seed=1) + 1
    value = klom(p, q, estimate="gaussian")
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(p.mean(0), p.std(0)), normal(q.mean(0), q.std(0)))
    close(value, expected)
    close(klom(3 * p - 2, 3 * q - 2, estimate="gaussian"), expected)


def test_equal_margins_are_at_zero_and_farther_ones_are_cut():
    same = draw(6, 4)
    for estimate in ("histogram", "gaussian"):
        close(klom(same, same, estimate=estimate), torch.zeros(4).double(), 1e-6)
        constant = torch.ones(3, 2)
        assert klom(constant, constant, estimate=estimate).tolist() == [0.0, 0.0]
        far = torch.tensor([[1e4], [2e4], [math.inf]])
        assert klom(far, torch.full((3, 1), 100.0), estimate=estimate).item() == 0.0
    for p, q in ((constant, constant + 1), (same[:, :2], constant), (constant, same[:, :2])):
        assert klom(p, q, estimate="gaussian").tolist() == [math.inf, math.inf]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="models >= 2"):
        klom(draw(1, 3), draw(4, 3))
    with pytest.raises(ValueError, match="models >= 2"):
        klom(draw(4, 3), draw(4, 2))
    with pytest.raises(ValueError, match="did a model diverge"):
        klom(draw(4, 3) * math.nan, draw(4, 3))
    for settings in ({"estimate": "kde"}, {"estimate": "gaussian", "divergence": KL()}):
        with pytest.raises(ValueError, match="'gaussian' without a divergence"):
            klom(draw(4, 3), draw(4, 3), **settings)
    with pytest.raises(TypeError, match="divergence is a divergence"):
        DatamodelMatching("mse")
    with pytest.raises(ValueError, match="retained is >= 0"):
        DatamodelMatching(retained=-1.0)
