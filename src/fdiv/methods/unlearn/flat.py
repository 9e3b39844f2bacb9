"""FLAT: unlearn from the forget data alone, by telling a template answer from the answer to be forgotten.

Wang, Wei, Liu, Pang, Liu, Shah, Bao, Liu and Wei, "LLM Unlearning via Loss Adjustment with Only Forget Data",
arXiv 2410.11143.

    L = -g(P_e) + f*(g(P_f)),   P = mean over an answer's tokens of the policy's probability of the token

P_e is of the template, the pair's chosen answer, P_f of the answer to be forgotten, its rejected one. For p
the template's distribution and q that of the other, E_p[T] - E_q[f*(T)] <= D(p, q); the paper's T is g(P),
so that the loss is a surrogate and its value no divergence. The paper's f is of p / q, as here. Its rows:

    KL()        g = v   f*(g) = e^(v - 1)       that is f*(v - 1) + 1 of the f with f'(1) = 0: the same loss
    Pearson()   v       v + v^2/4               until v <= f'(0) = -2, where f* is flat
    Jeffreys()  v       v + v^2/4 + v^3/16      f* to its third order
    2 * JS(0.5) and TV(): the rule

The rule, for every other f: g(v) = f'(e^v) and f*(g(v)) = -psi(v), v being read as a log-ratio; a jump of f'
at 1 is climbed along (1 + tanh v)/2. g increases onto the slopes of f, so that descent raises the template's
probability and lowers the other's. The loss of a sum of divergences is the sum of their losses.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, Sum, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.chi_square import Neyman, Pearson
from fdiv.divergences.hellinger import SquaredHellinger
from fdiv.divergences.jeffreys import Jeffreys
from fdiv.divergences.kl import KL, ReverseKL
from fdiv.divergences.tv import TV
from fdiv.methods._method import Consumes, Out

Row = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # g, and f* after g

PUBLISHED: dict[FDivergence, Row] = {
    KL(): (lambda v: v, lambda v: (v - 1).exp()),
    Pearson(): (lambda v: v, lambda v: Pearson().conjugate(v)),
    Jeffreys(): (lambda v: v, lambda v: v + v**2 / 4 + v**3 / 16),
}
# The authors' other three, whose g falls: descent lowers the template's probability.
LEGACY: dict[FDivergence, Row] = {
    ReverseKL(): (lambda v: -v.exp(), lambda v: -1 - v),
    SquaredHellinger(): (lambda v: -v.expm1() / 2, lambda v: (-v).expm1() / 2),
    Neyman(): (lambda v: -v.expm1(), lambda v: 2 - 2 * (1 - v).sqrt()),
}


@dataclass(frozen=True)
class FLAT:
    """-g(P_e) + f*(g(P_f)), averaged over pairs; no text to be retained and no reference is needed.

    stat: what is averaged over an answer's tokens, "prob" (the paper's) or "logprob".
    legacy: the authors' code for ReverseKL(), 2 * SquaredHellinger() and Neyman(), which trains the wrong way
        round; for comparisons only.
    """

    consumes: ClassVar[Consumes] = "pairs"
    reads: ClassVar[tuple[str, ...]] = ("log_q_label", "sequence", "pairs", "pairs_in_batch")

    divergence: FDivergence = field(default_factory=TV)
    stat: Literal["prob", "logprob"] = "prob"
    legacy: bool = False

    def __post_init__(self):
        require_f_divergence(self.divergence, "FLAT")
        if self.stat not in ("prob", "logprob"):
            raise ValueError(f"stat is 'prob' or 'logprob', got {self.stat!r}")
        if self.legacy and not all(part in LEGACY for part in _parts(self.divergence)):
            raise ValueError(
                f"legacy=True stands for the authors' ReverseKL(), 2 * SquaredHellinger() and Neyman(), got "
                f"{self.divergence!r}; leave legacy out"
            )

    def __call__(
        self, *, log_q_label: Tensor, sequence: Tensor, pairs: int, pairs_in_batch: Tensor | float
    ) -> Out:
        """log_q_label, sequence [R]: of the templates' tokens, 0 <= sequence < pairs, then of the others'.

        An answer without a token has the statistic 0, and no gradient.
        """
        (rows,) = in_working_precision(log_q_label)
        if self.stat == "logprob" and rows.isneginf().any():
            raise ValueError(
                "a token has no probability at all, and so no mean log-probability; write stat='prob'"
            )
        statistic = _means(rows.exp() if self.stat == "prob" else rows, sequence, 2 * pairs)
        template, forget = statistic.unflatten(0, (2, pairs))
        (gain, _), (_, price) = self.terms(template), self.terms(forget)
        if bool((price - gain).detach().isinf().any()):
            raise ValueError(
                f"a mean of {statistic.min().item():.4g} is too small for {self.divergence!r}, whose g or f* "
                "has no number there; write stat='prob', or a divergence that does not seek modes as steeply"
            )
        with torch.no_grad():
            metrics = {"template": template.mean(), "forget": forget.mean()} if pairs else {}
        return Out((price - gain).sum() / pairs_in_batch, metrics)

    def terms(self, statistic: Tensor) -> tuple[Tensor, Tensor]:
        """(g(v), f*(g(v))), elementwise."""
        return _terms_of(self.divergence, statistic, LEGACY if self.legacy else PUBLISHED)


def _terms_of(divergence: FDivergence, v: Tensor, rows: dict[FDivergence, Row]) -> tuple[Tensor, Tensor]:
    if isinstance(divergence, Sum):
        parts = [(w, _terms_of(d, v, rows)) for w, d in divergence.terms]
        gain, price = ([w * part[side] for w, part in parts] for side in (0, 1))
        return torch.stack(gain).sum(0), torch.stack(price).sum(0)
    if divergence in rows:
        g, price_of = rows[divergence]
        return g(v), price_of(v)
    if divergence.is_smooth:
        return divergence.phi(v), -divergence.psi(v)
    g = divergence.phi(v) + _jump(divergence) / 2 * (v.tanh() - v.sign())
    return g, divergence.conjugate(g)


def _jump(divergence: FDivergence) -> float:
    """Of f' at 1."""
    low, high = divergence.phi(torch.tensor([-1e-30, 1e-30], dtype=torch.float64)).tolist()
    return high - low


def _parts(divergence: FDivergence) -> list[FDivergence]:
    if isinstance(divergence, Sum):
        return [part for _, term in divergence.terms for part in _parts(term)]
    return [divergence]


def _means(rows: Tensor, sequence: Tensor, answers: int) -> Tensor:
    """The mean of each answer's rows, [answers]; 0 of one without a row."""
    total = rows.new_zeros(answers).index_add(0, sequence, rows)
    return total / sequence.bincount(minlength=answers).clamp(min=1)
