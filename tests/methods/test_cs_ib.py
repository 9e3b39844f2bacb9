"""CS-IB: its two terms, what it reduces to, and batches at the ends of the range."""

import math
from dataclasses import replace

import pytest
import torch
from tests.worlds import close, gradient

from fdiv import CauchySchwarz, Energy
from fdiv.estimate.cauchy_schwarz import conditional_cs, cs_information, normalised_cs_information
from fdiv.methods._method import Method
from fdiv.methods.represent.cs_ib import CSIB
from fdiv.methods.supervise.squared_error import SquaredError


def batch(count=12, seed=0, dtype=torch.float64):
    """A linear network's reading of a batch: (evidence, weights of features and head)."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(count + 3, 6, generator=generator, dtype=torch.float64).to(dtype)
    inputs, into, out = draw[:count, :3], draw[count:, :5].clone(), draw[:5, 5:].clone()
    into.requires_grad_()
    out.requires_grad_()
    features = (inputs @ into).tanh()
    targets = draw[:count, 3:4]
    read = {"inputs": inputs, "features": features, "logits": features @ out, "targets": targets}
    return read, (into, out)


def test_it_is_a_method_of_whole_batches():
    assert isinstance(CSIB(), Method)
    assert (CSIB.consumes, CSIB.unit) == ("examples", "batch")


@pytest.mark.parametrize("weighting", ["row", "both"])
def test_the_loss_is_the_conditional_divergence_plus_beta_times_the_information(weighting):
    read, weights = batch()
    method = CSIB(CauchySchwarz(0.7), 0.3, 1.5, 2.0, weighting)
    out = method(**read, count=12)
    missed = conditional_cs(read["inputs"], read["targets"], read["logits"], 1.5, 0.7, weighting)
    kept = cs_information(read["inputs"], read["features"], 1.5, 2.0)
    close(out.loss, missed + 0.3 * kept, 1e-12)
    close(gradient(out.loss, *weights), gradient(missed + 0.3 * kept, *weights), 1e-12)
    close(out.metrics["conditional divergence"], missed.detach())
    close(out.metrics["information"], kept.detach())


def test_the_released_term_is_normalised():
    read, _ = batch()
    gap = CSIB(beta=0.3, normalised=True)(**read).loss - CSIB(beta=0.0)(**read).loss
    close(gap, 0.3 * normalised_cs_information(read["inputs"], read["features"]), 1e-10)


def test_without_beta_features_matter_through_the_prediction_alone():
    read, _ = batch()
    loss = CSIB(beta=0.0)(**read).loss
    assert torch.autograd.grad(loss, read["features"], retain_graph=True, allow_unused=True)[0] is not None
    detached = read | {"features": read["features"].detach() * 7}
    close(CSIB(beta=0.0)(**detached).loss, loss, 1e-12)


def test_with_inputs_far_apart_and_a_wide_kernel_it_is_the_squared_error():
    # W is diagonal, and -2 log mean exp(-e^2 / 2w^2) is mean e^2 / w^2 for wide kernels.
    read, weights = batch()
    read["inputs"] = 1e4 * read["inputs"].detach()
    width = 1e3
    wide = CSIB(CauchySchwarz(width), beta=0.0)(**read).loss * width**2
    squares = SquaredError()(logits=read["logits"], targets=read["targets"], count=12).loss
    close(wide, squares, 1e-5)
    close(gradient(wide, *weights), gradient(squares, *weights), 1e-5)


def test_right_predictions_of_features_that_say_nothing_cost_nothing():
    read, _ = batch()
    read["features"] = torch.ones_like(read["features"])
    read["logits"] = read["targets"].clone()
    assert CSIB(beta=1.0)(**read).loss.item() == pytest.approx(0.0, abs=1e-12)


def test_training_fits_a_function_and_beta_compresses_its_features():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 2, generator=generator)
    targets = inputs[:, :1].sin()
    information = []
    for beta in (0.0, 1.0):
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        head = torch.nn.Linear(4, 1)
        optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 0.02)
        method = CSIB(beta=beta, weighting="both")
        for _ in range(250):
            features = encoder(inputs)
            out = method(inputs=inputs, features=features, logits=head(features), targets=targets)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        information.append(out.metrics["information"].item())
        if not beta:
            assert out.metrics["rmse"] < 0.1
    assert information[1] < 0.5 * information[0]


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_far_predictions_have_a_finite_loss_and_gradient_in_float32(scale):
    read, (into, out) = batch(dtype=torch.float32)
    read |= {"logits": scale * read["logits"], "features": scale * read["features"]}
    for method in (CSIB(), CSIB(weighting="both", normalised=True)):
        loss = method(**read).loss
        assert loss.isfinite()
        assert gradient(loss, into, out).isfinite().all()


def test_a_batch_of_one_or_of_equal_rows_is_finite_and_one_of_none_is_zero():
    read, (into, _) = batch()
    for rows in (slice(0, 1), torch.zeros(4, dtype=torch.long)):
        some = {name: t[rows] for name, t in read.items()}
        for normalised in (False, True):
            loss = CSIB(normalised=normalised, beta=1.0)(**some).loss
            assert loss.isfinite()
            assert gradient(loss, into).isfinite().all()
    nothing = CSIB()(**{name: t[:0] for name, t in read.items()}, count=0)
    assert nothing.loss.item() == 0
    assert not gradient(nothing.loss, into).any()


def test_targets_of_one_dimension_are_refused():
    read, _ = batch()
    with pytest.raises(ValueError, match=r"\(N, 1\) of a single number; write targets\.unsqueeze"):
        CSIB()(**(read | {"targets": read["targets"][:, 0]}))
    with pytest.raises(ValueError, match=r"\(N, 1\)"):
        SquaredError()(logits=read["logits"], targets=read["targets"][:, 0])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"beta": -1.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"feature_bandwidth": math.inf}, "feature_bandwidth"),
        ({"weighting": "column"}, "'row' or 'both'"),
    ],
)
def test_bad_values_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        replace(CSIB(), **wrong)


def test_another_divergence_is_refused():
    with pytest.raises(TypeError, match=r"CauchySchwarz\(bandwidth\)"):
        CSIB(Energy())


def test_the_squared_error_of_micro_batches_adds_up():
    read, _ = batch()
    parts = [
        SquaredError()(logits=read["logits"][i], targets=read["targets"][i], count=12).loss
        for i in (slice(0, 5), slice(5, 12))
    ]
    close(sum(parts), (read["logits"] - read["targets"]).square().mean(), 1e-12)
