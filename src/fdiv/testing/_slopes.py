"""Laws of the derivatives."""

import torch

from fdiv._divergence import FDivergence
from fdiv.testing._problems import (
    check,
    check_close,
    distributions,
    gradient,
    log_ratios,
    neighbours,
    scale_of,
)


def potentials_are_the_derivatives_of_the_value(divergence: FDivergence) -> None:
    """phi = dD/dp and psi = dD/dq, up to ratios of e^25; df/dlog u = u phi by differences."""
    for scale in (1.0, 7.0):
        log_p, log_q = distributions(scale=scale)
        u, phi, psi = (log_p - log_q).exp(), *divergence.potentials(log_p - log_q)
        own = divergence.first_variation(log_p, log_q)
        slope_p, slope_q = gradient(divergence, log_p, log_q)
        for says, got, slope, rounding in (
            ("phi = dD/dp", phi, slope_p / log_p.exp(), psi.abs() / u),
            ("psi = dD/dq", psi, slope_q / log_q.exp(), phi.abs() * u),
            ("first_variation gives phi", own[0], phi, 0.0 * u),
            ("first_variation gives psi", own[1], psi, 0.0 * u),
        ):
            rounding = 1e-8 * scale_of(divergence) + 1e-14 * rounding
            check_close(got, slope, says, 1e-8, rounding, log_p=log_p, log_q=log_q)
    x, h = log_ratios(8.0), 1e-5
    difference = (divergence.f(x + h) - divergence.f(x - h)) / (2 * h)
    rounding = 1e-9 * (scale_of(divergence) + divergence.f(x))
    check_close(x.exp() * divergence.phi(x), difference, "u phi(u) = df/dlog u", 1e-7, rounding, log_ratio=x)


def logit_gradient_is_centred_psi(divergence: FDivergence) -> None:
    """The gradient in the logits of q is q (psi - E_q psi): what one fused kernel relies on."""
    log_p, logits = distributions()

    def loss(z):
        return divergence(log_p, z.log_softmax(-1))

    (slope,) = gradient(loss, logits)
    q = logits.softmax(-1)
    psi = divergence.psi(log_p - logits.log_softmax(-1))
    expected = q * (psi - (q * psi).sum(-1, keepdim=True))
    rounding = 1e-11 * (q * psi.abs()).sum(-1, keepdim=True)
    says = "the logit gradient is q (psi - E_q psi)"
    check_close(slope, expected, says, 1e-9, rounding, log_p=log_p, log_q=logits)


def gradients_agree_with_finite_differences(divergence: FDivergence) -> None:
    """torch.autograd.gradcheck, and gradgradcheck where f is smooth."""
    inputs = [x.detach().requires_grad_() for x in distributions(rows=2, support=3, scale=0.7, seed=4)]
    tolerance = 1e-5 * scale_of(divergence)
    with torch.random.fork_rng(devices=[]):  # gradcheck draws directions from the global generator
        torch.default_generator.manual_seed(0)
        try:
            torch.autograd.gradcheck(divergence, inputs, atol=tolerance)
            if divergence.is_smooth:
                torch.autograd.gradgradcheck(divergence, inputs, atol=tolerance)
        except RuntimeError as error:
            raise AssertionError(f"derivatives are finite differences: {error}") from error


def curvature_at_one_is_the_chi_square_limit(divergence: FDivergence) -> None:
    """2 D / chi^2 tends to f''(1) as q tends to p, and grows without bound at a kink."""
    ratios = []
    for distance in (1e-3, -1e-3, 1e-5):
        log_p, log_q = neighbours(distance)
        chi_square = (log_q.exp() * (log_p - log_q).expm1().square()).sum(-1)
        ratios.append(2 * divergence(log_p, log_q) / chi_square)
    if divergence.is_smooth:
        middle = (ratios[0] + ratios[1]) / 2  # terms of odd order cancel
        curvature = torch.tensor(divergence.curvature_at_one, dtype=torch.float64)
        check_close(middle, curvature, "D is f''(1)/2 chi^2 near p = q", 1e-4)
    else:
        says = "D / chi^2 grows without bound at a kink (curvature_at_one is inf)"
        check(ratios[2] > 50 * ratios[0], says, ratios[2], "a multiple of " + str(ratios[0][0].item()))


def curvature_is_the_falling_slope_of_psi(divergence: FDivergence) -> None:
    """curvature = u^2 f''(u) = -dpsi/dlog u = u dphi/dlog u >= 0, by finite differences."""
    x, h = log_ratios(8.0), 1e-4
    curvature = divergence.curvature(x)
    check(curvature >= 0, "curvature is never negative", curvature, ">= 0", log_ratio=x)
    falling = -(divergence.psi(x + h) - divergence.psi(x - h)) / (2 * h)
    rounding = 1e-9 * (scale_of(divergence) + divergence.psi(x).abs())
    check_close(curvature, falling, "curvature = -dpsi/dlog u", 1e-5, rounding, log_ratio=x)
    rising = x.exp() * (divergence.phi(x + h) - divergence.phi(x - h)) / (2 * h)
    rounding = 1e-9 * x.exp() * (scale_of(divergence) + divergence.phi(x).abs())
    check_close(curvature, rising, "curvature = u dphi/dlog u", 1e-5, rounding, log_ratio=x)
