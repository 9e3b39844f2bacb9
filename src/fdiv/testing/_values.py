"""Laws of the value."""

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.testing._problems import (
    check,
    check_close,
    distributions,
    gradient,
    log_ratios,
    measures,
    neighbours,
    require,
    scale_of,
)


def is_never_negative(divergence: FDivergence) -> None:
    """g(p, q) >= 0 for every pair of masses, hence D >= 0 for every pair of measures."""
    log_p = torch.cat([log_ratios(1e-6), log_ratios(1e-2), log_ratios(1.0), log_ratios(20.0)])
    log_q = torch.zeros_like(log_p)
    for dtype in (torch.float32, torch.float64):
        tolerance = 32 * torch.finfo(dtype).eps * scale_of(divergence)
        value = divergence.perspective(log_p.to(dtype), log_q.to(dtype))
        says, slack = f"the perspective is never negative ({dtype})", tolerance * (1 + log_p.exp())
        check(value >= -slack, says, value, ">= 0", log_p=log_p)
        for pair in (
            measures(0.01, dtype=dtype),
            measures(2.0, dtype=dtype),
            neighbours(1e-3, dtype),
        ):
            value = divergence(*pair)
            says = f"the value is never negative ({dtype})"
            check(value >= -10 * tolerance, says, value, ">= 0", log_p=pair[0], log_q=pair[1])


def is_zero_with_zero_slope_at_equality(divergence: FDivergence) -> None:
    """D(p, p) = 0 exactly, in every precision, and its gradient is 0: f(1) = f'(1) = 0."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        log_p = distributions(dtype=torch.float32)[0].to(dtype)
        value = divergence(log_p, log_p.clone())
        check(value == 0, f"D(p, p) is exactly zero ({dtype})", value, "0.0", log_p=log_p)
        for name, slope in zip(("p", "q"), gradient(divergence, log_p, log_p), strict=True):
            flat = slope.abs() <= 1e-6 * scale_of(divergence) * log_p.exp()
            says = f"the gradient in log {name} is zero at p = q ({dtype}): use f(1) = f'(1) = 0"
            check(flat, says, slope, "0.0", log_p=log_p)


def is_homogeneous(divergence: FDivergence) -> None:
    """g(c p, c q) = c g(p, q): a divergence is a function of the ratio, weighted by mass."""
    log_p, log_q = measures()
    value = divergence(log_p, log_q)
    for factor in (1e-4, 7.5, 1e6):
        shift = torch.tensor(factor, dtype=torch.float64).log()
        scaled = divergence(log_p + shift, log_q + shift)
        check_close(
            scaled,
            factor * value,
            f"D({factor} p, {factor} q) = {factor} D(p, q)",
            1e-10,
            log_p=log_p,
            log_q=log_q,
        )


def is_the_sum_of_its_potentials(divergence: FDivergence) -> None:
    """D(p, q) = sum p phi(p/q) + q psi(p/q) = E_q f(p/q): Euler's identity."""
    log_p, log_q = measures()
    value = divergence(log_p, log_q)
    phi, psi = divergence.potentials(log_p - log_q)
    terms_p, terms_q = log_p.exp() * phi, log_q.exp() * psi
    rounding = 1e-12 * (terms_p.abs() + terms_q.abs()).sum(-1)
    says = "D is the sum of p phi + q psi"
    check_close((terms_p + terms_q).sum(-1), value, says, 1e-10, rounding, log_p=log_p, log_q=log_q)
    sampled = (log_q.exp() * divergence.f(log_p - log_q)).sum(-1)
    check_close(sampled, value, "D is the expectation of f under q", 1e-10, log_p=log_p, log_q=log_q)


def is_bounded_below_by_any_critic(divergence: FDivergence) -> None:
    """sum p phi(v) + q psi(v) <= D(p, q) for every guess v of the ratio, equal at v = p/q."""
    log_p, log_q = measures()
    value = divergence(log_p, log_q)
    truth, guesses = log_p - log_q, measures(seed=5)
    for critic in (truth, *guesses, truth + 1e-3, truth + 2.0, -truth, torch.zeros_like(truth)):
        phi, psi = divergence.potentials(critic)
        bound = (log_p.exp() * phi + log_q.exp() * psi).sum(-1)
        slack = 1e-10 * (log_p.exp() * phi.abs() + log_q.exp() * psi.abs()).sum(-1)
        check(
            bound <= value + slack,
            "a wrong critic never exceeds D",
            bound,
            value,
            log_p=log_p,
            log_q=log_q,
            critic=critic,
        )
        if critic is truth:
            check_close(bound, value, "the true critic attains D", 1e-9, slack, log_p=log_p, log_q=log_q)


def never_rises_when_atoms_merge(divergence: FDivergence) -> None:
    """Merging atoms never raises D (data processing), and keeps it where p/q is constant."""
    log_p, log_q = measures()
    value = divergence(log_p, log_q)
    for size in (3, 9):
        merged = divergence(_merge(log_p, size), _merge(log_q, size))
        check(
            merged <= value * (1 + 1e-12),
            f"merging {size} atoms never raises D",
            merged,
            value,
            log_p=log_p,
            log_q=log_q,
        )
    shares = distributions(rows=1, support=4)[0]
    split = tuple((x.unsqueeze(-1) + shares).flatten(-2) for x in (log_p, log_q))
    check_close(
        divergence(split[0], split[1]),
        value,
        "splitting atoms in equal shares keeps D",
        1e-10,
        log_p=log_p,
        log_q=log_q,
    )


def is_jointly_convex(divergence: FDivergence) -> None:
    """D(sum w_i (p_i, q_i)) <= sum w_i D(p_i, q_i): f is convex."""
    for scale in (0.1, 1.0, 4.0):
        first, second = measures(scale, seed=3), measures(scale, seed=7)
        for weight in (0.1, 0.5, 0.8):
            log_p, log_q = (_mix(a, b, weight) for a, b in zip(first, second, strict=True))
            chord = weight * divergence(*first) + (1 - weight) * divergence(*second)
            value = divergence(log_p, log_q)
            check(
                value <= chord * (1 + 1e-10),
                "D of a mixture is at most the mixture of D",
                value,
                chord,
                log_p=log_p,
                log_q=log_q,
            )


def reverses_by_swapping_its_arguments(divergence: FDivergence) -> None:
    """D.reverse(p, q) = D(q, p), and the prices at the two ends change places."""
    log_p, log_q = measures()
    reverse = divergence.reverse
    require(isinstance(reverse, FDivergence), f"D.reverse is an f-divergence, got {reverse!r}")
    at = {"log_p": log_p, "log_q": log_q}
    check_close(
        reverse(log_p, log_q),
        divergence(log_q, log_p),
        f"{reverse!r}(p, q) is {divergence!r}(q, p)",
        1e-10,
        **at,
    )
    check_close(
        reverse.reverse(log_p, log_q),
        divergence(log_p, log_q),
        "the reverse of the reverse is D",
        1e-10,
        **at,
    )
    ends = torch.tensor([[reverse.f_at_zero, reverse.slope_at_infinity]], dtype=torch.float64)
    swapped = torch.tensor([[divergence.slope_at_infinity, divergence.f_at_zero]], dtype=torch.float64)
    check_close(
        ends,
        swapped,
        f"f(0) and f'(inf) of {reverse!r} are f'(inf) and f(0) of {divergence!r}",
        1e-10,
    )


def _merge(log_mass: Tensor, size: int) -> Tensor:
    return log_mass.unflatten(-1, (-1, size)).logsumexp(-1)


def _mix(a: Tensor, b: Tensor, weight: float) -> Tensor:
    return (weight * a.exp() + (1 - weight) * b.exp()).log()
