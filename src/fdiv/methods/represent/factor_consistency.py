"""Factor consistency: a network that weighs its inputs as other networks of the domain do.

Wu, Li, Tao, Xing and Yuan, "Primary and Secondary Factor Consistency as Domain Knowledge to Guide Happiness
Computing in Online Assessment", arXiv 2402.12398.

    L = cross-entropy + lambda KL(I*, I),   I_j = E_x |a_j(x)| / sum over factors of the same

a_j(x) is what factor j, a number of the input, adds to the score of x's class, and I the network's law of
importance. I* is the mean of the laws of trained networks. Ours, where the abstract says "additive factor
attributions": gradient times input, a_j = x_j d s_y / d x_j, which can be differentiated again, of the score
of the example's own class less the mean score, s_y = z_y - mean_k z_k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out

CHUNK = 1024  # examples of the training set that are looked at together


@dataclass(frozen=True)
class FactorConsistency:
    """Cross-entropy plus weight D(I*, I), I of the batch; weight 0 is cross-entropy with the laws measured.

    floor: added to every factor's mean attribution before normalising, so that laws have no zeros.
    law: I* itself, known from elsewhere, one number a factor; () measures that of the reference.
    Costs a second backward pass. The network is read as it is, in one pass: under dropout its law is noisy.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "labels", "network", "memory")
    unit: ClassVar[str] = "batch"  # the law is that of the whole batch

    divergence: Divergence = field(default_factory=KL)
    weight: float = 1.0
    floor: float = 1e-8
    law: tuple[float, ...] = ()

    def __post_init__(self):
        Exact().check(self.divergence)
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight is finite and >= 0, got {self.weight!r}")
        if not (self.floor > 0 and math.isfinite(self.floor)):
            raise ValueError(f"floor is finite and > 0, got {self.floor!r}")
        wrong = any(not (part >= 0 and math.isfinite(part)) for part in self.law)
        if wrong or (self.law and not sum(self.law) > 0):
            raise ValueError(f"law is finite, >= 0 and somewhere > 0, got {self.law}")

    def initial_memory(
        self, data: Any, reference: nn.Module | Sequence[nn.Module] | None
    ) -> dict[str, Tensor]:
        """{"log_law": log I* [factors]}: the mean law of the references, over the training set."""
        if self.law:
            log_law = log_normalised(torch.tensor(self.law), self.floor)
        elif reference is None:
            raise ValueError("without a reference nothing says what matters: name one, or write law=(...)")
        else:
            networks = [reference] if isinstance(reference, nn.Module) else list(reference)
            laws = [self.measure(network, data.inputs, data.labels) for network in networks]
            log_law = torch.stack(laws).logsumexp(0) - math.log(len(laws))
        return {"log_law": log_law}

    @torch.enable_grad()
    def measure(self, network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """log I of a trained network over all the examples, in eval() mode; [factors], no gradient."""
        training = network.training
        network.eval()
        total = torch.zeros(inputs[0].numel(), dtype=inputs.dtype, device=inputs.device)
        for some, own in zip(inputs.split(CHUNK), labels.split(CHUNK), strict=True):
            some = some.detach().requires_grad_()
            total += attributions(network(some), some, own).abs().sum(0)
        network.train(training)
        return log_normalised(total / len(inputs), self.floor)

    @torch.enable_grad()  # the law needs a gradient by the input where the loss is only looked at, too
    def __call__(
        self,
        *,
        inputs: Tensor,
        labels: Tensor,
        network: nn.Module,
        memory: dict[str, Tensor],
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...] and labels [B] of the whole global batch.

        metrics: cross-entropy, divergence, and Kendall's tau of the factors' order in both laws.
        """
        if count is not None and float(count) != len(inputs):
            raise ValueError(
                f"the law of importance is one of the whole batch: got {len(inputs)} examples of "
                f"{float(count):g}; leave micro_batch out"
            )
        inputs = inputs.detach().requires_grad_()
        logits = network(inputs)
        if not len(inputs):
            return Out(logits.sum(), {})
        log_target = memory["log_law"].to(logits)
        mean = attributions(logits, inputs, labels, again=True).abs().mean(0)
        if mean.shape != log_target.shape:
            raise ValueError(f"the law has {len(log_target)} factors and an input {len(mean)}")
        log_law = log_normalised(mean, self.floor)
        task, value = cross_entropy(logits, labels), self.divergence(log_target, log_law)
        with torch.no_grad():
            metrics = {
                "cross_entropy": task.detach(),
                "divergence": value.detach(),
                "rank_agreement": kendall(log_target, log_law),
            }
        return Out(task + self.weight * value, metrics)


def attributions(logits: Tensor, inputs: Tensor, labels: Tensor, again: bool = False) -> Tensor:
    """x_j d(z_y - mean_k z_k)/dx_j, [B, factors]; `again`: with a graph, to be differentiated once more."""
    score = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.mean(-1)
    (slope,) = torch.autograd.grad(score.sum(), inputs, create_graph=again)
    return (slope * (inputs if again else inputs.detach())).flatten(1)


def log_normalised(mean: Tensor, floor: float) -> Tensor:
    """log of (mean + floor) over its sum."""
    mean = mean + floor
    return mean.log() - mean.sum().log()


def kendall(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's tau-b of two vectors: 1 where they order alike, -1 in reverse, 0 without an order."""
    signs = [(x.unsqueeze(0) - x.unsqueeze(1)).sign() for x in (a.double(), b.double())]
    pairs = [(s * s).sum() for s in signs]
    return (signs[0] * signs[1]).sum() / (pairs[0] * pairs[1]).sqrt().clamp(min=1)
