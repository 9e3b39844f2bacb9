"""RS-KD: distillation from a few tokens drawn from the teacher at each place, without bias.

Anshumann, Zaidi, Kedia, Ahn, Kwon, Lee, Lee and Lee, "Sparse Logit Sampling: Accelerating Knowledge
Distillation in LLMs", arXiv 2503.16870.

    n draws v ~ pi, pi proportional to p^tau, with replacement;   t_v = (draws of v) p_v / (n pi_v)
    L = -sum t log q;   dL/dlogits = (sum t) q - t, whose mean over draws is q - p, the gradient of KL

At tau = 1 t is the frequencies of the draw, and var t_v = p_v (1 - p_v) / n. Keeping the k likeliest tokens
instead leaves a bias that no number of steps removes. At tau != 1 sum t is 1 on average only, and is not
normalised, which would be a bias too. The paper's N is `n`, its proposal's exponent `tau`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.divergences.kl import KL
from fdiv.estimate.fused_atoms import FusedAtoms
from fdiv.estimate.sampled_logits import SampledLogits
from fdiv.methods._method import Consumes, Out, check_mask, mean_over_tokens, named
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Offline


@dataclass(frozen=True)
class RSKD:
    """The mean over response tokens of sum t log(p/q), whose gradient is the paper's, draw by draw.

    Its mean is KL(p, q); that of the paper's own number, -sum t log q, is KL(p, q) + H(p).

    control_variate: adds -sum t + sum t q/p, of mean 0. Value and gradient of *every* draw then vanish where
    p = q, so the noise fades as the student arrives; far away, where q/p is large, there is more of it. At
    tau = 1 this is GKD(KL(), SampledLogits(n, "teacher")), and since both densities are known at the drawn
    tokens it is unbiased for any f-divergence. Frequencies alone are so for KL only, which is linear in p.
    cached: the teacher is a cache of such draws, read as FusedAtoms reads it; its weights know their tau.
    """

    consumes: ClassVar[Consumes] = "responses"

    n: int = 50
    tau: float = 1.0
    control_variate: bool = False
    cached: bool = False
    divergence: FDivergence = field(default_factory=KL)
    sampler: Sampler = field(default_factory=Offline)

    def __post_init__(self):
        self.estimator.check(self.divergence)
        if not self.tau > 0:
            raise ValueError(
                f"tau > 0 tempers the proposal p^tau, got {self.tau!r}; 1 draws from the teacher"
            )
        if self.cached and self.tau != 1:
            raise ValueError(
                f"tau = {self.tau!r} is settled when a cache is made, by RSKD(n, tau).draw(log_p), whose "
                "weights know it; leave it out"
            )
        if not self.control_variate and self.divergence != KL():
            raise TypeError(
                f"frequencies alone estimate KL without bias, not {self.divergence!r}; "
                "write control_variate=True, for any f-divergence"
            )

    @property
    def estimator(self) -> SampledLogits | FusedAtoms:
        drawn = SampledLogits(self.n, "teacher")
        return FusedAtoms(drawn) if self.cached else drawn

    def draw(self, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a cache keeps of the teacher's log_p [rows, vocab]: (index, log_p there, log_weight), [rows,
        n].

        By torch's global generator. At tau = 1 counts are enough: log(count / n) for log_p and 0 for
        log_weight give the same gradients without the control variate.
        """
        index, log_weight = SampledLogits(self.n, "teacher").draw(*[self._log_proposal(log_p)] * 2)
        return index, log_p.gather(-1, index), log_weight

    def distinct(self, log_p: Tensor) -> Tensor:
        """The expected number of different tokens in a draw, [rows]: sum of 1 - (1 - pi)^n."""
        missed = torch.log1p(-self._log_proposal(log_p).exp().clamp(max=1)) * self.n
        return -torch.expm1(missed).sum(-1)

    def _log_proposal(self, log_p: Tensor) -> Tensor:
        return log_p if self.tau == 1 else (self.tau * log_p).log_softmax(-1)

    def __call__(
        self, *, mask: Tensor | None = None, count: Tensor | float | None = None, **evidence: Any
    ) -> Out:
        """log_p and log_q [rows, vocab]; cached: index, log_p, log_weight [rows, n], q_hidden and q_weight.

        mask [rows] selects response tokens; count is their number in the global batch (default: here).
        """
        tensors = named(evidence, self.estimator.evidence)
        rows = 4 if self.cached else 2  # the rest is a head
        if mask is not None:
            check_mask(mask, tensors[0].shape[:-1])
            tensors = [t[mask] for t in tensors[:rows]] + tensors[rows:]
        term = self.divergence if self.control_variate else _LogRatio()
        if isinstance(self.estimator, FusedAtoms):
            return Out(mean_over_tokens(self.estimator(term, *tensors), count=count), {})
        log_p, log_q = tensors
        index, log_p, log_weight = self.draw(log_p)
        values = SampledLogits.atoms(term, log_p, log_q.gather(-1, index), log_weight)
        return Out(mean_over_tokens(values, count=count), {})


@dataclass(frozen=True)
class _LogRatio(FDivergence):
    """p log(p/q): KL without - p + q, which adds up to 0 over all tokens, but not over a draw."""

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p.exp() * (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
