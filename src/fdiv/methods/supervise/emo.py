"""EMO: likelihood, and what it costs to move the model's guess to the token that came.

Ren, Wu and Zhu, "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling", arXiv
2310.04691.

    transport_t = sum_v q_t(v) c(y_t, v) = 1 - <e_y, sum_v q_t(v) e_v>,      c(x, v) = 1 - <e_x, e_v>
    emo1: L_t = 1/2 [ nll_t + sg(nll_t / transport_t) transport_t ]
    emo2: L_t = transport_t + sg(transport_t / nll_t) nll_t

sg: without gradient; e_v: row v of a head, at length 1, without gradient. The transport bounds the earth
mover's distance from above, and is that distance where the data are one token. emo1, emo2 and `adaptive`,
whose ratios have transport + q(y) in the place of transport, are variants of the authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.estimate._heads import Head, as_head
from fdiv.estimate._stream import Chunk, chunk_rows, stream
from fdiv.methods._method import Consumes, Out, mean_over_tokens

TINY = 1e-10  # of a ratio's denominator, as in the authors' code


@dataclass(frozen=True)
class EMO:
    """Mean over tokens of the likelihood and the transport, each scaled to the other's size.

    Never without the likelihood: where all mass is on one wrong token the gradient of the transport is 0.
    cost: whose rows are e, the student's head as it is now ("current"), or that of the reference, frozen.
    largest_ratio: what nll / transport (emo1), or its inverse (emo2), is at most; None: anything.
    chunk: rows of logits held at a time.
    """

    consumes: ClassVar[Consumes] = "examples"
    divergence: ClassVar[Divergence] = KL()  # of the likelihood

    mix: Literal["emo1", "emo2"] = "emo1"
    cost: Literal["current", "reference"] = "current"
    adaptive: bool = False
    largest_ratio: float | None = None
    chunk: int | None = None

    def __post_init__(self):
        if self.mix not in ("emo1", "emo2"):
            raise ValueError(
                f"mix is 'emo1' or 'emo2', got {self.mix!r}: the transport alone has no gradient where the "
                "model is sure and wrong, so that it is always mixed with the likelihood"
            )
        if self.cost not in ("current", "reference"):
            raise ValueError(f"cost is 'current' or 'reference', got {self.cost!r}")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive is True or False, got {self.adaptive!r}")
        if self.largest_ratio is not None and not self.largest_ratio > 0:
            raise ValueError(
                f"largest_ratio is > 0 or None, got {self.largest_ratio!r}; write SFT() for likelihood alone"
            )
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is a number of rows >= 1 or None, got {self.chunk!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("q_hidden", "q_weight", "labels", *(("p_weight",) if self.cost == "reference" else ()))

    def __call__(
        self,
        *,
        q_hidden: Tensor,
        q_weight: Tensor | Head,
        labels: Tensor,
        p_weight: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """Student's states [R, width] and head [V, width]; labels [R]; p_weight [V, any width] for its costs.

        metrics: nll and transport; uniform transport, that of a guess at random; anisotropy, the mean cosine
        of two tokens: near 1 all costs are alike, and the transport says little.
        """
        head = as_head(q_weight, "q_weight")
        points = unit_rows(self._rows(head, p_weight))
        rows, nll, cost = self.rows(q_hidden, head, labels, points)
        centre = points.mean(0)
        at_random = 1 - (points[labels] * centre).sum(-1)  # elementwise: autocast rounds products
        numbers = {"nll": nll, "transport": cost, "uniform transport": at_random}
        metrics = {name: mean_over_tokens(number) for name, number in numbers.items()}
        return Out(mean_over_tokens(rows, count=count), metrics | {"anisotropy": centre.square().sum()})

    def rows(
        self, hidden: Tensor, head: Tensor | Head, labels: Tensor, points: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, nll, transport) of each row, [R]; the first has a gradient. points: from unit_rows."""
        head = as_head(head, "q_weight")
        if head.group is not None:
            raise ValueError("EMO needs all rows of the head in one process, got a Head with a group")
        if len(points) != len(head.weight):
            raise ValueError(f"costs are between {len(head.weight)} tokens, got rows of {len(points)}")
        models = [(hidden, head)]
        # Beside its logits a chunk has costs.
        chunk = self.chunk or max(32, chunk_rows(models) // 2)
        loss, nll, cost = stream(_Mixture(self, labels, points), models, chunk=chunk)
        return loss, nll, cost

    def ratio(self, nll: Tensor, cost: Tensor, q_label: Tensor) -> Tensor:
        """What the second term is multiplied with, [R]."""
        cost = cost + q_label if self.adaptive else cost
        found = nll / (cost + TINY) if self.mix == "emo1" else cost / (nll + TINY)
        return found if self.largest_ratio is None else found.clamp(max=self.largest_ratio)

    def _rows(self, head: Head, p_weight: Tensor | None) -> Tensor:
        if (p_weight is None) != (self.cost == "current"):
            raise TypeError(f"cost={self.cost!r} takes {'a' if p_weight is None else 'no'} p_weight")
        return head.weight if p_weight is None else as_head(p_weight, "p_weight").weight


@torch.no_grad()
def unit_rows(weight: Tensor) -> Tensor:
    """Each row at length 1, float32 at least; a row of zeros stays, at cost 1 from all others."""
    return normalize(weight.to(torch.promote_types(weight.dtype, torch.float32)), dim=-1)


class _Mixture:
    """The loss of each row, of a model's logits, and what it is mixed of."""

    outputs = 1

    def __init__(self, method: EMO, labels: Tensor, points: Tensor):
        self.method, self.labels, self.points = method, labels, points

    def __call__(
        self,
        logits: Sequence[Tensor],
        chunk: slice,
        wants: Sequence[bool],
        upstream: tuple[Tensor, ...] | None,
    ) -> Chunk:
        (z,), label = logits, self.labels[chunk].unsqueeze(-1)
        q, nll = _softmax(z, label)
        costs = self._costs(label).to(z.dtype)
        cost, q_label = torch.linalg.vecdot(q, costs), q.gather(-1, label).squeeze(-1)
        of_nll, of_cost = self._weights(nll, cost, q_label)
        shown = cost + q_label if self.method.adaptive else cost
        values = (of_nll * nll + of_cost * shown, nll, cost)
        if not any(wants):
            return Chunk(values, (None,))
        if upstream is not None:
            of_nll, of_cost = (w * upstream[0].to(z.dtype) for w in (of_nll, of_cost))
        slope = costs.sub_(cost.unsqueeze(-1)).mul_(of_cost.unsqueeze(-1)).add_(of_nll.unsqueeze(-1)).mul_(q)
        # 1 - q(y) from nll: emo2 may divide by nll, which would make rounding errors of 1 - 1 large.
        own = of_nll * torch.expm1(-nll) - of_cost * q_label * cost
        return Chunk(values, (slope.scatter_(-1, label, own.unsqueeze(-1)),))

    def _weights(self, nll: Tensor, cost: Tensor, q_label: Tensor) -> tuple[Tensor, Tensor]:
        """Of nll and of the transport, [rows] each."""
        ratio = self.method.ratio(nll, cost, q_label)
        if self.method.mix == "emo1":
            return torch.full_like(ratio, 0.5), 0.5 * ratio
        return ratio, torch.ones_like(ratio)

    def _costs(self, label: Tensor) -> Tensor:
        """c(y, v), [rows, V]; never below 0, and 0 at y itself, which rounding would not tell."""
        cosines = self.points[label.squeeze(-1)] @ self.points.T
        return cosines.neg_().add_(1.0).clamp_(min=0.0).scatter_(-1, label, 0.0)


def _softmax(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities in the place of the logits, -log of the label's [rows], exact where it is near 0)"""
    top = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, label) - top
    powers = logits.sub_(top).exp_()
    total = powers.sum(-1, keepdim=True, dtype=torch.float64)
    nll = (total.log() - chosen).to(logits.dtype).squeeze(-1)
    return powers.div_(total.to(logits.dtype)), nll
