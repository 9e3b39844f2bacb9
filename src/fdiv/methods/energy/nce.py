"""NCE: an unnormalised model learnt by telling data from noise.

Gutmann and Hyvaerinen, "Noise-Contrastive Estimation of Unnormalized Statistical Models, with Applications to
Natural Image Statistics", Journal of Machine Learning Research 13 (2012).

    L = E_data softplus(-G) + ratio E_noise softplus(G),   G = -E - log q_noise - log ratio

The optimum is E = -log p itself: its constant is learnt with it, by the bias of the network's last layer. As
ratio grows the gradient tends to that of maximum likelihood.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import softplus

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.energy import _noise


@dataclass(frozen=True)
class NCE:
    """Logistic regression between data and `ratio` noise samples to each.

    noise: (mean, deviation) of every coordinate, or None: a Gaussian fitted to the training inputs, whose
    deviations are `widen` times theirs. divergence: that of its limit for many noise samples.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "network", "memory")
    divergence: ClassVar[Divergence] = KL()

    ratio: int = 1
    noise: tuple[float, float] | None = None
    widen: float = 1.5

    def __post_init__(self):
        if not (isinstance(self.ratio, int) and self.ratio >= 1):
            raise ValueError(f"ratio is a number of noise samples to one of data, got {self.ratio!r}")
        _noise.check(self.noise, self.widen)

    def initial_memory(self, data: Any, reference: Any = None) -> dict[str, Tensor]:
        return _noise.fitted(data.inputs, self.noise, self.widen)

    def __call__(
        self,
        *,
        inputs: Tensor,
        network: Any,
        memory: dict[str, Tensor],
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...]; noise is by torch's global generator. metrics: `accuracy` of both classes."""
        noise = _noise.drawn(memory, self.ratio * len(inputs), inputs)
        data_logit, noise_logit = self.logit(network, memory, inputs), self.logit(network, memory, noise)
        rows = softplus(-data_logit) + softplus(noise_logit).reshape(len(inputs), self.ratio).sum(-1)
        right = (data_logit > 0).double().mean() + (noise_logit <= 0).double().mean()
        return Out(mean_over_tokens(rows, count=count), {"accuracy": right / 2} if len(inputs) else {})

    def logit(self, network: Any, memory: dict[str, Tensor], x: Tensor) -> Tensor:
        """G [N]: that x [N, ...] is data."""
        return -_noise.energy_of(network, x) - _noise.log_density(memory, x) - math.log(self.ratio)
