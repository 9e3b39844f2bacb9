"""A few atoms drawn at random, each weighted by how often it would be drawn."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, on_one_support, require_f_divergence
from fdiv.estimate._estimator import Guarantee, Sees


@dataclass(frozen=True)
class SampledLogits:
    """mean over n draws v ~ proposal of g(p_v, q_v) / proposal_v: unbiased, value and gradient, for any f.

    `proposal`: the "teacher" (p), the "student" (q) or their even "mixture" (weights at most 2 for either).
    The teacher proposal under KL is random-sampling distillation (-sum t_hat log q, t_hat the frequencies of
    the draw) and a term of mean zero, by which value and gradient of every draw vanish where p = q.
    Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", arXiv
    2503.16870.
    """

    sees: ClassVar[Sees] = "logits"
    evidence = ("log_p", "log_q")

    n: int = 50
    proposal: Literal["teacher", "student", "mixture"] = "mixture"

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"SampledLogits(n) needs n >= 1, got {self.n!r}")
        if self.proposal not in ("teacher", "student", "mixture"):
            raise ValueError(f"proposal is 'teacher', 'student' or 'mixture', got {self.proposal!r}")

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee("none", "unbiased", f"{self.n} atoms drawn from the {self.proposal}")

    def check(self, divergence: object) -> None:
        require_f_divergence(divergence, "SampledLogits(), which sums over atoms,")

    def __call__(self, divergence: FDivergence, log_p: Tensor, log_q: Tensor) -> Tensor:
        self.check(divergence)
        log_p, log_q = on_one_support(log_p, log_q)
        index, log_weight = self.draw(log_p, log_q)
        return self.atoms(divergence, log_p.gather(-1, index), log_q.gather(-1, index), log_weight)

    def draw(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Atoms and the logs of their weights, each [rows, n], by torch's global generator."""
        with torch.no_grad():
            log_proposal = self._log_proposal(log_p, log_q)
            rows = log_proposal.exp().reshape(-1, log_proposal.shape[-1])
            index = rows.multinomial(self.n, replacement=True).reshape(*log_proposal.shape[:-1], self.n)
            return index, -log_proposal.gather(-1, index) - math.log(self.n)

    def _log_proposal(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.proposal == "mixture":
            return torch.logaddexp(log_p, log_q) - math.log(2)  # -inf where both are empty
        return log_p if self.proposal == "teacher" else log_q

    @staticmethod
    def atoms(divergence: FDivergence, log_p: Tensor, log_q: Tensor, log_weight: Tensor) -> Tensor:
        """sum of weight g(p, q) over atoms drawn earlier (a cache, say), each tensor [rows, n]."""
        log_p, log_q = on_one_support(log_p, log_q)
        # g is homogeneous: a weighted atom is an atom of weighted masses.
        return divergence(log_p + log_weight, log_q + log_weight)
