"""Only the log-ratio at samples is known: one number a sample, and a surrogate with the exact gradient."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.estimate._estimator import Guarantee, Sees


@dataclass(frozen=True)
class MonteCarlo:
    """f(u) at samples of q (Schulman's k3, for every f), f(u)/u at samples of p: unbiased values.

    A sample's value is not a loss: differentiating f(u) at frozen samples of q follows another divergence
    (k1 has gradient 0, k3 that of KL(p, q)), because the samples move too. `surrogate` is the loss: its
    value is the estimate, its gradient that of D in q's parameters.

    `samples`: drawn from "q", from "p", or from a "behaviour" policy whose log-probability is passed third.
    `gradient`: "score" multiplies grad log q by the detached psi; "importance" differentiates the value
    under an importance weight kept in the graph. Both are exact for every f; score has no overflow.
    Source: Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL", arXiv
    2506.09477, for KL; the form for every f follows from D's first variation psi.
    """

    sees: ClassVar[Sees] = "log_probs"

    samples: Literal["q", "p", "behaviour"] = "q"
    gradient: Literal["score", "importance"] = "score"

    def __post_init__(self):
        if self.samples not in ("q", "p", "behaviour"):
            raise ValueError(f"samples come from 'q', 'p' or 'behaviour', got {self.samples!r}")
        if self.gradient not in ("score", "importance"):
            raise ValueError(
                f"gradient is 'score' or 'importance', got {self.gradient!r}: the bare value's gradient "
                "belongs to another divergence, see the docstring"
            )

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
        self, divergence: FDivergence, log_p: Tensor, log_q: Tensor, log_behaviour: Tensor | None = None
    ) -> Tensor:
        """The unbiased value at each sample, from the sample's log-probabilities; any shape, kept."""
        self.check(divergence)
        if self.samples == "p":
            return divergence.reverse.f(log_q - log_p)
        value = divergence.f(log_p - log_q)
        return value if self.samples == "q" else value * (log_q - self._behaviour(log_behaviour)).exp()

    def surrogate(
        self, divergence: FDivergence, log_p: Tensor, log_q: Tensor, log_behaviour: Tensor | None = None
    ) -> Tensor:
        """The same value, whose gradient in log_q's parameters is an unbiased gradient of D."""
        log_p = log_p.detach()
        value = self(divergence, log_p, log_q, log_behaviour)
        if self.samples == "p":  # p does not move with q: the value's own gradient is right
            return value
        log_sampler = (log_q if self.samples == "q" else self._behaviour(log_behaviour)).detach()
        weight = (log_q - log_sampler).exp()
        if self.gradient == "importance":
            return weight * divergence.f(log_p - log_q)
        score = (weight * divergence.psi(log_p - log_q)).detach()
        return value.detach() + score * (log_q - log_q.detach())

    def _behaviour(self, log_behaviour: Tensor | None) -> Tensor:
        if log_behaviour is None:
            raise TypeError(f"{self!r} needs log_behaviour, the samples' log-probability when drawn")
        return log_behaviour.detach()
