"""What the fused estimators compute of a chunk of logits; see `_stream`."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.estimate._stream import Chunk
from fdiv.estimate.sampled_logits import SampledLogits
from fdiv.estimate.top_k import TopK
from fdiv.kernels.log_prob import log_prob_and_entropy, log_prob_slope
from fdiv.kernels.rows import Wants, normaliser, rows


class Dense:
    """The divergence over the whole vocabulary, of a teacher's and a student's logits."""

    outputs = 1

    def __init__(
        self,
        divergence: FDivergence,
        group: dist.ProcessGroup | None,
        entropies: bool,
        compiled: bool,
    ):
        self.divergence, self.group = divergence, group
        self.entropies, self.compiled = entropies, compiled

    def __call__(
        self,
        logits: Sequence[Tensor],
        chunk: slice,
        wants: Sequence[bool],
        upstream: tuple[Tensor, ...] | None,
    ) -> Chunk:
        (p_logits, q_logits), (of_p, of_q) = logits, wants
        done = rows(
            self.divergence,
            p_logits,
            q_logits,
            Wants(of_p, of_q, self.entropies),
            upstream=None if upstream is None else upstream[0],
            compiled=self.compiled,
            group=self.group,
        )
        entropies = (h for h in (done.p_entropy, done.q_entropy) if h is not None)
        return Chunk((done.value, *entropies), (done.p_slope, done.q_slope))


class Truncated:
    """The divergence over a few atoms that are chosen from both models' logits, by TopK or SampledLogits.

    values: with TopK the masses captured of p and q follow the value.
    """

    outputs = 1

    def __init__(self, divergence: FDivergence, of: TopK | SampledLogits):
        self.divergence, self.of = divergence, of
        self.choices: dict[int, tuple] = {}  # of each chunk: a second pass meets the same atoms

    def __call__(
        self,
        logits: Sequence[Tensor],
        chunk: slice,
        wants: Sequence[bool],
        upstream: tuple[Tensor, ...] | None,
    ) -> Chunk:
        p_log_density, q_log_density = (z - normaliser(z).to(z.dtype) for z in logits)
        if chunk.start not in self.choices:
            self.choices[chunk.start] = self._choose(p_log_density, q_log_density)
        index, *others = self.choices[chunk.start]
        atoms = [t.gather(-1, index) for t in (p_log_density, q_log_density)]
        values, slopes = _of_atoms(self._values, atoms, others, wants, upstream)
        densities = (p_log_density, q_log_density)
        return Chunk(values, tuple(
            None if slope is None else _spread(slope, index, density.exp_())
            for slope, density in zip(slopes, densities, strict=True)
        ))  # fmt: skip

    def _choose(self, log_p: Tensor, log_q: Tensor) -> tuple:
        return self.of.choose(log_p, log_q) if isinstance(self.of, TopK) else self.of.draw(log_p, log_q)

    def _values(self, log_p: Tensor, log_q: Tensor, log_weight_or_surplus: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.of, SampledLogits):
            return (self.of.atoms(self.divergence, log_p, log_q, log_weight_or_surplus),)
        return self.of.chosen(self.divergence, log_p, log_q, log_weight_or_surplus)


class Atoms:
    """The divergence over atoms of which the teacher's side is known, of a student's logits."""

    outputs = 1

    def __init__(self, divergence: FDivergence, of: TopK | SampledLogits, index: Tensor, *evidence: Tensor):
        self.divergence, self.of, self.index, self.evidence = divergence, of, index, evidence

    def __call__(
        self,
        logits: Sequence[Tensor],
        chunk: slice,
        wants: Sequence[bool],
        upstream: tuple[Tensor, ...] | None,
    ) -> Chunk:
        (z,) = logits
        index, evidence = self.index[chunk], [t[chunk] for t in self.evidence]
        lse = normaliser(z).to(z.dtype)
        values, (slope,) = _of_atoms(self._values, [z.gather(-1, index) - lse], evidence, wants, upstream)
        if slope is None:
            return Chunk(values, (None,))
        return Chunk(values, (_spread(slope, index, (z - lse).exp_()),))

    def _values(self, log_q: Tensor, log_p: Tensor, *log_weight: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.of, SampledLogits):
            return (self.of.atoms(self.divergence, log_p, log_q, *log_weight),)
        return self.of.chosen(self.divergence, log_p, log_q, log_p == -torch.inf)


class LogProb:
    """The log-probability of one token a row and the entropy, of a model's logits; both have gradients."""

    outputs = 2

    def __init__(self, index: Tensor, group: dist.ProcessGroup | None, compiled: bool):
        self.index, self.group, self.compiled = index, group, compiled

    def __call__(
        self,
        logits: Sequence[Tensor],
        chunk: slice,
        wants: Sequence[bool],
        upstream: tuple[Tensor, ...] | None,
    ) -> Chunk:
        (z,), index = logits, self.index[chunk]
        if upstream is None:
            return Chunk(log_prob_and_entropy(z, index, self.compiled, self.group), (None,))
        of_log_prob, of_entropy = upstream
        slope = log_prob_slope(z, index, of_log_prob, of_entropy, self.compiled, self.group)
        return Chunk((), (slope,))


def _of_atoms(function, atoms: list[Tensor], others, wants: Sequence[bool], upstream):
    """The values of `function(*atoms, *others)`, and of the first the gradients in the atoms [rows, k]."""
    if not any(wants):
        return function(*atoms, *others), [None] * len(atoms)
    with torch.enable_grad():
        atoms = [atom.detach().requires_grad_(want) for atom, want in zip(atoms, wants, strict=True)]
        values = function(*atoms, *others)
        weights = torch.ones_like(values[0]) if upstream is None else upstream[0].to(values[0].dtype)
        wanted = [atom for atom in atoms if atom.requires_grad]
        slopes = iter(torch.autograd.grad(values[0], wanted, weights))
    finite = values[0].isfinite().unsqueeze(-1)  # a row of value +inf has gradient 0
    found = [torch.where(finite, next(slopes), 0.0) if want else None for want in wants]
    return tuple(v.detach() for v in values), found


def _spread(slope: Tensor, index: Tensor, density: Tensor) -> Tensor:
    """From slopes in the log-densities of atoms to the gradient in all logits; `density` is used up."""
    return density.mul_(-slope.sum(-1, keepdim=True)).scatter_add_(-1, index, slope)
