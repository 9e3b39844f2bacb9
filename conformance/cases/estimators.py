"""Estimators: C09 to C17."""

import math

import torch
from torch import Tensor

from conformance import oracle, world
from conformance.case import Verdict, at_least, at_most, case, worst
from conformance.system import Penalty, System


def _expected_gradient(penalty: Penalty, sampler: Tensor | None) -> Tensor:
    """The gradient's exact expectation over the sampled token; `sampler` None is the policy itself."""
    theta = world.policy()
    log_policy = theta.log_softmax(-1)
    log_sampler = log_policy.detach() if sampler is None else sampler
    terms = penalty(world.REFERENCE, log_policy, log_sampler)
    return torch.autograd.grad((log_sampler.exp() * terms).sum(), theta)[0]


def _worst_gradient(penalties: dict[str, Penalty], sampler: Tensor | None, what: str) -> Verdict:
    errors = {
        name: oracle.difference(
            _expected_gradient(penalty, sampler),
            oracle.gradient(name, world.REFERENCE, world.policy()),
        )
        for name, penalty in penalties.items()
    }
    name = max(errors, key=errors.__getitem__)
    return at_most(1e-5, errors[name], f"relative error of the {what} ({name})")


@case(
    "C09",
    "The expected gradient of a sampled penalty is the gradient of the divergence it is named after.",
    "OpenRLHF/OpenRLHF/pull/1309",
    "huggingface/trl/issues/4967",
    "verl-project/verl/pull/2953",
)
def c09(system: System) -> Verdict:
    return _worst_gradient(system.penalties(), None, "gradient")


@case(
    "C10",
    "Off-policy too, because the samples are weighted by how likely they are now.",
    "huggingface/trl/issues/4637",
    "huggingface/trl/pull/6503",
    "THUDM/slime/pull/1004",
)
def c10(system: System) -> Verdict:
    return _worst_gradient(system.off_policy_penalties(), world.BEHAVIOUR, "gradient off-policy")


@case(
    "C11",
    "A quantity of the state alone is no advantage, whose gradient it would average to 0: it is refused, or "
    "differentiated.",
    "radixark/miles/issues/2362",
)
def c11(system: System) -> Verdict:
    theta = world.policy()
    loss = system.full_penalty(world.REFERENCE.unsqueeze(0), theta.unsqueeze(0), "reverse KL")
    (gradient,) = torch.autograd.grad(loss, theta)
    error = oracle.difference(gradient, oracle.gradient("reverse KL", world.REFERENCE, theta))
    return at_most(1e-5, error, "relative error of the full-vocabulary penalty's gradient")


@case(
    "C12",
    "No gradient flows through a reward or an advantage.",
    "meta-pytorch/torchforge/pull/527",
    "THUDM/slime/issues/1449",
)
def c12(system: System) -> Verdict:
    log_policy = torch.tensor([[-1.0, -0.5], [-0.3, -2.0], [-1.5, -0.7]], dtype=torch.float64)
    log_policy.requires_grad_()
    live = log_policy.sum(1)  # a reward made of the policy's own log-probabilities
    mask = torch.tensor([[True, True], [True, False], [True, True]])  # equal lengths would hide it
    gradients = [
        torch.autograd.grad(system.policy_gradient(log_policy, rewards, mask), log_policy)[0]
        for rewards in (live, live.detach())
    ]
    return at_most(1e-9, oracle.difference(*gradients), "relative change of the gradient by a live reward")


@case(
    "C13",
    "Credit for what follows a token counts from the token, not from the start of the batch's row.",
    "huggingface/trl/issues/6626",
)
def c13(system: System) -> Verdict:
    constant = torch.full((5,), 0.4, dtype=torch.float64)
    whole = torch.ones(5, dtype=torch.bool)
    padded = torch.tensor([False, False, True, True, True, True, True])
    credit = system.future_credit(constant, whole)
    later = system.future_credit(torch.cat([constant[:2], constant]), padded)[2:]
    # A constant per-token cost c: token i answers for the 4 - i that follow it.
    cost = credit[3]
    expected = cost * torch.arange(4, -1, -1, dtype=torch.float64)
    errors = (oracle.difference(credit, expected), oracle.difference(later, expected))
    zero = at_least(1e-6, cost.abs().item(), "credit of the last token but one")
    return worst([zero, at_most(1e-9, max(errors), "relative error of the credit, with padding and without")])


@case(
    "C14",
    "A clip leaves a divergence: it is not negative, and 0 only where the two agree.",
    "huggingface/trl/pull/5990",
)
def c14(system: System) -> Verdict:
    clipped = {name: f for name, f in system.ratio_functions().items() if name.startswith("value")}
    if not clipped:
        system.lacks("clipped value")
    far = torch.tensor([-400.0, -50.0, -15.0, -1.0, 1.0, 15.0, 50.0, 400.0], dtype=torch.float64)
    lowest = min(f(far).min().item() for f in clipped.values())
    return at_least(1e-6, min(lowest, 1e300), "smallest value away from equality")


@case(
    "C15",
    "A clamp is the same in the backward pass as in the forward pass.",
    "ByteDance-Seed/VeOmni/pull/771",
)
def c15(system: System) -> Verdict:
    errors = []
    for function in system.ratio_functions().values():
        x = torch.tensor([-330.0, -25.0, -3.0, 4.0, 24.0, 320.0], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(x).sum(), x)
        with torch.no_grad():
            numeric = (function(x + 1e-4) - function(x - 1e-4)) / 2e-4
        errors.append(_relative(gradient, numeric))
    return at_most(1e-3, max(errors), "relative error of the gradient against finite differences")


def _relative(actual: Tensor, expected: Tensor) -> float:
    """The largest elementwise error: values here differ by hundreds of orders of magnitude."""
    scale = torch.maximum(actual.abs(), expected.abs()).clamp(min=1e-6)
    return ((actual - expected).abs() / scale).max().nan_to_num(nan=math.inf).item()


@case(
    "C16",
    "Scores stay finite and in order at log-ratios up to 10,000.",
    "huggingface/trl/pull/5984",
    "huggingface/trl/issues/3015",
    "huggingface/trl/pull/5837",
)
def c16(system: System) -> Verdict:
    log_ratio = torch.tensor([-1e4, -1e3, -100.0, -95.0, -40.0, 0.0, 40.0, 1e3, 1e4])
    bad = []
    for name, score in system.preference_scores().items():
        values = score(log_ratio)
        steps = values.diff()
        if not (values.isfinite().all() and (steps >= 0).all() and steps[2] > 0):
            bad.append(name)
    what = f" ({', '.join(bad)})" if bad else ""
    return at_most(0, len(bad), f"scores that are not finite and rising{what}")


@case(
    "C17",
    "A divergence is penalised once: a second place is refused, and the loss holds beta times its value.",
    "verl-project/verl/issues/211",
    "verl-project/verl/issues/509",
    "hiyouga/EasyR1/issues/508",
)
def c17(system: System) -> Verdict:
    try:
        system.doubled_penalty()()
    except (TypeError, ValueError):
        pass
    else:
        return Verdict(False, 2.0, "places where one divergence is penalised")
    theta = world.policy()
    log_policy = theta.log_softmax(-1).detach()
    penalty = next(f for name, f in system.penalties().items() if name.startswith("reverse KL"))
    terms = penalty(world.REFERENCE, log_policy, log_policy)
    counted = (log_policy.exp() * terms).sum() / oracle.value("reverse KL", world.REFERENCE, theta)
    return at_most(1e-6, abs(counted.item() - 1), "a second place is refused; |times counted - 1|")
