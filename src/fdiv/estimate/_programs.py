"""What the fused estimators compute of a chunk of logits; see `_stream`."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv.estimate._stream import Chunk
from fdiv.estimate.sampled_logits import SampledLogits
from fdiv.estimate.top_k import TopK
from fdiv.kernels.log_prob import log_prob, log_prob_slope, moments, push_down
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
        self.everything = False  # whether all atoms are chosen
        self.choices: dict[int, tuple] = {}  # of each chunk: a second pass meets the same atoms

    def __call__(
        self,
        logits: Sequence[Tensor],
        chunk: slice,
        wants: Sequence[bool],
        upstream: tuple[Tensor, ...] | None,
    ) -> Chunk:
        p_log_density, q_log_density = (z - normaliser(z).to(z.dtype) for z in logits)
        self.everything = isinstance(self.of, TopK) and self.of.k >= logits[0].shape[-1]
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
        if self.everything:  # the order of the atoms does not matter, and there is no tail
            return self.of.captured(self.divergence, log_p, log_q)
        return self.of.chosen(self.divergence, log_p, log_q, log_weight_or_surplus)


class Atoms:
    """The divergence over atoms of which the teacher's side is known, of a student's logits."""

    outputs = 1

    def __init__(
        self,
        divergence: FDivergence,
        of: TopK | SampledLogits,
        compiled: bool,
        index: Tensor,
        *evidence: Tensor,
    ):
        self.divergence, self.of, self.compiled = divergence, of, compiled
        self.index, self.evidence = index, evidence

    def __call__(
        self,
        logits: Sequence[Tensor],
        chunk: slice,
        wants: Sequence[bool],
        upstream: tuple[Tensor, ...] | None,
    ) -> Chunk:
        (z,) = logits
        index, evidence = self.index[chunk], [t[chunk] for t in self.evidence]
        found = moments(z, self.compiled)
        atoms = z.gather(-1, index) - found.lse.to(z.dtype).unsqueeze(-1)
        values, (slope,) = _of_atoms(self._values, [atoms], evidence, wants, upstream)
        if slope is None:
            return Chunk(values, (None,))
        push_down(z, found, slope.sum(-1), torch.zeros_like(z[:, 0]), self.compiled)
        return Chunk(values, (z.scatter_add_(-1, index, slope),))

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
        found = moments(z, self.compiled, self.group)
        if upstream is None:
            chosen = log_prob(z, index, found.lse, self.group)
            return Chunk((chosen, found.entropy.to(z.dtype)), (None,))
        slope = log_prob_slope(z, index, found, upstream, self.compiled, self.group)
        return Chunk((), (slope,))


class RowLoss:
    """A function of the log-probability and the entropy of each row, of a model's logits."""

    outputs = 1

    def __init__(self, function, evidence: tuple[Tensor, ...], log_probs: LogProb):
        self.function, self.evidence, self.log_probs = function, evidence, log_probs

    def __call__(
        self,
        logits: Sequence[Tensor],
        chunk: slice,
        wants: Sequence[bool],
        upstream: tuple[Tensor, ...] | None,
    ) -> Chunk:
        (z,), given = logits, self.log_probs
        index, group = given.index[chunk], given.group
        found = moments(z, given.compiled, group)
        seen = [log_prob(z, index, found.lse, group), found.entropy.to(z.dtype)]
        evidence = [t[chunk] for t in self.evidence]
        with torch.enable_grad():
            seen = [t.requires_grad_() for t in seen]
            loss = self.function(*seen, *evidence)
            weights = torch.ones_like(loss) if upstream is None else upstream[0].to(loss.dtype)
            slopes = torch.autograd.grad(loss, seen, weights, allow_unused=True, materialize_grads=True)
        if not any(wants):
            return Chunk((loss.detach(),), (None,))
        slope = log_prob_slope(z, index, found, slopes, given.compiled, group)
        return Chunk((loss.detach(),), (slope,))


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
