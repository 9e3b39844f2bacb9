"""SinKD: a batch of the student's rows is carried to a batch of the teacher's.

Cui, Qin, Gao, Zhang, Xu, Wu, Li, Sun, Zhou and Li, "Sinkhorn Distance Minimization for Knowledge
Distillation", arXiv 2402.17110.

    L = (1 - kd) CE + kd tau^2 D'(p, q) + weight sum_ij P_ij W_ij,   W_ij = D(p_j, q_i)
    P: exp(-W / eps), `iterations` times scaled to row sums 1 and then to column sums 1

q_i are the rows of the student and p_j those of the teacher at the temperature tau. The paper's cost is the
L1 distance of two rows, twice their TV; its total mass is the batch size B, not 1, and its gradient runs
through the iterations; iterations=None is the fixed point that they tend to, and its own gradient. P may
carry a student's row to the teacher's row of another example.
The sum is not 0 for q = p, where it pays for the spread of P. `debias` takes that off:

    S(q, p) = O(q, p) - O(q, q) / 2 - O(p, p) / 2,   O = sum P W + eps sum P log(B P)

which is 0 for q = p, and >= 0 at convergence where exp(-W / eps) is a positive kernel, as it is for the L1
distance (Feydy et al., arXiv 1810.08278).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.divergences.tv import TV
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._classes import (
    cross_entropy,
    require_finite,
    require_temperature,
    require_weights,
    tempered,
)
from fdiv.transport.sinkhorn import sinkhorn


@dataclass(frozen=True)
class SinKD:
    """Labels, the teacher row by row, and the transport between the batches of rows.

    divergence: the cost between two rows. pointwise: of each row from the teacher's own, kd its share beside
    the labels. weight: of the transport, whose mass is the batch size. iterations: None goes on until the
    plan has the wanted marginals.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "p_logits")
    unit: ClassVar[Literal["batch"]] = "batch"

    divergence: FDivergence = field(default_factory=lambda: 2 * TV())
    pointwise: FDivergence = field(default_factory=KL)
    kd: float = 0.8
    weight: float = 0.0008
    temperature: float = 2.0
    eps: float = 0.1
    iterations: int | None = 20
    debias: bool = False

    def __post_init__(self):
        require_f_divergence(self.divergence, "SinKD, whose cost compares every two rows,")
        require_f_divergence(self.pointwise, "SinKD")
        require_temperature(self.temperature)
        require_weights(weight=self.weight)
        if not 0 <= self.kd <= 1:
            raise ValueError(f"kd is the teacher's share beside the labels, in [0, 1], got {self.kd!r}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps is the spread of the plan, > 0, got {self.eps!r}")
        if self.iterations is not None and not (isinstance(self.iterations, int) and self.iterations >= 1):
            raise ValueError(
                f"iterations are a whole number >= 1, or None for all it takes, got {self.iterations!r}"
            )

    def __call__(
        self, *, logits: Tensor, labels: Tensor, p_logits: Tensor, count: Tensor | float | None = None
    ) -> Out:
        """logits, p_logits [B, C] of the student and the teacher, of the whole batch; labels [B].

        count: the examples of the global batch, which are these.
        """
        log_p, log_q = (tempered(t, self.temperature) for t in (p_logits.detach(), logits))
        labelled = cross_entropy(logits, labels)
        taught = require_finite(self.pointwise(log_p, log_q), self.pointwise)
        transport = self.transport(log_p, log_q)
        rows = (1 - self.kd) * labelled + self.kd * self.temperature**2 * taught
        metrics = {"cross_entropy": mean_over_tokens(labelled), "divergence": mean_over_tokens(taught)}
        metrics["transport"] = transport / max(1, len(logits))
        loss = mean_over_tokens(rows, count=count) + self.weight * transport
        return Out(loss, {name: value.detach() for name, value in metrics.items()})

    def transport(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """What it costs to carry the rows of q to those of p, over the whole batch."""
        if not len(log_q):
            return log_q.sum()
        if not self.debias:
            return self.paid(self.costs(log_p, log_q))
        between, of_q, of_p = (
            self.value(self.costs(*pair)) for pair in ((log_p, log_q), (log_q, log_q), (log_p, log_p))
        )
        return between - of_q / 2 - of_p / 2

    def costs(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D(p_j, q_i) in row i and column j, [B, B]."""
        return require_finite(self.divergence(log_p.unsqueeze(0), log_q.unsqueeze(1)), self.divergence)

    def paid(self, cost: Tensor) -> Tensor:
        """sum P W."""
        if self.iterations is None:
            return len(cost) * sinkhorn(cost, eps=self.eps, grad="implicit").linear
        return (plan(cost, self.eps, self.iterations).exp() * cost).sum()

    def value(self, cost: Tensor) -> Tensor:
        """sum P W + eps sum P log(B P)."""
        if self.iterations is None:
            return len(cost) * sinkhorn(cost, eps=self.eps).value
        log_plan = plan(cost, self.eps, self.iterations)
        return (log_plan.exp() * (cost + self.eps * (log_plan + math.log(len(cost))))).sum()


def plan(cost: Tensor, eps: float, iterations: int) -> Tensor:
    """Logarithm of the plan after so many scalings of rows, then columns, to sums of 1; [B, B]."""
    log_plan = -cost / eps
    for _ in range(iterations):
        log_plan = log_plan.log_softmax(1)
        log_plan = log_plan.log_softmax(0)
    return log_plan
