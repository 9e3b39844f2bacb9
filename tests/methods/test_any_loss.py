"""AnyLoss: the paper's gradients by hand, scikit-learn's metrics as the limit, batches without a class."""

import math

import pytest
import torch
from sklearn import metrics as scikit
from tests.worlds import close, gradient

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.supervise.any_loss import AnyLoss, confusion

NAMES = ("accuracy", "f1", "g-mean", "balanced accuracy")
each_metric = pytest.mark.parametrize("metric", NAMES)
B = 40
P = torch.rand(B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = (torch.rand(B, generator=torch.Generator().manual_seed(2)) < 0.3).long()


def logits_of(p):
    """Of two classes, whose second has probability p."""
    return torch.stack([torch.zeros_like(p), p.logit()], -1)


def out_of(method, p=P, y=Y, **more):
    return method(logits=logits_of(p), labels=y, **more)


def informedness(tp, fn, fp, tn):
    """A metric that is not among the paper's."""
    return tp / (tp + fn) - fp / (fp + tn)


def broken(tp, fn, fp, tn):
    return tp / (0 * tn)


HERE = "tests.methods.test_any_loss"


# -- values and gradients -----------------------------------------------------------------------------------


def soft_counts(scale=73.0):
    y_hat, y = 1 / (1 + (-scale * (P - 0.5)).exp()), Y.double()
    return (
        y_hat,
        (y * y_hat).sum(),
        (y * (1 - y_hat)).sum(),
        ((1 - y) * y_hat).sum(),
        ((1 - y) * (1 - y_hat)).sum(),
    )


@pytest.mark.parametrize("scale", [5.0, 73.0])
def test_the_losses_are_the_papers(scale):
    _, tp, fn, fp, tn = soft_counts(scale)
    expected = {
        "accuracy": (tp + tn) / B,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "g-mean": (tp / (tp + fn) * tn / (tn + fp)).sqrt(),
        "balanced accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
    }
    for metric, value in expected.items():
        out = out_of(AnyLoss(metric, scale=scale))
        close(out.loss, 1 - value, 1e-12)
        close(out.metrics["metric"], value, 1e-12)


@each_metric
def test_the_gradients_in_p_are_those_worked_by_hand(metric):
    """With a factor 1/2 for the G-mean, where the authors' single layer has 2."""
    y_hat, tp, fn, fp, tn = soft_counts()
    s, y, positives, negatives = 73 * y_hat * (1 - y_hat), Y.double(), tp + fn, fp + tn
    root = (positives * negatives * tp * tn).sqrt()
    expected = {
        "accuracy": -(2 * y - 1) * s / B,
        "f1": -2 * (y * (positives + y_hat.sum()) - tp) * s / (positives + y_hat.sum()) ** 2,
        "g-mean": -(y * tn - (1 - y) * tp) * s / (2 * root),
        "balanced accuracy": -(y / positives - (1 - y) / negatives) * s / 2,
    }[metric]
    p = P.clone().requires_grad_()
    close(gradient(out_of(AnyLoss(metric), p).loss, p), expected, 1e-9)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_gradient_of_f_beta_too(beta):
    y_hat, tp, fn, *_ = soft_counts()
    s, y, whole = 73 * y_hat * (1 - y_hat), Y.double(), beta**2 * (tp + fn) + y_hat.sum()
    expected = -(1 + beta**2) * (y * whole - tp) * s / whole**2
    p = P.clone().requires_grad_()
    close(gradient(out_of(AnyLoss(beta=beta), p).loss, p), expected, 1e-9)


def test_the_amplification_is_the_papers():
    """A(0.4) = 6.8e-4 and A(0.6) = 0.9993 at scale 73, by accuracy of one positive example."""
    for p, a, digits in ((0.4, 6.8e-4, 5e-6), (0.6, 0.9993, 5e-5)):
        one = torch.tensor([p], dtype=torch.float64)
        out = out_of(AnyLoss("accuracy"), one, torch.tensor([1]))
        assert abs(out.metrics["metric"].item() - a) < digits


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_at_an_infinite_scale_the_metrics_are_scikit_learns(threshold):
    truth, taken = Y.numpy(), (threshold < P).long().numpy()
    recalls = scikit.recall_score(truth, taken, average=None)
    expected = {
        "accuracy": scikit.accuracy_score(truth, taken),
        "f1": scikit.f1_score(truth, taken),
        "g-mean": math.sqrt(recalls[0] * recalls[1]),
        "balanced accuracy": scikit.balanced_accuracy_score(truth, taken),
    }
    for metric, value in expected.items():
        out = out_of(AnyLoss(metric, scale=1e8, threshold=threshold))
        close(1 - out.loss, torch.tensor(value, dtype=torch.float64), 1e-12)
        close(out.metrics["hard"], torch.tensor(value, dtype=torch.float64), 1e-12)
    out = out_of(AnyLoss(beta=2.0, scale=1e8, threshold=threshold))
    value = scikit.fbeta_score(truth, taken, beta=2.0)
    close(1 - out.loss, torch.tensor(value, dtype=torch.float64), 1e-12)


def test_of_each_class_against_the_others_it_is_scikit_learns_macro_average():
    logits = 3 * torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))
    taken = logits.softmax(-1) > 0.5
    truth = torch.nn.functional.one_hot(labels, 4)
    out = AnyLoss("f1", classes="each", scale=1e8)(logits=logits, labels=labels)
    value = scikit.f1_score(truth.numpy(), taken.long().numpy(), average="macro", zero_division=0.0)
    close(1 - out.loss, torch.tensor(value, dtype=torch.float64), 1e-12)


def test_the_positive_class_may_be_the_first():
    out = AnyLoss(positive=0)(logits=logits_of(P).flip(-1), labels=1 - Y)
    close(out.loss, out_of(AnyLoss()).loss, 1e-12)


def test_accuracy_is_the_mean_total_variation_from_the_label():
    y_hat = soft_counts()[0]
    rows = torch.stack([1 - y_hat, y_hat], -1).log()
    value = AnyLoss.divergence(torch.eye(2, dtype=torch.float64)[Y].log(), rows)
    close(out_of(AnyLoss("accuracy")).loss, value.mean(), 1e-12)


def test_any_function_of_the_counts_is_a_metric():
    method = AnyLoss(f"{HERE}:informedness")
    _, tp, fn, fp, tn = soft_counts()
    close(out_of(method).loss, 1 - informedness(tp, fn, fp, tn), 1e-12)
    # Youden's index is twice the balanced accuracy, less one.
    close(out_of(method).loss, 2 * out_of(AnyLoss("balanced accuracy")).loss, 1e-12)


def test_the_scale_rises_in_equal_ratios():
    method = AnyLoss(start=1.0, scale=64.0)
    for progress, scale in ((0.0, 1.0), (0.5, 8.0), (1.0, 64.0)):
        close(out_of(method, progress=progress).loss, out_of(AnyLoss(scale=scale)).loss, 1e-12)
    assert method.reads == ("logits", "labels", "progress") and AnyLoss().reads == ("logits", "labels")


# -- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 1])
def test_a_batch_of_one_class_trains_what_is_defined_and_skips_the_rest(label):
    y, p = torch.full((B,), label), P.clone().requires_grad_()
    for metric in ("g-mean", "balanced accuracy", f"{HERE}:informedness"):
        out = out_of(AnyLoss(metric), p, y)
        assert out.loss == 0 and not gradient(out.loss, p).any() and out.metrics["skipped"] == 1
    for metric in ("accuracy", "f1"):
        out = out_of(AnyLoss(metric), p, y)
        assert out.metrics["skipped"] == 0 and gradient(out.loss, p).isfinite().all()
    assert out_of(AnyLoss("accuracy"), p, y).loss > 0
    assert (out_of(AnyLoss("f1"), p, y).loss == 1) == (label == 0)


def test_a_class_that_a_batch_lacks_is_left_out_of_the_average():
    logits, labels = torch.randn(9, 3, dtype=torch.float64), torch.tensor([0, 1] * 4 + [0])
    p = logits.softmax(-1)[:, :2]
    y_hat = (73 * (p - 0.5)).sigmoid()
    truth = torch.stack([labels == 0, labels == 1], -1).double()
    counts = confusion(y_hat, truth)
    expected = 1 - ((counts.tp / (counts.tp + counts.fn) + counts.tn / (counts.tn + counts.fp)) / 2).mean()
    out = AnyLoss("balanced accuracy", classes="each")(logits=logits, labels=labels)
    close(out.loss, expected, 1e-12)


@each_metric
@pytest.mark.parametrize("scale", [1e-3, 73.0, 1e6])
def test_scores_that_are_worlds_apart_give_finite_values_and_gradients(metric, scale):
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0], [90.0, 0.0]], requires_grad=True)
    for labels in ([0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1]):
        for dtype in (torch.float32, torch.bfloat16):
            out = AnyLoss(metric, scale=scale)(logits=logits.to(dtype), labels=torch.tensor(labels))
            assert out.loss.isfinite() and gradient(out.loss, logits).isfinite().all()


def test_where_nothing_is_right_the_g_mean_is_zero_and_has_a_finite_gradient():
    logits = torch.tensor([[-50.0, 50.0], [50.0, -50.0]], requires_grad=True)
    out = AnyLoss("g-mean", scale=1e5)(logits=logits, labels=torch.tensor([0, 1]))
    assert out.loss == 1 and gradient(out.loss, logits).isfinite().all()


@each_metric
def test_without_an_example_the_loss_is_zero_and_has_a_graph(metric):
    logits = torch.zeros(0, 2, requires_grad=True)
    out = AnyLoss(metric)(logits=logits, labels=torch.zeros(0, dtype=torch.int64), count=0)
    assert out.loss == 0 and gradient(out.loss, logits).shape == (0,) and out.metrics["skipped"] == 1


# -- what is refused ----------------------------------------------------------------------------------------


def test_parts_of_a_batch_are_refused():
    assert AnyLoss.unit == "batch"
    with pytest.raises(ValueError, match="whole batch of 80 examples at once, got 40"):
        out_of(AnyLoss(), count=80)
    assert out_of(AnyLoss(), count=40).loss > 0


def test_wrong_settings_are_refused():
    for settings, message in (
        (
            {"metric": "recall"},
            "metric is one of accuracy, f1, g-mean, balanced accuracy or 'module:function'",
        ),
        ({"metric": f"{HERE}:nothing"}, "cannot be found"),
        ({"metric": f"{HERE}:NAMES"}, "is no function"),
        ({"beta": 0.0}, "beta is finite"),
        ({"beta": 2.0, "metric": "accuracy"}, "F_beta's alone, got 2.0 for 'accuracy'"),
        ({"scale": math.inf}, "scale is finite and > 0"),
        ({"start": 0.0}, "start is finite and > 0"),
        ({"threshold": 1.0}, "threshold is a probability"),
        ({"classes": "all"}, "classes is 'positive' or 'each'"),
        ({"positive": 2}, "positive is 0 or 1"),
    ):
        with pytest.raises(ValueError, match=message):
            AnyLoss(**settings)


def test_wrong_tensors_are_refused():
    with pytest.raises(ValueError, match="one of two, got 3 classes; write classes='each'"):
        AnyLoss()(logits=torch.zeros(2, 3), labels=torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="reads progress"):
        out_of(AnyLoss(start=1.0))
    with pytest.raises(ValueError, match=r"broken' is (inf|nan)"):
        out_of(AnyLoss(f"{HERE}:broken"))
    with pytest.raises(ValueError, match="labels are from 0 to 1"):
        out_of(AnyLoss(), y=Y + 1)


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = AnyLoss("g-mean", scale=10.0, start=2.0, classes="each")
    assert fdiv.parse(repr(method), ["fdiv.methods.supervise.any_loss"]) == method
    assert isinstance(method, Method)
