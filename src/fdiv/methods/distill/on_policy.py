"""On-policy distillation from sampled tokens: one log-probability of the teacher a token, under any f.

Lu and Thinking Machines Lab, "On-Policy Distillation" (2025), with its recipe in tinker-cookbook; and Yang et
al., "Qwen3 Technical Report", arXiv 2505.09388. The student writes y, and its loss has the gradient

    sum_t (psi_t + sum over j > t of discount^(j - t) f_j) grad log q(y_t|y_<t),

f_j = f(p/q) the value and psi_t = f - (p/q) f' the first variation, at the sampled token's own ratio. The
recipe's advantage is -psi_t of `ReverseKL()`, log p - log q, and its kl_discount_factor is `discount`. At 0
the text is taken as given, as in GKD. At 1 this is the gradient of E sum_t D(p, q)(.|y_<t), through the
sampling of y too: for `ReverseKL()`, that of the divergence of whole responses.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.divergences.kl import ReverseKL
from fdiv.estimate.monte_carlo import MonteCarlo
from fdiv.methods._method import Consumes, Out, mean_over_tokens, named
from fdiv.sample._sampler import Decoding, Sampler
from fdiv.sample.fixed import Mix


@dataclass(frozen=True)
class OnPolicyDistillation:
    """The mean over sampled tokens of an unbiased estimate of D(teacher, student), with its exact gradient.

    discount: how much of what a token leads to counts, from 0 (the token's own divergence) to 1 (all of it).
    estimator: MonteCarlo(); or MonteCarlo("behaviour"), whose every token is weighted by its own ratio
    q / behaviour: exact for the token, while the ratios of the tokens before and after it are left at 1.
    sampler: the student alone, without a cut of its distribution, for a token that is never drawn teaches
    nothing and no weight makes up for it.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: FDivergence = field(default_factory=ReverseKL)
    estimator: MonteCarlo = field(default_factory=MonteCarlo)
    discount: float = 0.0
    sampler: Sampler = field(default_factory=Mix)

    def __post_init__(self):
        if not isinstance(self.estimator, MonteCarlo) or self.estimator.samples == "p":
            raise TypeError(
                f"OnPolicyDistillation sees the tokens that the student drew, got {self.estimator!r}; write "
                "MonteCarlo() or MonteCarlo('behaviour'), or GKD(lmbda=1.0) to see the whole vocabulary"
            )
        self.estimator.check(self.divergence)
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount is between 0 and 1, got {self.discount!r}")
        if not isinstance(self.sampler, Mix) or self.sampler.lmbda != 1:
            raise ValueError(f"the student writes every response: write Mix(1.0), not {self.sampler!r}")
        _check_decoding(self.sampler.decoding, self.estimator)

    @property
    def reads(self) -> tuple[str, ...]:
        off_policy = self.estimator.samples == "behaviour"
        return ("sequence", "log_behaviour") if off_policy else ("sequence",)

    def __call__(self, *, sequence: Tensor, count: Tensor | float | None = None, **evidence: Tensor) -> Out:
        """log_p, log_q (and log_behaviour) of the sampled tokens, and their sequences' numbers; [R] each.

        Both models at temperature 1. count: the tokens of the global batch (default: here). Responses stay
        whole: with a discount a token's gradient needs those after it.
        """
        tensors = named(evidence, self.estimator.evidence)
        if any(t.shape != sequence.shape for t in tensors):
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in evidence.items())
            raise ValueError(f"one number a token: sequence {tuple(sequence.shape)}, {shapes}")
        rows = self.estimator.surrogate(self.divergence, *tensors)
        ratio = (evidence["log_q"] - evidence.get("log_behaviour", evidence["log_q"]).detach()).exp()
        if self.discount:
            value = self.divergence.f(evidence["log_p"] - evidence["log_q"]).detach()
            rows = rows + discounted(value, sequence, self.discount) * (ratio - ratio.detach())
        return Out(mean_over_tokens(rows, count=count), {"ratio": mean_over_tokens(ratio.detach())})


def discounted(rows: Tensor, sequence: Tensor, discount: float) -> Tensor:
    """The sum over the rows j after row t, in its own sequence, of discount^(j - t) rows_j, [R]."""
    total, reach = rows, 1
    while reach < len(rows):  # `total` covers windows of `reach` rows, and two of them make one twice as long
        total = total + discount**reach * _ahead(total, sequence, reach)
        reach *= 2
    return discount * _ahead(total, sequence, 1)


def _ahead(rows: Tensor, sequence: Tensor, by: int) -> Tensor:
    """The row `by` places later in the same sequence, 0 beyond its end."""
    moved = torch.zeros_like(rows)
    moved[:-by] = torch.where(sequence[by:] == sequence[:-by], rows[by:], 0.0)
    return moved


def _check_decoding(decoding: Decoding, estimator: MonteCarlo) -> None:
    if decoding.top_k is not None or decoding.top_p < 1 or decoding.temperature == 0:
        raise ValueError(f"{decoding!r} never draws some tokens, so that no estimate is unbiased")
    if decoding.temperature != 1 and estimator.samples == "q":
        raise ValueError(
            f"{decoding!r} does not sample the student itself; write MonteCarlo('behaviour'), which weights"
        )
