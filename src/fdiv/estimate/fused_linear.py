"""Both heads are known: the divergence and its gradient without ever holding rows x vocabulary."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.estimate._estimator import Guarantee, Sees
from fdiv.estimate._heads import Head, as_head
from fdiv.estimate._mask import among_zeros, kept_rows
from fdiv.estimate._programs import Dense, Truncated
from fdiv.estimate._stream import Program, stream
from fdiv.estimate.exact import Exact
from fdiv.estimate.sampled_logits import SampledLogits
from fdiv.estimate.top_k import Captured, TopK
from fdiv.kernels.worth import is_worth_compiling


class Measured(NamedTuple):
    """The value with what the same pass over the logits shows; each [rows], the entropies in nats."""

    value: Tensor
    p_entropy: Tensor
    q_entropy: Tensor


@dataclass(frozen=True)
class FusedLinear:
    """D(softmax(p_hidden p_weight'), softmax(q_hidden q_weight')) a row, never holding rows x vocab.

    Shapes: p_hidden [rows, P], p_weight [vocab, P], q_hidden [rows, Q], q_weight [vocab, Q] -> [rows]; the
    two widths may differ, and a weight may be a `Head` (bias, logit scale, soft-cap, temperature, a
    vocabulary split over ranks). Logits and divergence are float32, or float64 for float64 inputs.
    Near p = q value and gradient keep their digits; at p = q both are exactly 0.

    chunk: rows of logits held at one time; None chooses by vocabulary and device.
    of: what is computed of the logits: Exact(), TopK(k) or SampledLogits(n).
    gradient: "forward" takes it while the logits are there, and makes them again only where a trained head
    meets rows of unequal weight; "recompute" always makes them again, and holds no gradient in between.
    compiled: torch.compile, or a Triton kernel on CUDA, for the elementwise half; None: where it pays.

    A row whose value is +inf (mass where the other model has none, under a divergence that forbids it) has
    gradient 0. There are no second derivatives: use Exact() for those.
    """

    sees: ClassVar[Sees] = "heads"
    evidence = ("p_hidden", "p_weight", "q_hidden", "q_weight")

    chunk: int | None = None
    of: Exact | TopK | SampledLogits = field(default_factory=Exact)
    gradient: Literal["forward", "recompute"] = "forward"
    compiled: bool | None = None

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"FusedLinear(chunk) is a number of rows >= 1 or None, got {self.chunk!r}")
        if not isinstance(self.of, Exact | TopK | SampledLogits):
            raise TypeError(f"FusedLinear(of=) takes Exact(), TopK(k) or SampledLogits(n), got {self.of!r}")
        if self.gradient not in ("forward", "recompute"):
            raise ValueError(f"gradient is 'forward' or 'recompute', got {self.gradient!r}")

    @property
    def guarantee(self) -> Guarantee:
        return self.of.guarantee

    def check(self, divergence: object) -> None:
        require_f_divergence(divergence, "FusedLinear()")

    def __call__(
        self,
        divergence: FDivergence,
        p_hidden: Tensor,
        p_weight: Tensor | Head,
        q_hidden: Tensor,
        q_weight: Tensor | Head,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[rows]; where `mask` [rows] is false nothing is computed and the value is 0."""
        return self._stream(divergence, p_hidden, p_weight, q_hidden, q_weight, mask)[0]

    def measured(
        self,
        divergence: FDivergence,
        p_hidden: Tensor,
        p_weight: Tensor | Head,
        q_hidden: Tensor,
        q_weight: Tensor | Head,
        mask: Tensor | None = None,
    ) -> Measured | Captured:
        """The value with what the same logits show: both entropies, or with TopK the captured masses."""
        if isinstance(self.of, SampledLogits):
            raise TypeError("SampledLogits() measures nothing beside the value; write of=Exact() or TopK(k)")
        kind = Captured if isinstance(self.of, TopK) else Measured
        return kind(*self._stream(divergence, p_hidden, p_weight, q_hidden, q_weight, mask, measured=True))

    def _stream(self, divergence, p_hidden, p_weight, q_hidden, q_weight, mask, measured: bool = False):
        self.check(divergence)
        p_head, q_head = as_head(p_weight, "p_weight"), as_head(q_weight, "q_weight")
        _check(p_hidden, p_head, q_hidden, q_head)
        rows, kept = len(q_hidden), kept_rows(mask, len(q_hidden))
        if kept is not None:
            p_hidden, q_hidden = p_hidden[kept], q_hidden[kept]
        values = stream(
            self._program(divergence, q_hidden, q_head, measured),
            [(p_hidden, p_head), (q_hidden, q_head)],
            chunk=self.chunk,
            early=self.gradient == "forward",
        )
        return [among_zeros(value, kept, rows) for value in values]

    def _program(self, divergence: FDivergence, hidden: Tensor, head: Head, measured: bool) -> Program:
        if isinstance(self.of, Exact):
            compiled = is_worth_compiling(self.compiled, len(hidden) * len(head.weight))
            return Dense(divergence, head.group, measured, compiled)
        if head.group is not None:
            raise TypeError(f"a vocabulary split over ranks is read whole: write of=Exact(), not {self.of!r}")
        return Truncated(divergence, self.of)


def _check(p_hidden: Tensor, p_head: Head, q_hidden: Tensor, q_head: Head) -> None:
    if p_hidden.ndim != 2 or q_hidden.ndim != 2 or len(p_hidden) != len(q_hidden):
        raise ValueError(
            f"hidden states are [rows, width] with one row count, got {tuple(p_hidden.shape)} and "
            f"{tuple(q_hidden.shape)}; flatten batch and tokens, as hidden.flatten(0, 1), and pass mask="
        )
    for who, hidden, head in (("p", p_hidden, p_head), ("q", q_hidden, q_head)):
        if hidden.shape[-1] != head.weight.shape[-1]:
            raise ValueError(
                f"{who}_hidden {tuple(hidden.shape)} and {who}_weight {tuple(head.weight.shape)} differ in "
                "width"
            )
    if len(p_head.weight) != len(q_head.weight):
        raise ValueError(
            f"the heads have {len(p_head.weight)} and {len(q_head.weight)} rows; slice padded heads to the "
            "tokenizer's size, as weight[:size]"
        )
    if p_head.group is not q_head.group:
        raise ValueError("both heads are split over one group of ranks, or neither is")
