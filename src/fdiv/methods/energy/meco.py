"""MECO: maximum likelihood of an unnormalised model, its normaliser followed by a running estimate.

Jiang, Qin, Wu, Chen, Yang and Zhang, "Learning Unnormalized Statistical Models via Compositional
Optimization", arXiv 2306.07485.

    L = E_data E + log g,   g = E_noise [w],  w = e^-E / q_noise;   g_t its mean over a batch
    gradient = E_data grad E - mean [w grad E] / u
    "average": u <- (1 - beta) u + beta g_t(theta_t)
    "storm":   u <- (1 - beta) (u + g_t(theta_t) - g_t(theta_t-1)) + beta g_t(theta_t), on the same noise

The logarithm of one batch's mean is biased, that of u less and less. Momentum of the gradient, which the
paper has too, is AdamW's.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out
from fdiv.methods.energy import _noise

ESTIMATORS = ("average", "storm")
BEFORE, NOW = "before.", "now."  # of the weights that STORM remembers


@dataclass(frozen=True)
class MECO:
    """The negative log-likelihood with u for the normaliser.

    estimator: "storm" remembers the weights of the step before; its u is at least beta g_t, where the
    difference would make it smaller or negative. beta: 1 is a new estimate at every step, whose gradient is
    biased. samples: noise a step; noise, widen: as in NCE.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "network", "memory", "state")
    unit: ClassVar[str] = "batch"  # u is one number of a step
    divergence: ClassVar[Divergence] = KL()

    estimator: Literal["average", "storm"] = "storm"
    beta: float = 0.1
    samples: int = 512
    noise: tuple[float, float] | None = None
    widen: float = 1.5

    def __post_init__(self):
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator is 'average' or 'storm', got {self.estimator!r}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta is in (0, 1], got {self.beta!r}")
        if not (isinstance(self.samples, int) and self.samples >= 1):
            raise ValueError(f"samples is a number of at least 1, got {self.samples!r}")
        _noise.check(self.noise, self.widen)

    def initial_memory(self, data: Any, reference: Any = None) -> dict[str, Tensor]:
        return _noise.fitted(data.inputs, self.noise, self.widen)

    def initial_state(self) -> dict[str, float]:
        return {"log u": math.nan}

    def advance(
        self, state: dict[str, float], metrics: dict[str, float], progress: float
    ) -> dict[str, float]:
        return {"log u": metrics["log u"]}

    def remember(self, memory: dict[str, Tensor], *, network: Any, **_: Any) -> None:
        """After a step: the weights that the next one starts from, and those of this one."""
        if self.estimator != "storm":
            return
        for name, weight in network.named_parameters():
            if NOW + name in memory:
                memory[BEFORE + name] = memory[NOW + name]
            memory[NOW + name] = weight.detach().clone()

    def __call__(
        self,
        *,
        inputs: Tensor,
        network: Any,
        memory: dict[str, Tensor],
        state: dict[str, float],
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...], B > 0; noise comes from torch's global generator. metrics: `log u`.

        The loss's value is E_data E + log u.
        """
        if not len(inputs):
            raise ValueError("MECO's data term is a mean over the batch, and the batch is empty")
        noise = _noise.drawn(memory, self.samples, inputs)
        log_weight = self.log_weight(network, memory, noise)
        log_u = self._followed(state["log u"], log_weight.detach(), network, memory, noise)
        normaliser = (log_weight - log_u).exp().mean()
        value = log_u - normaliser.detach()
        loss = _noise.energy_of(network, inputs).mean() + normaliser + value
        return Out(loss, {"log u": log_u})

    def log_weight(self, network: Any, memory: dict[str, Tensor], x: Tensor) -> Tensor:
        """log w [N] at x [N, ...]."""
        return -_noise.energy_of(network, x) - _noise.log_density(memory, x)

    def _followed(
        self, before: float, log_weight: Tensor, network: Any, memory: dict[str, Tensor], noise: Tensor
    ) -> Tensor:
        """log u after this step's noise."""
        log_g = log_mean(log_weight)
        if math.isnan(before):
            return log_g
        log_kept = torch.as_tensor(before).to(log_g)
        old = {k.removeprefix(BEFORE): v for k, v in memory.items() if k.startswith(BEFORE)}
        if self.estimator == "storm" and old:
            with torch.no_grad():
                then = self.log_weight(lambda x: functional_call(network, old, (x,)), memory, noise)
            log_kept = log_less(torch.logaddexp(log_kept, log_g), log_mean(then))
        if self.beta == 1:
            return log_g
        return torch.logaddexp(math.log1p(-self.beta) + log_kept, math.log(self.beta) + log_g)


def log_mean(log_weight: Tensor) -> Tensor:
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def log_less(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a - e^b), -inf where that is not positive."""
    return torch.where(b < a, a + torch.log1p(-(b - a).clamp(max=0.0).exp()), -math.inf)
