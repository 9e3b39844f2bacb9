"""The teacher is known at a few atoms (a cache, a server), the student by its head."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.estimate._estimator import Guarantee, Sees
from fdiv.estimate._heads import Head, as_head
from fdiv.estimate._mask import among_zeros, kept_rows
from fdiv.estimate._programs import Atoms
from fdiv.estimate._stream import stream
from fdiv.estimate.sampled_logits import SampledLogits
from fdiv.estimate.top_k import Captured, TopK
from fdiv.kernels.worth import is_worth_compiling


@dataclass(frozen=True)
class FusedAtoms:
    """D over stored atoms of a teacher, never holding the student's rows x vocab.

    of: TopK(k), for the teacher's likeliest atoms, all others merged into a tail atom: a lower bound;
    SampledLogits(n), for atoms drawn from the teacher or a mixture, with the logs of their weights: unbiased.

    Shapes: index [rows, k] of token numbers, log_p [rows, k] the teacher's log-probabilities there (-inf in a
    place that holds no atom), log_weight [rows, n] with SampledLogits alone, q_hidden [rows, Q], q_weight
    [vocab, Q] or a `Head` -> [rows]. One product forward and two for the gradients, whatever the divergence.
    chunk, compiled: as in FusedLinear.
    """

    sees: ClassVar[Sees] = "heads"

    of: TopK | SampledLogits
    chunk: int | None = None
    compiled: bool | None = None

    def __post_init__(self):
        if not isinstance(self.of, TopK | SampledLogits):
            raise TypeError(f"FusedAtoms(of) is TopK(k) or SampledLogits(n), got {self.of!r}")
        if isinstance(self.of, TopK) and self.of.support != "teacher":
            raise ValueError(f"stored atoms are the teacher's; write TopK({self.of.k}), not {self.of!r}")
        if isinstance(self.of, SampledLogits) and self.of.proposal == "student":
            raise ValueError("stored atoms are not drawn from the student; write proposal='teacher'")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"FusedAtoms(chunk) is a number of rows >= 1 or None, got {self.chunk!r}")

    @property
    def evidence(self) -> tuple[str, ...]:
        weight = ("log_weight",) if isinstance(self.of, SampledLogits) else ()
        return ("index", "log_p", *weight, "q_hidden", "q_weight")

    @property
    def guarantee(self) -> Guarantee:
        return self.of.guarantee

    def check(self, divergence: object) -> None:
        require_f_divergence(divergence, "FusedAtoms()")

    def __call__(self, divergence: FDivergence, *evidence: Tensor, mask: Tensor | None = None) -> Tensor:
        """[rows]; where `mask` [rows] is false nothing is computed and the value is 0."""
        return self._stream(divergence, evidence, mask)[0]

    def captured(self, divergence: FDivergence, *evidence: Tensor, mask: Tensor | None = None) -> Captured:
        """The value with the masses that the stored atoms hold of either model; TopK alone."""
        if not isinstance(self.of, TopK):
            raise TypeError("only TopK(k) captures a mass; atoms of SampledLogits(n) are drawn")
        return Captured(*self._stream(divergence, evidence, mask))

    def _stream(self, divergence: FDivergence, evidence: tuple[Tensor, ...], mask: Tensor | None):
        self.check(divergence)
        if len(evidence) != len(self.evidence):
            raise TypeError(f"{self!r} reads {', '.join(self.evidence)}; got {len(evidence)} tensors")
        *stored, hidden, weight = evidence
        head = as_head(weight, "q_weight")
        _check(stored, hidden, head)
        rows, kept = len(hidden), kept_rows(mask, len(hidden))
        if kept is not None:
            stored, hidden = [t[kept] for t in stored], hidden[kept]
        compiled = is_worth_compiling(self.compiled, len(hidden) * len(head.weight))
        program = Atoms(divergence, self.of, compiled, *stored)
        values = stream(program, [(hidden, head)], chunk=self.chunk)
        return [among_zeros(value, kept, rows) for value in values]


def _check(stored: list[Tensor], hidden: Tensor, head: Head) -> None:
    shapes = [tuple(t.shape) for t in stored]
    if hidden.ndim != 2 or len(set(shapes)) != 1 or stored[0].ndim != 2 or len(stored[0]) != len(hidden):
        raise ValueError(
            f"stored atoms are [rows, k] each and q_hidden [rows, width]; got {shapes} and "
            f"{tuple(hidden.shape)}"
        )
    if hidden.shape[-1] != head.weight.shape[-1]:
        raise ValueError(
            f"q_hidden {tuple(hidden.shape)} and q_weight {tuple(head.weight.shape)} differ in width"
        )
    if stored[1].requires_grad:
        raise ValueError("stored atoms are constants and would get no gradient; write log_p.detach()")
    if head.group is not None:
        raise TypeError("stored atoms need the whole vocabulary on each rank; pass a Head without group")
