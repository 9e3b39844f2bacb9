"""Direction, sign and convention: C01 to C08."""

import math

import torch

from conformance import oracle, world
from conformance.case import Verdict, at_most, case, refused, worst
from conformance.system import NotApplicable, System


@case(
    "C01",
    "Beta weighs the teacher, in the mixture and in the average alike.",
    "huggingface/trl/pull/3043",
)
def c01(system: System) -> Verdict:
    teacher, student = world.pair()
    errors = []
    for beta in (0.1, 0.9):  # at 1/2 a swap cannot be seen
        expected = oracle.value(f"JSD({beta})", teacher, student)
        errors.append(oracle.difference(system.jsd(teacher, student, beta), expected))
    return at_most(1e-5, max(errors), "relative error at beta 0.1 and 0.9")


@case(
    "C02",
    "A sweep of beta has no jump at its ends: they are the limit of the interior, or refused.",
    "modelscope/ms-swift/issues/10078",
    "modelscope/ms-swift/pull/10213",
    "huggingface/trl/issues/6780",
)
def c02(system: System) -> Verdict:
    teacher, student = world.pair()
    inside = system.jsd(teacher, student, 1e-3).mean().item()
    try:
        edge = system.jsd(teacher, student, 0.0).mean().item()
    except ValueError:
        return _skew_reaches_kl(system, teacher, student)
    return at_most(2.0, edge / inside, "value at beta 0 over value at 0.001")


def _skew_reaches_kl(system: System, teacher, student) -> Verdict:
    """Where the ends are refused, a family that does reach a KL has to be continuous."""
    try:
        near = system.skew_kl(teacher, student, 1e-9)
    except NotApplicable:
        return refused(0.0, "beta 0 is refused")
    error = oracle.difference(near, oracle.value("forward KL", teacher, student))
    return at_most(1e-4, error, "beta 0 is refused; relative distance of the skewed KL from KL")


@case(
    "C03",
    "A beta outside the domain is refused when it is configured, not clamped or computed with.",
    "verl-project/verl-recipe/issues/151",
)
def c03(system: System) -> Verdict:
    accepted = []
    for beta in (-0.1, 1.5):
        try:
            system.configure_jsd(beta)
        except ValueError:
            continue
        accepted.append(beta)
    return at_most(0, len(accepted), f"of the betas -0.1 and 1.5 accepted{_those(accepted)}")


def _those(accepted: list[float]) -> str:
    return f" ({', '.join(map(str, accepted))})" if accepted else ""


@case(
    "C04",
    "What is called forward or reverse KL is the one that is named, in value and in the student's gradient.",
    "paiml/aprender/pull/2153",
    "modelscope/twinkle/pull/112",
    "huggingface/trl/pull/4935",
)
def c04(system: System) -> Verdict:
    teacher, student = world.pair()
    offered = system.divergences()
    verdicts = []
    for name in offered:
        if name.startswith(("forward KL", "reverse KL")):
            (moved,) = torch.autograd.grad(offered[name](teacher, student).sum(), student)
            error = oracle.difference(moved, oracle.gradient(name, teacher, student))
            verdicts.append(at_most(1e-5, error, "relative error of the gradient"))
    if not verdicts:
        system.lacks("forward or reverse KL")
    return worst(verdicts)


@case(
    "C05",
    "A step down the penalty's gradient lowers the divergence to the reference.",
    "Unakar/Logic-RL/issues/58",
    "qiancheng0/ToolRL/issues/52",
    "Jiayi-Pan/TinyZero/pull/72",
)
def c05(system: System) -> Verdict:
    theta = world.policy()
    rises = []
    for name, penalty in system.penalties().items():
        log_policy = theta.log_softmax(-1)
        terms = penalty(world.REFERENCE, log_policy, log_policy.detach())
        (gradient,) = torch.autograd.grad((log_policy.exp().detach() * terms).sum(), theta)
        before = oracle.value(name, world.REFERENCE, theta)
        after = oracle.value(name, world.REFERENCE, theta.detach() - 1e-3 * gradient)
        rises.append((after - before).item())
    return Verdict(max(rises) < 0, max(rises), "change of the divergence in one step < 0")


@case(
    "C06",
    "Alpha means what its documentation says: the score is (1 - u^-alpha) / alpha, u = policy / reference.",
    "huggingface/trl/pull/3906",
)
def c06(system: System) -> Verdict:
    log_ratio = torch.linspace(-1.5, 1.5, 7)  # float32: some systems take no float64
    expected = (1 - (-0.3 * log_ratio).exp()) / 0.3
    error = oracle.difference(system.alpha_score(log_ratio, 0.3), expected)
    return at_most(1e-4, error, "relative error of the score at alpha 0.3")


@case(
    "C07",
    "No constant is dropped from f': the score is 0 where the policy is the reference.",
    "huggingface/trl/issues/6441",
    "huggingface/trl/pull/6559",
)
def c07(system: System) -> Verdict:
    zero = torch.zeros(1)
    largest = max(abs(score(zero).item()) for score in system.absolute_scores().values())
    return at_most(1e-6, largest, "largest score at log-ratio 0")


@case("C08", "The reward that is logged is the quantity that is optimised.")
def c08(system: System) -> Verdict:
    logged, optimised = system.preference_margins(chosen=1.0, rejected=-1.0)
    if not math.isfinite(logged):
        return Verdict(False, logged, "logged margin is finite")
    return at_most(1e-4, abs(logged - optimised) / abs(optimised), "relative error of the logged margin")
