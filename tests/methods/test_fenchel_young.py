"""FenchelYoung: its reductions, references, targets, what it predicts, and a classifier trained by it."""

import math

import pytest
import torch
from tests.worlds import each_smooth_divergence
from torch import Tensor
from torch.nn.functional import cross_entropy

from fdiv import JS, KL, SFT, TV, Alpha, Renyi, ReverseKL, f_softargmax
from fdiv.methods.supervise.fenchel_young import FenchelYoung

torch.set_num_threads(1)

LOGITS = 1.5 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 4, 2, 2, 0])
PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05], dtype=torch.float64).log()


def gradient(method: FenchelYoung, logits: Tensor = LOGITS, **given) -> Tensor:
    logits = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(method(logits=logits, **given).loss, logits)
    return grad


def assert_close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


def test_kl_is_supervised_training():
    log_q = LOGITS.log_softmax(-1)[range(8), LABELS]
    assert_close(FenchelYoung(KL())(LOGITS, LABELS).loss, SFT()(log_q=log_q).loss)
    assert_close(FenchelYoung(KL())(LOGITS, LABELS).loss, cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize(("alpha", "name"), [(1.5, "entmax15_loss"), (2.0, "sparsemax_loss")])
def test_alpha_is_the_entmax_loss(alpha, name):
    entmax = pytest.importorskip("entmax")
    expected = getattr(entmax, name)(LOGITS, LABELS).mean()
    assert_close(FenchelYoung(Alpha(alpha))(LOGITS, LABELS).loss, expected)


@each_smooth_divergence
@pytest.mark.parametrize("reference", ["ones", "uniform", "prior"])
def test_its_gradient_is_the_prediction_less_the_label(divergence, reference):
    method = FenchelYoung(divergence, reference)
    given = {"log_prior": PRIOR} if reference == "prior" else {}
    one_hot = torch.nn.functional.one_hot(LABELS, 5)
    predicted = method.log_probs(LOGITS, **given).exp()
    assert_close(gradient(method, labels=LABELS, **given), (predicted - one_hot) / 8, 1e-12)
    assert_close(predicted.sum(-1), torch.ones(8, dtype=torch.float64))


def test_the_references():
    uniform = torch.full((5,), -math.log(5), dtype=torch.float64)
    for reference, log_q in (("ones", None), ("uniform", uniform)):
        assert_close(
            FenchelYoung(JS(0.5), reference).log_probs(LOGITS).exp(), f_softargmax(LOGITS, JS(0.5), log_q)
        )
    method = FenchelYoung(KL(), "prior")
    assert method.reads == ("logits", "labels", "log_prior") and FenchelYoung().reads == ("logits", "labels")
    assert_close(method(LOGITS, LABELS, log_prior=PRIOR).loss, cross_entropy(LOGITS + PRIOR, LABELS))
    assert_close(method.log_probs(LOGITS), LOGITS.log_softmax(-1))  # classes are equally frequent
    assert_close(method.log_probs(LOGITS, PRIOR), (LOGITS + PRIOR).log_softmax(-1))


def test_distributions_as_targets_teach_what_they_are():
    """The loss is least, and 0, where the student predicts the target: distillation by another loss."""
    teacher = 2.0 * torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    method = FenchelYoung(Alpha(1.5))
    target = method.log_probs(teacher).exp()
    assert_close(method(teacher + 3.0, target).loss, torch.zeros((), dtype=torch.float64))
    student = LOGITS.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([student], max_iter=200, tolerance_grad=1e-12)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = method(student, target).loss
        value.backward()
        return value

    optimiser.step(loss)
    assert_close(method.log_probs(student.detach()).exp(), target, 1e-5)


def test_one_hot_distributions_are_labels():
    one_hot = torch.nn.functional.one_hot(LABELS, 5).double()
    for method in (FenchelYoung(), FenchelYoung(KL()), FenchelYoung(ReverseKL()), FenchelYoung(JS(0.5))):
        hard, soft = method(LOGITS, LABELS), method(LOGITS, one_hot)
        assert_close(hard.loss, soft.loss)
        assert hard.metrics.keys() == soft.metrics.keys() == {"support", "margin", "constant"}
        assert all(hard.metrics[name] == soft.metrics[name] for name in hard.metrics)


def test_metrics_are_the_support_the_margin_and_whether_the_loss_is_whole():
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.5, 1.0, 0.0]])
    metrics = FenchelYoung(Alpha(1.5))(logits, torch.tensor([0, 0])).metrics
    assert {name: value.item() for name, value in metrics.items()} == {
        "support": 2.0,
        "margin": 1.25,
        "constant": 1.0,
    }
    assert FenchelYoung(ReverseKL())(logits, torch.tensor([0, 0])).metrics["constant"] == 0.0


def test_micro_batches_add_up():
    whole = FenchelYoung()(LOGITS, LABELS)
    parts = [FenchelYoung()(LOGITS[i : i + 4], LABELS[i : i + 4], count=8) for i in (0, 4)]
    assert_close(sum(part.loss for part in parts), whole.loss)
    means = [part.metrics["margin"] for part in parts]  # of their own examples, as all metrics
    torch.testing.assert_close(sum(means) / 2, whole.metrics["margin"])


def test_a_vocabulary_has_a_sparse_gradient():
    logits = torch.randn(16, 49_152, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(16)
    grad = gradient(FenchelYoung(Alpha(1.5)), logits, labels=labels)
    out = FenchelYoung(Alpha(1.5))(logits, labels)
    assert out.metrics["support"] < 300
    assert (grad != 0).sum(-1).float().mean() <= out.metrics["support"] + 1
    torch.testing.assert_close(grad.sum(-1), torch.zeros(16), rtol=0.0, atol=1e-6)


def test_an_impossible_label_has_no_probability_and_still_a_gradient():
    method, logits = FenchelYoung(Alpha(2.0)), torch.tensor([[5.0, 0.0, 0.0]])
    assert method.log_probs(logits).tolist() == [[0.0, -math.inf, -math.inf]]
    assert gradient(method, logits, labels=torch.tensor([1])).tolist() == [[1.0, -1.0, 0.0]]
    assert method(logits, torch.tensor([1])).loss == 5.0


@each_smooth_divergence
def test_large_scores_and_empty_batches_stay_finite(divergence):
    method = FenchelYoung(divergence, "uniform")
    for logits, labels in ((1e4 * LOGITS, LABELS), (0.0 * LOGITS, LABELS), (LOGITS[:0], LABELS[:0])):
        assert method(logits, labels).loss.isfinite()
        assert gradient(method, logits, labels=labels).isfinite().all()


@pytest.mark.parametrize("divergence", [KL(), Alpha(1.5), JS(0.5)], ids=repr)
def test_a_linear_classifier_learns_which_side_of_a_line_points_are_on(divergence):
    source = torch.Generator().manual_seed(3)
    points = torch.randn(200, 2, generator=source)
    labels = (points[:, 0] + points[:, 1] > 0).long()
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(60):
        optimiser.zero_grad()
        FenchelYoung(divergence)(model(points), labels).loss.backward()
        optimiser.step()
    assert (model(points).argmax(-1) == labels).float().mean() > 0.97


def test_mistakes_are_named():
    with pytest.raises(TypeError, match="FenchelYoung inverts f'"):
        FenchelYoung(TV())
    with pytest.raises(TypeError, match="FenchelYoung takes an f-divergence"):
        FenchelYoung(Renyi(2.0))
    with pytest.raises(ValueError, match="reference is one of ones, uniform, prior, got 'data'"):
        FenchelYoung(KL(), "data")
    with pytest.raises(ValueError, match=r"reads log_prior \[5\], got nothing"):
        FenchelYoung(KL(), "prior")(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"reads log_prior \[5\], got \(4,\)"):
        FenchelYoung(KL(), "prior")(LOGITS, LABELS, log_prior=PRIOR[:4])
    with pytest.raises(ValueError, match="not read under reference='ones'"):
        FenchelYoung(KL())(LOGITS, LABELS, log_prior=PRIOR)
    never = torch.where(torch.arange(5) == 3, -math.inf, PRIOR)
    with pytest.raises(ValueError, match="mass on an atom that is left out"):
        FenchelYoung(Alpha(1.5), "prior")(LOGITS, LABELS, log_prior=never)
