"""Divergences on a part of the vocabulary: C28 to C33."""

import math

import torch
from torch import Tensor

from conformance import oracle, world
from conformance.case import Verdict, at_least, at_most, case
from conformance.system import System


@case(
    "C28",
    "A truncated divergence is one: never negative, never above the whole, and its gradient not cut off.",
    "verl-project/verl/issues/7856",
    "verl-project/verl/pull/7855",
    "verl-project/verl/pull/7806",
)
def c28(system: System) -> Verdict:
    teacher = world.logits(400, 200, 0, 1.0)
    # A student near the teacher and a little surer has, as often as not, more mass on the top than it.
    student = (1.1 * teacher + world.logits(400, 200, 1, 0.5)).requires_grad_()
    share = 0.0
    for name, divergence in system.truncated().items():
        value, whole = divergence(teacher, student, 8), oracle.value(name, teacher, student)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        dead = (gradient.abs().sum(-1) == 0) & (whole > 1e-6)
        bad = (value < -1e-6) | (value > whole * (1 + 1e-5)) | dead
        share = max(share, bad.double().mean().item())
    return at_most(0.0, share, "share of random rows that are negative, above the whole or without gradient")


@case(
    "C29",
    "Optimising a truncated reverse KL does not empty the support it looks at.",
    "verl-project/verl/pull/5041",
)
def c29(system: System) -> Verdict:
    kinds = [f for name, f in system.truncated().items() if name.startswith("reverse KL")]
    if not kinds:
        system.lacks("truncated reverse KL")
    teacher, start = world.logits(4, 60, 0), world.logits(4, 60, 1, 0.5)
    shares = [kept / captured for captured, kept in (_descend(kind, teacher, start) for kind in kinds)]
    return at_least(0.5, min(shares), "student's mass on the teacher's top 4 over the teacher's own")


def _descend(divergence, teacher: Tensor, start: Tensor, k: int = 4) -> tuple[float, float]:
    """(teacher's, student's) mass on the teacher's top k after training the student's logits."""
    logits = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        optimiser.zero_grad()
        divergence(teacher, logits, k).sum().backward()
        optimiser.step()
    index = teacher.topk(k).indices
    masses = [t.detach().softmax(-1).gather(-1, index).sum(-1).mean().item() for t in (teacher, logits)]
    return masses[0], masses[1]


@case("C30", "A student whose mass lies outside the atoms looked at has a loss and a gradient.")
def c30(system: System) -> Verdict:
    teacher, student = _disjoint()
    smallest = math.inf
    for name, divergence in system.truncated().items():
        value = divergence(teacher, student, 4)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        whole = oracle.value(name, teacher, student), oracle.gradient(name, teacher, student)
        seen = (value.sum() / whole[0].sum()).item(), (gradient.norm() / whole[1].norm()).item()
        smallest = min(smallest, *seen)
    return at_least(0.01, smallest, "smaller of loss and gradient on disjoint supports, over the whole's")


def _disjoint() -> tuple[Tensor, Tensor]:
    """Logits in which each model puts nearly all its mass on four tokens that the other all but ignores."""
    teacher, student = torch.zeros(1, 40, dtype=torch.float64), torch.zeros(1, 40, dtype=torch.float64)
    teacher[:, :4], student[:, 20:24] = 10.0, 10.0
    return teacher, student.requires_grad_()


@case(
    "C31",
    "What the tail is worth is right as either model's tail vanishes alone.",
    "verl-project/verl/pull/7855",
)
def c31(system: System) -> Verdict:
    worst = 0.0
    for teacher, student in (_tails(1e-4, 0.3), _tails(0.3, 1e-4)):
        index = torch.arange(3).expand(1, 3)
        coarse = oracle.coarse(teacher, student, index)
        for name, divergence in system.with_tail().items():
            error = oracle.difference(divergence(teacher, student, 3), oracle.value(name, *coarse))
            worst = max(worst, error)
    return at_most(0.02, worst, "relative error against the divergence of top 3 and tail")


def _tails(teacher: float, student: float) -> tuple[Tensor, Tensor]:
    """float32 logits over 10 tokens with these masses outside the first three."""
    heads = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.35, 0.33, 0.32])
    rows = []
    for tail, head in zip((teacher, student), heads, strict=True):
        rows.append(torch.cat([head * (1 - tail), torch.full((7,), tail / 7)]).log().unsqueeze(0))
    return rows[0], rows[1]


@case(
    "C32",
    "A temperature acts on logits: top-k at a temperature is top-k of the tempered models.",
    "PrimeIntellect-ai/prime-rl/pull/697",
)
def c32(system: System) -> Verdict:
    teacher, student = world.pair(rows=6, vocab=30)
    tempered = system.tempered_truncated(teacher, student, 5, 2.0)
    plain = system.tempered_truncated(teacher / 2, student / 2, 5, 1.0)
    return at_most(1e-6, oracle.difference(tempered, plain), "relative difference at temperature 2")


@case(
    "C33",
    "A served teacher says at which temperature and in which mode it scored, or is refused.",
    "verl-project/verl/pull/5592",
    "vllm-project/vllm/pull/37082",
    "huggingface/trl/pull/4163",
    "vllm-project/vime/issues/64",
)
def c33(system: System) -> Verdict:
    system.lacks("client of served teachers that can be called alone")
