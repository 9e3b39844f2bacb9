"""The L2-SVM head: its value and gradient by hand, scikit-learn's optimum, and the share of the norm."""

import math

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC
from tests.worlds import close, gradient
from torch import nn

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.supervise.margin_head import MarginHead


class Headed(nn.Module):
    """A network that is its head."""

    def __init__(self, width=3, classes=4, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(width, classes, bias=bias, dtype=torch.float64)

    def forward(self, inputs):
        return self.head(inputs)


INPUTS = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1])


def out_of(method, network, rows=slice(None), **more):
    return method(logits=network(INPUTS[rows]), labels=LABELS[rows], network=network, **more)


def test_the_sum_is_the_papers():
    network = Headed()
    s = network(INPUTS).detach()
    total = network.head.weight.square().sum().item() / 2
    for i, label in enumerate(LABELS.tolist()):
        for k in range(4):
            y = 1 if k == label else -1
            total += 0.7 * max(0.0, 1 - y * s[i, k].item()) ** 2
    out = out_of(MarginHead(c=0.7, aggregate="sum"), network)
    close(out.loss, torch.tensor(total, dtype=torch.float64), 1e-12)
    close(out_of(MarginHead(c=0.7), network).loss, out.loss / 9, 1e-13)


def test_the_gradient_in_a_score_is_minus_two_c_y_times_what_it_lacks():
    s = torch.tensor([[0.3, -2.0, 1.5]], dtype=torch.float64, requires_grad=True)
    out = MarginHead(c=0.5, aggregate="sum")(logits=s, labels=torch.tensor([0]), network=Headed())
    close(gradient(out.loss, s), torch.tensor([-0.7, 0.0, 2.5], dtype=torch.float64), 1e-13)


def test_its_optimum_on_fixed_features_is_a_linear_support_vector_machine():
    """scikit-learn's squared hinge, one class against the others, without intercept."""
    network, method = Headed(bias=False), MarginHead(c=0.5, aggregate="sum")
    optimiser = torch.optim.LBFGS(network.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        out = out_of(method, network)
        out.loss.backward()
        return out.loss

    for _ in range(5):
        optimiser.step(loss)
    machine = LinearSVC(C=0.5, fit_intercept=False, dual=False, tol=1e-10)
    machine.fit(INPUTS.numpy(), LABELS.numpy())
    np.testing.assert_allclose(network.head.weight.detach().numpy(), machine.coef_, atol=1e-5)


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_micro_batches_add_up_to_the_global_batch_and_its_norm(aggregate):
    network, method = Headed(), MarginHead(aggregate=aggregate)
    whole = out_of(method, network)
    parts = [out_of(method, network, rows, count=9) for rows in (slice(0, 2), slice(2, 9))]
    close(parts[0].loss + parts[1].loss, whole.loss, 1e-13)
    close(
        gradient(parts[0].loss + parts[1].loss, network.head.weight),
        gradient(whole.loss, network.head.weight),
        1e-12,
    )
    close(
        2 / 9 * parts[0].metrics["hinge"] + 7 / 9 * parts[1].metrics["hinge"], whole.metrics["hinge"], 1e-13
    )
    assert parts[0].metrics["norm"] == whole.metrics["norm"]


def test_the_bias_is_free():
    network = Headed()
    method = MarginHead(c=1e-12, aggregate="sum")
    slope = gradient(out_of(method, network).loss, network.head.bias)
    assert slope.abs().max() < 1e-9


def test_scores_that_are_worlds_apart_give_finite_values_and_gradients():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 90.0]], requires_grad=True)
    network = Headed(classes=3).float()
    out = MarginHead()(logits=logits, labels=torch.tensor([0, 0]), network=network)
    assert out.loss.isfinite() and gradient(out.loss, logits, network.head.weight).isfinite().all()
    half = MarginHead()(logits=logits.bfloat16(), labels=torch.tensor([0, 0]), network=network)
    assert half.loss.dtype == torch.float32 and half.loss.isfinite()


def test_without_an_example_the_loss_is_zero():
    network = Headed()
    out = out_of(MarginHead(), network, slice(0, 0), count=9)
    assert out.loss == 0 and not gradient(out.loss, network.head.weight).any()


def test_wrong_settings_and_tensors_are_refused():
    for c in (0.0, math.inf):
        with pytest.raises(ValueError, match="c is finite and > 0"):
            MarginHead(c)
    with pytest.raises(ValueError, match="aggregate is 'mean' or 'sum'"):
        MarginHead(aggregate="batch")
    with pytest.raises(TypeError, match=r"network\.head is the linear layer"):
        MarginHead()(logits=torch.zeros(1, 2), labels=torch.tensor([0]), network=nn.Linear(2, 2))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = MarginHead(c=2.0, aggregate="sum")
    assert fdiv.parse(repr(method), ["fdiv.methods.supervise.margin_head"]) == method
    assert isinstance(method, Method)
