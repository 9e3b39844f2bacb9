"""TIP: distil at the tokens where the student is unsure, or sure and wrong.

Xu, Sang, Zhou, He, Wang and Geramifard, "TIP: Token Importance in On-Policy Distillation", arXiv 2604.14084.

    score = h + d - h d,   L = mean of D(p, q)(.|y_<t) over the rho R tokens of highest score,   y ~ student

h is the student's entropy and d its divergence from the teacher, each brought to [0, 1] over the batch, after
the entropies above the quantile `ceiling` are lowered to it. The paper's rho is `keep`, its delta the value
of `divergence`, KL(student, teacher). Its quadrants Q1 to Q4 are the metrics unsure_far, unsure_near,
sure_far and sure_near, here divided at the medians.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv._math import in_working_precision
from fdiv.divergences.js import JS
from fdiv.divergences.kl import ReverseKL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate._heads import Head
from fdiv.estimate.exact import Exact
from fdiv.estimate.fused_linear import FusedLinear, Measured
from fdiv.methods._method import Consumes, Out, check_mask, mean_over_tokens, named
from fdiv.methods.distill._rows import some_rows
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Mix

SCORES = ("soft_or", "entropy", "divergence", "sampled")
ROWS = 256  # of logits that are looked at together in the first pass


@dataclass(frozen=True)
class TIP:
    """The mean of D(teacher, student) over the tokens of a call that score highest.

    score: "soft_or"; "entropy" or "divergence" alone; or "sampled", the authors' code: drawn without
    replacement, by torch's global generator, with chances in proportion to entropy times JS(0.5).
    A first pass without gradient scores all rows, a second one sees the kept rows alone.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: Divergence = field(default_factory=ReverseKL)
    estimator: Estimator = field(default_factory=Exact)
    keep: float = 0.5
    score: Literal["soft_or", "entropy", "divergence", "sampled"] = "soft_or"
    ceiling: float = 0.98
    sampler: Sampler = field(default_factory=Mix)

    def __post_init__(self):
        GKD(self.divergence, self.estimator)  # refuses what it cannot train
        if self.estimator.sees == "heads" and not isinstance(self.estimator, FusedLinear):
            raise TypeError(f"{self.estimator!r} cannot tell the student's entropy; write FusedLinear()")
        if self.score not in SCORES:
            raise ValueError(f"score is one of {', '.join(SCORES)}, got {self.score!r}")
        for name in ("keep", "ceiling"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction in (0, 1], got {getattr(self, name)!r}")

    def __call__(
        self, *, mask: Tensor | None = None, count: Tensor | float | None = None, **evidence: Tensor
    ) -> Out:
        """`evidence`: the tensors that `estimator.evidence` names; mask selects response tokens.

        count: the tokens of the global batch, kept or not (default: here). A call's mean over what it keeps
        weighs as much as the call has tokens. Scores are relative to the call, so that another split into
        micro-batches keeps other tokens. metrics: means over all tokens of the call.
        """
        named(evidence, self.estimator.evidence)
        if mask is not None:
            check_mask(mask, mask.shape)
            evidence = some_rows(evidence, mask)
        entropy, value = self._look(evidence, self.divergence)
        if entropy.ndim != 1:
            raise ValueError(f"rows are [R], got {tuple(entropy.shape)}; pass mask=, or flatten them")
        kept = self.select(entropy, self._look(evidence, JS(0.5))[1] if self.score == "sampled" else value)
        rows = self.estimator(self.divergence, *named(some_rows(evidence, kept), self.estimator.evidence))
        loss = mean_over_tokens(rows) * (1.0 if count is None else len(entropy) / max(1, count))
        numbers = quadrants(entropy, value) | {"divergence": value}
        return Out(loss, {name: mean_over_tokens(number) for name, number in numbers.items()})

    def select(self, entropy: Tensor, divergence: Tensor) -> Tensor:
        """The numbers of the rows that are kept, ascending; floor(keep R) of them and at least one."""
        # 0.29 * 100 is a little less than 29.
        kept = max(1, math.floor(self.keep * len(entropy) + 1e-9)) if len(entropy) else 0
        return self.scores(entropy, divergence).topk(kept).indices.sort().values

    def scores(self, entropy: Tensor, divergence: Tensor) -> Tensor:
        """What the rows are ordered by, from the entropy and the divergence of each; [R]."""
        if self.score == "sampled":  # by log-weights plus Gumbel noise: a draw without replacement
            weight = entropy.clamp(min=0.0) * divergence  # a fused entropy of 0 may be rounded below it
            return weight.log() - torch.empty_like(weight).exponential_().log()
        unsure, wrong = spread(lowered(entropy, self.ceiling)), spread(divergence)
        if self.score == "soft_or":
            return unsure + wrong - unsure * wrong
        return unsure if self.score == "entropy" else wrong

    @torch.no_grad()
    def _look(self, evidence: dict[str, Any], divergence: Any) -> tuple[Tensor, Tensor]:
        """(the student's entropy, the divergence) at every row, of the whole vocabulary."""
        if isinstance(self.estimator, FusedLinear):
            # It takes gradients in its forward pass, of all that asks for them, whatever the grad mode.
            tensors: list[Any] = [_detached(evidence[name]) for name in self.estimator.evidence]
            seen = replace(self.estimator, of=Exact()).measured(divergence, *tensors)
            assert isinstance(seen, Measured)
            return seen.q_entropy, seen.value
        entropies, values = [], []
        for some in zip(*(evidence[name].split(ROWS) for name in ("log_p", "log_q")), strict=True):
            log_p, log_q = in_working_precision(*some)
            entropies.append(torch.special.entr(log_q.exp()).sum(-1))
            values.append(divergence(log_p, log_q))
        return torch.cat(entropies), torch.cat(values)


def spread(rows: Tensor) -> Tensor:
    """The rows on a scale from the smallest, 0, to the largest, 1; all 0 where they are equal."""
    if not len(rows):
        return rows
    low, high = rows.min(), rows.max()
    placed = torch.where(rows == high, 1.0, (rows - low) / (high - low))  # +inf is 1, and what is below it 0
    return torch.where(high > low, placed, 0.0)


def lowered(rows: Tensor, quantile: float) -> Tensor:
    """With the largest 1 - quantile of the rows (rounded down) lowered to the next below them."""
    if not len(rows):
        return rows
    return rows.clamp(max=rows.kthvalue(math.ceil(quantile * len(rows) - 1e-9)).values)


def quadrants(entropy: Tensor, divergence: Tensor) -> dict[str, Tensor]:
    """1 for the rows above or below the median entropy and the median divergence, else 0; [R] each."""
    unsure, far = (rows > rows.median() if len(rows) else rows > 0 for rows in (entropy, divergence))
    shares = {
        "unsure_far": unsure & far,
        "unsure_near": unsure & ~far,
        "sure_far": ~unsure & far,
        "sure_near": ~unsure & ~far,
    }
    return {name: rows.to(entropy) for name, rows in shares.items()}


def _detached(tensor: Tensor | Head) -> Tensor | Head:
    if isinstance(tensor, Head):
        bias = None if tensor.bias is None else tensor.bias.detach()
        return tensor._replace(weight=tensor.weight.detach(), bias=bias)
    return tensor.detach()
