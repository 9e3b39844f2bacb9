"""Only k atoms are looked at; all others are merged into one."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, on_one_support, require_f_divergence
from fdiv._math import log1mexp
from fdiv.estimate._estimator import Guarantee, Sees


class Captured(NamedTuple):
    """A truncated value and how much of either distribution it has seen; each [rows]."""

    value: Tensor
    p_mass: Tensor
    q_mass: Tensor


@dataclass(frozen=True)
class TopK:
    """The divergence over k atoms and a tail atom that holds the rest: a lower bound (data processing).

    `support`: the k likeliest atoms of the "teacher" (p), of the "student" (q), or of both ("union").
    The tail keeps the value a true divergence: zero only if every cell agrees, and never blind to mass
    outside the support. It is log(1 - captured), so a tail under the dtype's resolution is noise.
    """

    sees: ClassVar[Sees] = "logits"
    evidence = ("log_p", "log_q")

    k: int
    support: Literal["teacher", "student", "union"] = "teacher"

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"TopK(k) needs k >= 1, got {self.k!r}")
        if self.support not in ("teacher", "student", "union"):
            raise ValueError(f"support is 'teacher', 'student' or 'union', got {self.support!r}")

    @property
    def guarantee(self) -> Guarantee:
        bias = "low by what the merged atoms differ among themselves"
        return Guarantee(bias, "lower", f"{self.k} likeliest atoms ({self.support}) and a tail atom")

    def check(self, divergence: object) -> None:
        require_f_divergence(divergence, "TopK(), whose tail atom needs data processing,")

    def __call__(self, divergence: FDivergence, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.captured(divergence, log_p, log_q).value

    def captured(self, divergence: FDivergence, log_p: Tensor, log_q: Tensor) -> Captured:
        """The value with the captured masses, from full log-probabilities [rows, vocab]."""
        self.check(divergence)
        log_p, log_q = on_one_support(log_p, log_q)
        if self.k >= log_p.shape[-1]:
            return Captured(divergence(log_p, log_q), log_p.exp().sum(-1), log_q.exp().sum(-1))
        index, surplus = self.choose(log_p, log_q)
        return self.chosen(divergence, log_p.gather(-1, index), log_q.gather(-1, index), surplus)

    @staticmethod
    def atoms(divergence: FDivergence, log_p: Tensor, log_q: Tensor) -> Captured:
        """The same from the log-probabilities of the atoms alone, [rows, k] (-inf twice: no atom)."""
        log_p, log_q = on_one_support(log_p, log_q)
        p_tail, p_mass = _tail(log_p)
        q_tail, q_mass = _tail(log_q)
        value = divergence(torch.cat([log_p, p_tail], -1), torch.cat([log_q, q_tail], -1))
        return Captured(value, p_mass, q_mass)

    def choose(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the atoms [rows, k, or up to 2k for a union], which places hold none: None where all do)."""
        k = min(self.k, log_p.shape[-1])
        if self.support != "union":
            return (log_p if self.support == "teacher" else log_q).topk(k).indices, None
        chosen = torch.zeros_like(log_p, dtype=torch.bool)
        chosen.scatter_(-1, log_p.topk(k).indices, True)
        chosen.scatter_(-1, log_q.topk(k).indices, True)
        # Rows differ in how many atoms the union has: the surplus places hold atoms not chosen.
        width = min(2 * self.k, log_p.shape[-1])
        first = chosen.byte().topk(width)
        return first.indices, first.values == 0

    def chosen(
        self, divergence: FDivergence, log_p: Tensor, log_q: Tensor, surplus: Tensor | None
    ) -> Captured:
        """The same from log-probabilities at the atoms of `choose`."""
        if surplus is not None:
            log_p, log_q = (t.masked_fill(surplus, -torch.inf) for t in (log_p, log_q))
        return self.atoms(divergence, log_p, log_q)


def _tail(log_atoms: Tensor) -> tuple[Tensor, Tensor]:
    """(log of what the atoms leave over [rows, 1], what they capture [rows])."""
    # 1 - captured is known to the dtype's resolution; a tail of exactly 0 would forbid the other's mass.
    resolution = torch.finfo(log_atoms.dtype).eps
    nothing = (log_atoms == -torch.inf).all(-1, keepdim=True)
    # Atoms all empty capture 0, but the gradient of their logsumexp is nan: it is taken at other atoms.
    log_captured = log_atoms.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True)
    log_captured = log_captured.masked_fill(nothing, -torch.inf)
    return log1mexp(log_captured.clamp(max=-resolution)), log_captured.squeeze(-1).exp()
