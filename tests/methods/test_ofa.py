"""OFA-KD: the enhanced target, and branches on stages of any shape."""

import math
from typing import NamedTuple

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows
from torch import nn

import fdiv
from fdiv import GKD, JS, KL, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.distill._branches import layout_of
from fdiv.methods.distill.ofa import OFA, enhanced
from fdiv.networks.cnn import CNN
from fdiv.networks.mlp import MLP
from fdiv.networks.transformer import Transformer

B, C = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1])
P = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
Q = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
FIRST = torch.tensor([0])


class Shapes(NamedTuple):
    width: int
    stages: tuple
    classes: int = C
    p_width: int = 0
    p_stages: tuple = ()


def scores(seed: int = 0) -> torch.Tensor:
    return random_rows(B, C, seed)


def bare(method: OFA, logits, p_logits, labels=LABELS, **more):
    """Without a branch."""
    return method(logits=logits, labels=labels, p_logits=p_logits, stages=[], module=nn.ModuleDict(), **more)


# -- the target ---------------------------------------------------------------------------------------------


def test_the_worked_example():
    weight = enhanced(P, FIRST, 1.5).exp()
    close(weight, torch.tensor([[1.6**1.5 - 1, 0.3**1.5, 0.1**1.5]], dtype=torch.float64))
    close(weight, torch.tensor([[1.023858, 0.164317, 0.031623]], dtype=torch.float64), 1e-6)
    close(-(weight * Q).sum(), torch.tensor(1.867587561, dtype=torch.float64), 1e-9)


def test_an_exponent_of_one_leaves_the_teacher_as_it_is():
    close(enhanced(scores(), LABELS, 1.0), scores(), 1e-12)


@pytest.mark.parametrize("gamma", [1.2, 1.5, 3.0])
def test_the_target_counts_at_least_gamma_times_as_much_and_the_others_less(gamma):
    weight, p = enhanced(scores(), LABELS, gamma).exp(), scores().exp()
    target = nn.functional.one_hot(LABELS, C).bool()
    assert (weight[target] >= gamma * p[target]).all() and (weight[~target] < p[~target]).all()
    close(weight[target], (1 + p[target]) ** gamma - 1)
    close(weight[~target], p[~target] ** gamma)


def test_a_target_that_the_teacher_all_but_excludes_is_multiplied_by_gamma():
    log_p = torch.tensor([[-1e4, 0.0, -1e3], [-40.0, 0.0, -30.0]], dtype=torch.float64)
    close(enhanced(log_p, torch.tensor([0, 0]), 1.5)[:, 0], log_p[:, 0] + math.log(1.5), 1e-12)


def test_the_loss_is_the_papers_up_to_what_does_not_depend_on_the_student():
    method = OFA(cross_entropy=0.0)
    slopes, gaps = [], []
    for seed in (1, 2):
        logits = scores(seed).requires_grad_()
        paper = -(enhanced(scores(), LABELS, 1.5).exp() * logits.log_softmax(-1)).sum(-1).mean()
        loss = bare(method, logits, scores()).loss
        slopes.append((gradient(loss, logits), gradient(paper, logits)))
        gaps.append((paper - loss).detach())
    for ours, theirs in slopes:
        close(ours, theirs, 1e-12)
    close(gaps[0], gaps[1], 1e-12)


@each_divergence
def test_every_divergence_is_smallest_at_the_normalised_target(divergence):
    method = OFA(divergence, cross_entropy=0.0)
    log_weight = enhanced(scores(), LABELS, 1.5)
    best = log_weight.log_softmax(-1).requires_grad_()
    loss = bare(method, best, scores()).loss
    assert loss.abs() < 1e-13
    assert not divergence.is_smooth or gradient(loss, best).abs().max() < 1e-12
    rows = method.rows(scores(), scores(1), LABELS, 1.5)
    close(rows, log_weight.exp().sum(-1) * divergence(log_weight.log_softmax(-1), scores(1)))


@each_divergence
def test_without_enhancement_branches_and_labels_it_is_gkd(divergence):
    logits = scores(1).requires_grad_()
    loss = bare(OFA(divergence, gamma=1.0, cross_entropy=0.0), logits, scores()).loss
    expected = GKD(divergence)(log_p=scores(), log_q=logits.log_softmax(-1)).loss
    close(loss, expected, 1e-12)
    close(gradient(loss, logits), gradient(expected, logits), 1e-9)


# -- the branches -------------------------------------------------------------------------------------------

STUDENTS = {
    "images": (CNN(width=4, blocks=3), (1, 8, 8)),
    "signals": (CNN(width=4, blocks=2), (1, 40)),
    "patches": (Transformer(width=8, layers=2, heads=2), (1, 8, 8)),
    "pieces": (Transformer(width=8, layers=3, heads=2, patch=4), (1, 40)),
    "numbers": (MLP(width=8, layers=3), (7,)),
}
each_student = pytest.mark.parametrize("name", STUDENTS)


def student(name: str):
    """(network, inputs, Shapes of its stages)."""
    architecture, shape = STUDENTS[name]
    torch.manual_seed(0)
    network, inputs = architecture.build(torch.Size(shape), C).double(), torch.randn(B, *shape).double()
    stages = tuple(stage.shape[1:] for stage in network.eval().stages(inputs))
    return network, inputs, Shapes(stages[-1][0], stages, p_width=10)


@each_student
def test_each_stage_but_the_last_gets_a_branch_that_makes_logits_of_it(name):
    network, inputs, shapes = student(name)
    module = OFA().module(shapes).double().eval()
    assert list(module) == [str(n) for n in range(len(shapes.stages) - 1)] and len(module) > 0
    for n, branch in module.items():
        assert branch(network.stages(inputs)[int(n)]).shape == (B, C)


@each_student
def test_what_a_branch_learns_reaches_its_stage_and_those_before_it_and_no_other(name):
    network, inputs, shapes = student(name)
    method = OFA(cross_entropy=0.0, weight=0.0, stages=(0,))
    module = method.module(shapes).double().eval()
    stages = network.stages(inputs)
    out = method(
        logits=network.head(stages[-1]), labels=LABELS, p_logits=scores(), stages=stages, module=module
    )
    out.loss.backward()
    reached = [any(p.grad is not None and p.grad.any() for p in b.parameters()) for b in network.blocks]
    assert reached[0] and not any(reached[1:])
    assert all(p.grad is not None for p in module.parameters())
    assert network.head.weight.grad is None or not network.head.weight.grad.any()


def test_the_loss_is_the_sum_over_the_student_and_its_branches_each_with_its_exponent():
    network, inputs, shapes = student("numbers")
    method = OFA(JS(0.3), gamma=(1.0, 2.0, 3.0), weight=0.5, branch_weight=0.25, temperature=2.0)
    module = method.module(shapes).double()
    stages = network.stages(inputs)
    logits = network.head(stages[-1])
    out = method(logits=logits, labels=LABELS, p_logits=scores(), stages=stages, module=module)
    log_p = (scores() / 2).log_softmax(-1)

    def value(z, gamma):
        return method.rows(log_p, (z / 2).log_softmax(-1), LABELS, gamma).mean()

    branches = value(module["0"](stages[0]), 1.0) + value(module["1"](stages[1]), 2.0)
    labelled = nn.functional.cross_entropy(logits, LABELS)
    close(out.loss, labelled + 4 * (0.5 * value(logits, 3.0) + 0.25 * branches))
    close(out.metrics["branches"], branches.detach())


def test_the_layout_of_two_dimensional_stages_is_known_by_the_width_of_the_features():
    for name, layout in (("signals", "channels"), ("pieces", "tokens"), ("images", "channels")):
        assert layout_of(student(name)[2]) == layout
    square = Shapes(8, (torch.Size((8, 8)), torch.Size((8,))))
    with pytest.raises(ValueError, match=r"layout='channels'\) or OFA\(layout='tokens'\)"):
        OFA().module(square)
    for layout, first in (("channels", nn.Conv1d), ("tokens", nn.TransformerEncoderLayer)):
        assert isinstance(OFA(layout=layout).module(square)["0"][0], first)


def test_maps_are_halved_as_often_as_stages_follow():
    _, _, shapes = student("images")  # [4, 4, 4], [8, 2, 2], [16, 1, 1], features
    module = OFA().module(shapes)
    strides = [
        [layer.stride for layer in branch if isinstance(layer, nn.Conv2d)] for branch in module.values()
    ]
    assert [sum(stride == (2, 2) for stride in s) for s in strides] == [2, 1, 0]


def test_micro_batches_add_up_and_an_empty_one_has_loss_zero_and_a_graph():
    network, inputs, shapes = student("numbers")
    method = OFA()
    module = method.module(shapes).double()

    def loss(cut, count=None):
        stages = network.stages(inputs[cut])
        logits = network.head(stages[-1])
        given = {"logits": logits, "labels": LABELS[cut], "p_logits": scores()[cut], "stages": stages}
        return method(**given, module=module, count=count).loss

    whole, weights = loss(slice(None)), list(network.parameters())
    losses = [loss(cut, float(B)) for cut in (slice(0, 1), slice(1, 6), slice(6, 6))]
    close(sum(losses), whole, 1e-13)
    close(gradient(sum(losses), *weights), gradient(whole, *weights), 1e-12)
    assert losses[2] == 0 and not gradient(losses[2], *weights).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_and_excluded_classes_stay_finite(dtype):
    p = torch.tensor([[1e4, 0.0, -1e4], [-math.inf, 1.0, 0.0], [0.0, -math.inf, 1e4]], dtype=dtype)
    q = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 1.0, 0.0], [1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([2, 0, 0])
    loss = bare(OFA(), q, p, labels).loss
    assert loss.isfinite() and gradient(loss, q).isfinite().all()
    with pytest.raises(ValueError, match=r"ReverseKL\(\) is infinite at 2 of 3 rows"):
        bare(OFA(ReverseKL()), q, p, labels)


def test_the_teacher_gets_no_gradient():
    p_logits = scores().requires_grad_()
    bare(OFA(), scores(1).requires_grad_(), p_logits).loss.backward()
    assert p_logits.grad is None


def test_wrong_settings_are_refused_with_what_to_write_instead():
    for setting, says in (
        ({"gamma": 0.9}, "exponent >= 1"),
        ({"gamma": (1.0, math.inf)}, "exponent >= 1"),
        ({"weight": -1.0}, "weight >= 0"),
        ({"temperature": 0.0}, "temperature divides"),
        ({"layout": "places"}, "'channels', 'tokens'"),
    ):
        with pytest.raises(ValueError, match=says):
            OFA(**setting)
    with pytest.raises(TypeError, match="f-divergence"):
        OFA(fdiv.Renyi(2.0))
    _, _, shapes = student("numbers")
    with pytest.raises(ValueError, match="2 stages have a branch: gamma is one number, or 3"):
        OFA(gamma=(1.0, 1.5)).module(shapes)
    with pytest.raises(ValueError, match="1 stages have a branch: gamma is one number, or 2"):
        OFA(gamma=(1.0, 1.5, 2.0), stages=(0,))
    for stages in ((3,), (0, 0), (-1,)):
        with pytest.raises(ValueError, match="from 0 to 2, each once"):
            OFA(stages=stages).module(shapes)
    with pytest.raises(ValueError, match="neither a vector"):
        OFA().module(Shapes(4, (torch.Size((4, 2, 2, 2)), torch.Size((4,)))))


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = OFA(JS(0.5), gamma=(1.0, 1.5), stages=(1,), layout="tokens")
    assert fdiv.parse(repr(method), ["fdiv.methods.distill.ofa"]) == method
    assert isinstance(method, Method) and OFA().divergence == KL() and method.consumes == "examples"
