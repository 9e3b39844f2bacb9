"""DHKD: coins from logits, the second head, and gradients that are made to agree."""

import math
from typing import NamedTuple

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows
from torch import nn

import fdiv
from fdiv import JS, KL, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.distill.dhkd import DHKD, alignment

B, C, WIDTH = 6, 5, 4
LABELS = torch.tensor([0, 1, 2, 3, 4, 1])


class Shapes(NamedTuple):
    width: int = WIDTH
    classes: int = C


class Student(nn.Module):
    """A hidden layer and a head, in float64."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(3, WIDTH).double(), nn.Linear(WIDTH, C).double()

    def features(self, inputs):
        return self.body(inputs).tanh()


def scores(seed: int = 0) -> torch.Tensor:
    return random_rows(B, C, seed) + 1.0


class Step(NamedTuple):
    """What a method reads at one step of a student with auxiliary head."""

    student: Student
    module: nn.Module
    inputs: torch.Tensor
    given: dict

    @property
    def weights(self) -> list:
        return [*self.student.parameters(), *self.module.parameters()]


def step(method: DHKD, seed: int = 0) -> Step:
    student = Student(seed)
    module = method.module(Shapes()).double().eval()  # without its dropout
    inputs = torch.randn(B, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = student.features(inputs)
    given = {
        "logits": student.head(features),
        "labels": LABELS,
        "p_logits": scores(seed + 10),
        "features": features,
        "module": module,
    }
    return Step(student, module, inputs, given | ({"network": student} if method.align else {}))


def both_gradients(method: DHKD, now: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the labels' term and of the teacher's, over the student and the auxiliary head."""
    given = {name: value for name, value in now.given.items() if name != "network"}
    settings = {"align": False, "hidden": None, "temperature": method.temperature}
    hard = DHKD(**settings, weight=0.0, cross_entropy=method.cross_entropy)(**given).loss
    soft = DHKD(**settings, weight=method.weight, cross_entropy=0.0)(**given).loss
    found = [torch.autograd.grad(x, now.weights, retain_graph=True, allow_unused=True) for x in (hard, soft)]
    return tuple(
        torch.cat(
            [
                (torch.zeros_like(w) if g is None else g).flatten()
                for g, w in zip(gs, now.weights, strict=True)
            ]
        )
        for gs in found
    )


# -- the loss of the second head ----------------------------------------------------------------------------


def test_the_worked_example_of_binary_kl():
    a, t = (torch.tensor([row], dtype=torch.float64) for row in ([1.0, 0.0, -1.0], [2.0, 0.0, -2.0]))
    value = 4 * DHKD(compare="probabilities").rows(t, a)
    close(value, torch.tensor([0.210756688], dtype=torch.float64), 3e-9)


def test_binary_kl_is_a_sum_of_cross_entropies_of_sigmoids():
    t, a = scores(), scores(1)
    p, q = (x.div(2).sigmoid() for x in (t, a))
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)
    close(DHKD(compare="probabilities").rows(t, a), expected)


def test_binary_kl_norm_is_log_cosh_of_half_the_difference():
    t, a = scores(), scores(1)
    close(DHKD().rows(t, a), ((a - t) / 4).cosh().log().sum(-1), 1e-9)


def test_the_gradients_of_both_in_closed_form():
    """tau (sigmoid(a / tau) - sigmoid(t / tau)), and tau tanh((a - t) / (2 tau)) / 2."""
    t, a, tau = scores(), scores(1).requires_grad_(), 3.0
    expected = {
        "probabilities": tau * ((a / tau).sigmoid() - (t / tau).sigmoid()),
        "difference": tau * ((a - t) / (2 * tau)).tanh() / 2,
    }
    for compare, slope in expected.items():
        loss = tau**2 * DHKD(temperature=tau, compare=compare).rows(t, a).sum()
        close(gradient(loss, a).view(B, C), slope.detach(), 1e-12)


@each_divergence
@pytest.mark.parametrize("compare", ["difference", "probabilities"])
def test_logits_themselves_are_matched_under_every_divergence(compare, divergence):
    method = DHKD(divergence, compare=compare)
    assert method.rows(scores(), scores()).abs().max() < 1e-14
    assert (method.rows(scores(), scores() + 0.5) > 0).all()  # no softmax: a common shift is a mistake


def test_a_confident_teacher_still_teaches_under_the_difference():
    """Where its sigmoids are 1, probabilities are matched by any large logit."""
    t, a = torch.full((1, 1), 60.0).double(), torch.full((1, 1), 40.0).double().requires_grad_()
    slopes = [gradient(DHKD(compare=c).rows(t, a).sum(), a) for c in ("difference", "probabilities")]
    assert slopes[0].abs() > 0.2 and slopes[1].abs() < 1e-8


# -- the two heads ------------------------------------------------------------------------------------------


def test_the_auxiliary_head_is_the_papers_or_linear():
    layers = list(DHKD().module(Shapes()))
    assert [type(layer).__name__ for layer in layers] == [
        "Linear",
        "Dropout",
        "BatchNorm1d",
        "ReLU",
        "Linear",
    ]
    assert layers[0].in_features == WIDTH and layers[0].out_features == 200 and layers[-1].out_features == C
    linear = DHKD(hidden=None).module(Shapes())
    assert isinstance(linear, nn.Linear) and (linear.in_features, linear.out_features) == (WIDTH, C)


def test_without_alignment_the_loss_is_the_sum_and_each_head_learns_its_own():
    method = DHKD(align=False, hidden=None, weight=0.3, cross_entropy=0.7)
    now = step(method)
    out = method(**now.given)
    rows = method.rows(now.given["p_logits"], now.module(now.given["features"]))
    labelled = nn.functional.cross_entropy(now.given["logits"], LABELS)
    close(out.loss, 0.7 * labelled + 0.3 * 4 * rows.mean())
    hard, soft = both_gradients(method, now)
    of_head = slice(3 * WIDTH + WIDTH, 3 * WIDTH + WIDTH + C * WIDTH + C)
    assert not soft[of_head].any() and not hard[of_head.stop :].any() and soft[of_head.stop :].any()
    close(gradient(out.loss, *now.weights), hard + soft, 1e-12)


def conflicting() -> tuple[DHKD, Step]:
    """A step at which the teacher asks for the opposite of the labels, through an equal head."""
    method = DHKD(hidden=None, weight=5.0)
    now = step(method)
    now.module.load_state_dict(now.student.head.state_dict())
    now.given["p_logits"] = -4.0 * nn.functional.one_hot(LABELS, C).double()
    return method, now


def test_conflicting_gradients_are_projected():
    method, now = conflicting()
    out = method(**now.given)
    hard, soft = both_gradients(method, now)
    projected = soft - (soft @ hard) / (hard @ hard) * hard
    assert abs(projected @ hard) < 1e-12 * hard.norm() * soft.norm() and soft @ hard < 0
    close(gradient(out.loss, *now.weights), hard + projected, 1e-11)
    of_student = sum(w.numel() for w in now.student.parameters())
    close(out.metrics["cosine"], hard @ soft / hard.norm() / soft[:of_student].norm())
    close(
        out.loss, DHKD(hidden=None, weight=5.0, align=False)(**without_network(now)).loss
    )  # its value stays


def test_what_is_aligned_no_longer_undoes_what_the_labels_ask_for():
    """A small step along the corrected gradient of the teacher leaves the cross-entropy as it is."""
    method, now = conflicting()
    hard, soft = both_gradients(method, now)
    corrected = gradient(method(**now.given).loss, *now.weights) - hard

    def cross_entropy_after(direction, size):
        student = Student(0)
        student.load_state_dict(now.student.state_dict())
        weights = nn.utils.parameters_to_vector(student.parameters())
        nn.utils.vector_to_parameters(weights - size * direction[: len(weights)], student.parameters())
        return nn.functional.cross_entropy(student.head(student.features(now.inputs)), LABELS)

    before = cross_entropy_after(soft, 0.0)
    assert cross_entropy_after(soft, 1e-5) > before
    change = [abs(cross_entropy_after(d, 1e-5) - before) for d in (soft, corrected)]
    assert change[1] < 1e-3 * change[0]


def without_network(now: Step) -> dict:
    return {name: value for name, value in now.given.items() if name != "network"}


def test_gradients_that_agree_are_left_alone():
    method = DHKD(hidden=None)
    now = step(method)
    now.module.load_state_dict(now.student.head.state_dict())
    now.given["p_logits"] = 4.0 * nn.functional.one_hot(LABELS, C).double()
    hard, soft = both_gradients(method, now)
    out = method(**now.given)
    assert out.metrics["correction"] == 0 and out.metrics["cosine"] > 0
    close(gradient(out.loss, *now.weights), hard + soft, 1e-12)


def test_the_share_is_that_of_two_known_vectors():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    hard, soft = (x * torch.tensor([3.0, 4.0])).sum(), (x * torch.tensor([-5.0, 0.0])).sum()
    cosine, share = alignment(hard, soft, [x])
    close(cosine, torch.tensor(-0.6, dtype=torch.float64))
    close(share, torch.tensor(15 / 25, dtype=torch.float64))
    assert [alignment(hard, 0 * soft, [x])[1], alignment(0 * hard, soft, [x])[1]] == [0, 0]


def test_evaluation_without_gradients_needs_no_alignment():
    method = DHKD(hidden=None)
    now = step(method)
    with torch.no_grad():
        out = method(**now.given)
    close(out.loss, method(**now.given).loss.detach())


def test_micro_batches_add_up_where_nothing_is_aligned_and_the_teacher_gets_no_gradient():
    method = DHKD(align=False, hidden=None)
    now = step(method)
    t = now.given["p_logits"].requires_grad_()
    whole = method(**now.given).loss
    losses = []
    for cut in (slice(0, 1), slice(1, 6), slice(6, 6)):
        part = {n: v if n == "module" else v[cut] for n, v in now.given.items()}
        losses.append(method(**part, count=float(B)).loss)
    close(sum(losses), whole, 1e-13)
    close(gradient(sum(losses), *now.weights), gradient(whole, *now.weights), 1e-12)
    assert losses[2] == 0 and not gradient(losses[2], now.module.weight).any()
    whole.backward()
    assert t.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compare", ["difference", "probabilities"])
def test_logits_of_ten_thousand_stay_finite(compare, dtype):
    t = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    a = torch.tensor([[-1e4, 1e4, 1.0]], dtype=dtype, requires_grad=True)
    rows = DHKD(compare=compare).rows(t, a)
    close(rows, torch.tensor([1e4], dtype=dtype), 1e-3)
    assert gradient(rows.sum(), a).isfinite().all()


def test_a_teacher_of_infinite_logits_is_a_certain_coin():
    t = torch.tensor([[-math.inf, 1.0]]).double()
    a = torch.tensor([[0.0, 1.0]]).double().requires_grad_()
    rows = DHKD(compare="probabilities").rows(t, a)
    close(rows, torch.tensor([math.log(2)], dtype=torch.float64))
    assert gradient(rows.sum(), a).isfinite().all()
    with pytest.raises(ValueError, match=r"ReverseKL\(\) is infinite at 1 of 1"):
        DHKD(ReverseKL(), compare="probabilities").rows(t, a)


def test_wrong_settings_are_refused_with_what_to_write_instead():
    for setting, says in (
        ({"weight": -1.0}, "weight >= 0"),
        ({"temperature": 0.0}, "temperature divides"),
        ({"compare": "norm"}, "'difference', 'probabilities'"),
        ({"hidden": 0}, "None for a linear head"),
    ):
        with pytest.raises(ValueError, match=says):
            DHKD(**setting)
    with pytest.raises(TypeError, match="f-divergence"):
        DHKD(fdiv.Renyi(2.0))
    with pytest.raises(TypeError, match="pass network=, or write align=False"):
        DHKD(hidden=None)(**without_network(step(DHKD(hidden=None))))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = DHKD(JS(0.5), hidden=None, align=False)
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.dhkd"]) == method
    assert isinstance(method, Method) and DHKD().divergence == KL()
    assert DHKD().unit == "batch" and "network" in DHKD().reads
    assert method.unit == "example" and "network" not in method.reads
