"""Only the log-ratio at samples is known: one number a sample, and surrogates with the exact gradient."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import effective_count, ratio_cap
from fdiv.estimate import _far
from fdiv.estimate._estimator import Guarantee, Sees
from fdiv.estimate.potential import potential, with_slope
from fdiv.estimate.tokens import check_mask

Samples = Literal["q", "p", "behaviour"]
Gradient = Literal["score", "importance", "potential", "straight-through"]


@dataclass(frozen=True)
class MonteCarlo:
    """f(u) at samples of q (Schulman's k3, for every f), f(u)/u at samples of p: unbiased values.

    A sample's value is not a loss: differentiating f(u) at frozen samples of q follows another divergence
    (k1 has gradient 0, k3 that of KL(p, q)), because the samples move too. `surrogate` is the loss: its
    expected gradient is that of D in q's parameters, exactly, for every f, in each of its modes.

    `samples`: drawn from "q", from "p", or from a "behaviour" policy whose log-probability is passed third.
    `gradient`: "score" multiplies grad log q by the detached psi; "importance" differentiates the value
    under an importance weight kept in the graph; "potential" is a function h of the log-ratio with
    dh/dlog q = psi, whose value is no estimate; "straight-through" has the value f(u) and the gradient of h.
    The last two are for samples of q. At samples of p the value is a loss, and there is nothing to choose.
    Log-ratios and log-weights beyond `ratio_cap` go on as straight lines; `diagnostics` counts them.
    Source: Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL", arXiv
    2506.09477, for KL; the form for every f follows from D's first variation psi.
    """

    sees: ClassVar[Sees] = "log_probs"

    samples: Samples = "q"
    gradient: Gradient = "score"

    def __post_init__(self):
        if self.samples not in get_args(Samples):
            raise ValueError(f"samples come from 'q', 'p' or 'behaviour', got {self.samples!r}")
        self._check_mode(self.gradient)

    @property
    def evidence(self) -> tuple[str, ...]:
        return ("log_p", "log_q", "log_behaviour") if self.samples == "behaviour" else ("log_p", "log_q")

    @property
    def guarantee(self) -> Guarantee:
        seen = {"q": "q", "p": "p", "behaviour": "the behaviour policy"}[self.samples]
        return Guarantee("none where the other's support is inside", "unbiased", f"samples of {seen}")

    def check(self, divergence: object) -> None:
        require_f_divergence(divergence, "MonteCarlo(), which needs a function of the ratio,")

    def __call__(
        self,
        divergence: FDivergence,
        log_p: Tensor,
        log_q: Tensor,
        log_behaviour: Tensor | None = None,
        *,
        control: float = 0.0,
    ) -> Tensor:
        """The unbiased value at each sample, from the sample's log-probabilities; any shape, kept.

        `control`: adds control (u - 1) to f, whose mean is 0 for normalised p and q: unbiased for every
        number chosen beforehand, not for one fitted to these samples. 0 is never negative; for ReverseKL()
        -1 is k1, log q/p.
        """
        self.check(divergence)
        if self.samples == "p":  # f(u)/u is the reverse's f at 1/u; (u - 1)/u is -(1/u - 1)
            return _far.f(divergence.reverse, _far.log_ratio(log_q, log_p), -control)
        value = _far.f(divergence, _far.log_ratio(log_p, log_q), control)
        if self.samples == "q":
            return value
        return _far.weighted(_far.log_weight(log_q, self._behaviour(log_behaviour)), value)

    def surrogate(
        self,
        divergence: FDivergence,
        log_p: Tensor,
        log_q: Tensor,
        log_behaviour: Tensor | None = None,
        *,
        mode: Gradient | None = None,
    ) -> Tensor:
        """The same value (h for "potential"), whose gradient in log_q's parameters is an unbiased one of D.

        `mode` takes the place of `gradient` for this call.
        """
        self.check(divergence)
        mode = self._check_mode(self.gradient if mode is None else mode)
        log_p = log_p.detach()
        if self.samples == "p":  # p does not move with q: the value's own gradient is right
            return self(divergence, log_p, log_q)
        log_ratio = _far.log_ratio(log_p, log_q)
        if mode == "potential":
            return potential(divergence, log_ratio)
        if mode == "straight-through":
            return with_slope(divergence, log_ratio, _far.f(divergence, log_ratio.detach()))
        if mode == "importance":
            return self._in_graph(divergence, log_p, log_q, log_behaviour)
        return self._scored(divergence, log_p, log_q, log_behaviour)

    def diagnostics(
        self,
        log_p: Tensor,
        log_q: Tensor,
        log_behaviour: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """How far the samples can be trusted: two numbers between 0 and 1, finite for any input.

        ess: (sum w)^2 / (n sum w^2) of the weights w that carry the samples to where they were not drawn:
        q/behaviour off-policy; p/q at samples of q (whose limit is 1 / (1 + Pearson(p, q))), q/p at those of
        p. linearised: the share of samples whose log-ratio or log-weight is beyond `ratio_cap`, infinite
        ones included. `mask` selects samples; without one both are 0.
        """
        ratio = _far.log_ratio(log_p.detach(), log_q.detach())
        cap = ratio_cap(ratio.dtype)
        far = ratio.abs() > cap
        weight = _far.bent(-ratio if self.samples == "p" else ratio, cap)
        if self.samples == "behaviour":
            weight = _far.log_weight(log_q.detach(), self._behaviour(log_behaviour))
            far = far | (weight > cap)
        kept = torch.ones_like(far) if mask is None else check_mask(mask, far.shape)
        count = kept.sum().clamp(min=1)
        return {
            "ess": effective_count(torch.where(kept, weight, -math.inf).flatten()) / count,
            "linearised": (far & kept).sum().to(ratio.dtype) / count,
        }

    def _scored(
        self, divergence: FDivergence, log_p: Tensor, log_q: Tensor, log_behaviour: Tensor | None
    ) -> Tensor:
        with torch.no_grad():
            value = self(divergence, log_p, log_q, log_behaviour)
            score = _far.psi(divergence, _far.log_ratio(log_p, log_q))
            if self.samples == "behaviour":
                score = _far.weighted(_far.log_weight(log_q, self._behaviour(log_behaviour)), score)
        return value + score * _far.moving(log_q)

    def _in_graph(
        self, divergence: FDivergence, log_p: Tensor, log_q: Tensor, log_behaviour: Tensor | None
    ) -> Tensor:
        value = self(divergence, log_p, log_q, log_behaviour)
        return value * _far.moving(log_q).exp() if self.samples == "q" else value

    def _behaviour(self, log_behaviour: Tensor | None) -> Tensor:
        if log_behaviour is None:
            raise TypeError(f"{self!r} needs log_behaviour, the samples' log-probability when drawn")
        return log_behaviour.detach()

    def _check_mode(self, mode: str) -> Gradient:
        if mode not in get_args(Gradient):
            raise ValueError(
                f"gradient is one of {', '.join(map(repr, get_args(Gradient)))}, got {mode!r}: the bare "
                "value's gradient belongs to another divergence, see the docstring"
            )
        if mode in ("potential", "straight-through") and self.samples != "q":
            raise ValueError(f"{mode!r} is right at samples of q alone: {_INSTEAD[self.samples]}")
        return cast(Gradient, mode)


_INSTEAD = {
    "p": "there the value f(u)/u is its own potential. Write MonteCarlo('p')",
    "behaviour": "elsewhere it would need the weight q/behaviour, held fixed, as 'score' has it. Write "
    "MonteCarlo('behaviour', 'score')",
}
