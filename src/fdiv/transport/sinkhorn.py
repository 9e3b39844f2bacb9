"""Entropic optimal transport on a matrix of costs."""

import torch
from torch import Tensor

from fdiv.transport._given import Gradient, Marginals, Penalty, Reference, check_modes, given_costs, sides_of
from fdiv.transport._marginals import marginal_of
from fdiv.transport._plan import Transport as Transport
from fdiv.transport._solved import Solver as Solver
from fdiv.transport._solved import solved


def sinkhorn(
    cost: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    eps: float | Tensor = 1.0,
    *,
    marginals: Marginals = "balanced",
    reference: Reference = "product",
    grad: Gradient = "envelope",
    solver: Solver = Solver(),
    start: tuple[Tensor, Tensor] | None = None,
) -> Transport:
    """min over plans P >= 0 of <P, C> + eps KL(P, a x b), with the marginals a and b.

    KL(P, Q) = sum P log(P/Q) - P + Q. With reference="uniform" the second term is eps sum P log P, minus eps
    times Shannon's entropy: the same plan at another value; balanced marginals only. (POT: reg_type "KL" and
    "entropy"; OTT: reg_ot_cost and ent_reg_cost.)

    `marginals`: "balanced" keeps both. An f-divergence D with its weight, such as 2.0 * KL(), lets the plan
    miss them at the price D(P 1, a) + D(P' 1, b); a pair has one for each side. The masses of a and b may
    then differ. TV() is half the L1 distance.

    `grad`: how the value is differentiated, in the cost and in both log-weights.
        "envelope"  first order, from the plan alone: no memory, no further solve. A second derivative is
                    refused; plan, potentials and linear part have none.
        "implicit"  everything, to any order, from the equations of the optimum: one linear system a
                    derivative. Not for TV() and other penalties with a kink; with one that is neither
                    KL nor has a kink, right to second order for the value and to first for the rest.
        "unroll"    everything, through the steps themselves: memory steps x N x M. Balanced, KL and TV.
    The value of a balanced problem is a function of weights of one mass: its derivative in them is defined up
    to a constant, here such that <a, f> = <b, g>.

    Shapes: cost [..., N, M], log_a [..., N], log_b [..., M], eps a number or [...], broadcastable -> [...].
    Weights are natural logarithms, uniform by default; -inf leaves an atom out. A cost of +inf forbids a
    pair. float16 and bfloat16 are computed in float32. Balanced masses that differ by at most 1 %, as after
    rounding, are both scaled to their geometric mean. `start`: potentials (f, g) of a similar problem,
    which are used if their marginals miss by less than half of the mass.
    Errors: ValueError for empty sides, nan costs, an atom with weight but without an allowed partner, and
    for balanced marginals of different masses; RuntimeError with Solver(unconverged="raise").
    Source: Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (arXiv 1306.0895);
    marginal penalties: Chizat, Peyre, Schmitzer, Vialard, "Scaling Algorithms for Unbalanced Transport
    Problems" (arXiv 1607.05816).

    >>> import torch
    >>> sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), eps=0.1).value  # -eps log((1 + e^(-1/eps)) / 2)
    tensor(0.0693)
    """
    sides = sides_of(marginals)
    check_modes(sides, reference, grad)
    given, batch = given_costs(cost, log_a, log_b, eps, sides)
    return solved(given, batch, reference, grad, solver, start)


def self_sinkhorn(
    cost: Tensor,
    log_a: Tensor | None = None,
    eps: float | Tensor = 1.0,
    *,
    marginals: Penalty = "balanced",
    reference: Reference = "product",
    grad: Gradient = "envelope",
    solver: Solver = Solver(),
) -> Transport:
    """The same problem between a measure and itself, `cost` symmetric: f = g, in a few tens of steps.

    Alternating steps are slow here; f <- (f + T f)/2, which keeps the symmetry, is not.
    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences"
    (arXiv 1810.08278).
    """
    side = marginal_of(marginals)
    check_modes((side, side), reference, grad)
    given, batch = given_costs(cost, log_a, log_a, eps, (side, side))
    if cost.shape[-1] != cost.shape[-2] or not bool(torch.isclose(cost, cost.mT).all()):
        raise ValueError(
            f"self_sinkhorn takes a symmetric cost [..., N, N], got {tuple(cost.shape)}, or one that is not "
            "symmetric; write sinkhorn(cost, log_a, log_a, eps)"
        )
    return solved(given, batch, reference, grad, solver, mirrored=True)
