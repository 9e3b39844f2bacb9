"""Zero mass, infinities and precision: C18 to C27."""

import math

import torch
from torch import Tensor

from conformance import oracle, world
from conformance.case import Verdict, at_most, case
from conformance.system import Rows, System


def _masked(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of logits in which a column is empty (-inf) for the teacher, the student or both."""
    pairs = {}
    for where in ("teacher", "student", "both"):
        teacher, student = (t.detach().clone() for t in world.pair(dtype=dtype))
        if where != "student":
            teacher[:, 3] = -math.inf
        if where != "teacher":
            student[:, 3] = -math.inf
        pairs[where] = (teacher, student.requires_grad_())
    return pairs


@case(
    "C18",
    "Where a column of logits is -inf the value is finite if the mathematics is, +inf if that is, never nan.",
)
def c18(system: System) -> Verdict:
    wrong = []
    for where, (teacher, student) in _masked().items():
        for name, divergence in system.divergences().items():
            expected, actual = oracle.value(name, teacher, student), divergence(teacher, student)
            right = torch.where(expected.isinf(), actual == expected, actual.isfinite())
            if not right.all():
                wrong.append(f"{name}, {where}")
    return at_most(0, len(wrong), f"wrong values{_of(wrong, system)}")


def _of(wrong: list[str], system: System) -> str:
    tried = f" of {3 * len(system.divergences())}"
    return f"{tried} ({wrong[0]}, for one)" if wrong else tried


@case(
    "C19",
    "Served log-probabilities padded with -inf give a finite loss and a finite gradient.",
    "huggingface/trl/pull/5594",
    "modelscope/ms-swift/pull/8436",
    "modelscope/ms-swift/issues/9429",
)
def c19(system: System) -> Verdict:
    teacher, student = world.pair(dtype=torch.float32)
    log_probs, ids = teacher.log_softmax(-1).topk(4)
    log_probs[[2, 5]] = -math.inf  # rows for which nothing was served
    loss = system.served(log_probs, ids, student)
    (gradient,) = torch.autograd.grad(loss, student)
    bad = int(not math.isfinite(loss.item())) + int((~gradient.isfinite()).sum())
    return at_most(0, bad, "entries of loss and gradient that are not finite")


@case(
    "C20",
    "The mixture survives tokens to which both models give a log-probability of -200.",
    "linkedin/Liger-Kernel/issues/1453",
)
def c20(system: System) -> Verdict:
    teacher, student = (t.detach().float() for t in world.pair())
    teacher[:, 3], student[:, 3] = -200.0, -200.0
    student.requires_grad_()
    value = system.jsd(teacher, student, 0.5)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    errors = (
        oracle.difference(value, oracle.value("JSD(0.5)", teacher, student)),
        oracle.difference(gradient, oracle.gradient("JSD(0.5)", teacher, student)),
    )
    return at_most(1e-3, max(errors), "relative error of value and gradient")


@case(
    "C21",
    "Top-k of a pair so confident that all mass is captured is finite, with its gradient.",
    "arcee-ai/DistillKit/issues/45",
)
def c21(system: System) -> Verdict:
    bad = 0
    for dtype in (torch.float32, torch.bfloat16):
        teacher, student = (t.detach() for t in world.pair(dtype=dtype))
        teacher[:, 1] += 60.0
        student[:, 1] += 55.0
        student.requires_grad_()
        for divergence in system.truncated().values():
            value = divergence(teacher, student, 3)
            (gradient,) = torch.autograd.grad(value.sum(), student)
            bad += int((~value.isfinite()).sum() + (~gradient.isfinite()).sum())
    return at_most(0, bad, "entries of value and gradient that are not finite")


@case(
    "C22",
    "From bfloat16 hidden states the gradient is right to 2 % when teacher and student are close.",
    "linkedin/Liger-Kernel/issues/1432",
    "linkedin/Liger-Kernel/pull/1433",
)
def c22(system: System) -> Verdict:
    teacher, student = world.heads(24, 64, 1500, torch.bfloat16, apart=0.03)
    value = system.fused_jsd(teacher, student, 0.0)
    (gradient,) = torch.autograd.grad(value, student[0])
    exact_value, exact = _fused_in_float64(teacher, student)
    if value.item() < 0:
        return Verdict(False, value.item(), f"value >= 0 (it is {exact_value:.3g})")
    return at_most(0.02, oracle.difference(gradient, exact), "relative error of the gradient")


def _fused_in_float64(teacher, student) -> tuple[float, Tensor]:
    """Value and gradient from the same rounded inputs."""
    hidden = student[0].detach().double().requires_grad_()
    logits = teacher[0].double() @ teacher[1].double().T, hidden @ student[1].detach().double().T
    value = oracle.value("forward KL", *logits).mean()
    return value.item(), torch.autograd.grad(value, hidden)[0]


@case(
    "C23",
    "No divergence of half-precision logits is negative.",
    "vllm-project/speculators/pull/788",
    "erfanzar/EasyDeL/pull/267",
)
def c23(system: System) -> Verdict:
    lowest = math.inf
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        teacher = world.logits(64, 500, 0, dtype=dtype)
        student = (teacher.float() + world.logits(64, 500, 1, scale=0.02).float()).to(dtype)
        for divergence in system.divergences().values():
            lowest = min(lowest, divergence(teacher, student).min().nan_to_num(nan=-math.inf).item())
    return Verdict(lowest >= -1e-6, lowest, "smallest value >= -1e-06")


def _at_equality(divergence: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(value, gradient) where the student is the teacher."""
    teacher, _ = world.pair(dtype=dtype)
    student = teacher.clone().requires_grad_()
    value = divergence(teacher, student)
    return value, torch.autograd.grad(value.sum(), student)[0]


@case("C24", "Where the student is the teacher the gradient is 0, never nan, for every divergence.")
def c24(system: System) -> Verdict:
    worst = 0.0
    for divergence in system.divergences().values():
        for dtype in (torch.float32, torch.bfloat16):
            gradient = _at_equality(divergence, dtype)[1]
            size = gradient.abs().max().nan_to_num(nan=math.inf).item()
            worst = max(worst, size / torch.finfo(dtype).eps)
    return at_most(8, worst, "largest entry of a gradient at equality, in units of the dtype's resolution")


@case("C25", "The value reported is the divergence: 0 where the two agree, and right where they do not.")
def c25(system: System) -> Verdict:
    worst = 0.0
    teacher, student = world.pair()
    for name, divergence in system.divergences().items():
        at_equality = _at_equality(divergence, torch.float32)[0].abs().max().nan_to_num(nan=math.inf).item()
        off = oracle.difference(divergence(teacher, student), oracle.value(name, teacher, student))
        worst = max(worst, at_equality, off)
    return at_most(1e-5, worst, "largest value at equality, or relative error off it")


@case("C26", "Where a column of logits is -inf the gradient is not nan, and right where the value is finite.")
def c26(system: System) -> Verdict:
    wrong = []
    for where, (teacher, student) in _masked().items():
        for name, divergence in system.divergences().items():
            value = divergence(teacher, student)
            (gradient,) = torch.autograd.grad(value.sum(), student)
            known = oracle.value(name, teacher, student).isfinite()
            exact = _gradient_on_support(name, teacher, student)
            error = oracle.difference(gradient[known], exact[known]) if known.any() else 0.0
            if gradient.isnan().any() or error > 1e-4:
                wrong.append(f"{name}, {where}")
    return at_most(0, len(wrong), f"wrong gradients{_of(wrong, system)}")


def _gradient_on_support(name: str, teacher: Tensor, student: Tensor) -> Tensor:
    """The limit of the gradient as the empty column's logits fall; the oracle's own would be 0/0."""
    floor = [t.detach().double().clamp(min=-80.0) for t in (teacher, student)]
    return oracle.gradient(name, *floor)


@case(
    "C27",
    "At exact ties the gradient of total variation is 0.",
    "linkedin/Liger-Kernel/pull/1384",
)
def c27(system: System) -> Verdict:
    offered = system.divergences()
    if "TV" not in offered:
        system.lacks("total variation on logits")
    gradient = _at_equality(offered["TV"], torch.float32)[1]
    partly = _gradient_with_ties(offered["TV"])
    return at_most(
        1e-6, max(gradient.abs().max().item(), partly), "largest entry of the gradient, or its error"
    )


def _gradient_with_ties(divergence: Rows) -> float:
    """The error where only some columns are tied: those add nothing but their normalisation."""
    p = torch.tensor([[0.4, 0.2, 0.3, 0.1]])
    q = torch.tensor([[0.3, 0.2, 0.4, 0.1]])
    student = q.log().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(p.log(), student).sum(), student)
    slope = torch.sign((q - p).round(decimals=6)) / 2
    return (gradient - q * (slope - (q * slope).sum())).abs().max().item()
