"""f-EBM: an unnormalised model trained by any f-divergence, with a critic that never sees the normaliser.

Yu, Song, Song and Ermon, "Training Deep Energy-Based Models with f-Divergence Minimization", arXiv
2003.03463.

    min over E, max over H:  V = E_data f'(u) - E_model F(u),   u = e^(H + E),  F = u f'(u) - f(u)
    gradient in E: E_data grad f'(u) - E_model grad F + Cov_model(F, grad E)

The best critic is H = log p + log Z, for which H + E is the log-ratio of data and model, and V is D_f(p,
model): here f' = `phi` and F = -`psi` of the divergence. Model samples are of Langevin chains that go on from
step to step.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import derivative
from fdiv.divergences.kl import KL
from fdiv.methods._method import Consumes, Out
from fdiv.methods.energy import _noise


class Critic(nn.Module):
    """H [N]: minus a second energy of the model's architecture, whose last layer starts at 0.

    With the model's own weights H + E would be 0, both sides would get the same gradient, and it would stay
    0.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.energy = deepcopy(network).requires_grad_(True)
        for weight in self.energy.head.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return -_noise.energy_of(self.energy, x)


@dataclass(frozen=True)
class FEBM:
    """One step of the critic, and every `every` steps one of the model at the same time.

    clip: beyond log u = +-clip f' and F go on linearly, None is without; the authors clip the exponents at 5,
    in one dimension at 3 to 6. chains: model samples; after each step they take `steps` Langevin steps
    x <- x - step_size/2 grad E + sqrt(step_size) noise. First a share `jump` of them is offered a point of a
    Gaussian fitted to the data, with `widen` times its deviations, which Metropolis and Hastings accept or
    not: in few dimensions they mix by that.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "network", "module", "memory", "step")
    unit: ClassVar[str] = "batch"  # a covariance is of all samples
    alternating: ClassVar[bool] = True

    divergence: FDivergence = field(default_factory=KL)
    clip: float | None = 5.0
    every: int = 4
    chains: int = 512
    steps: int = 5
    step_size: float = 0.02
    jump: float = 1.0
    widen: float = 1.5

    def __post_init__(self):
        require_f_divergence(self.divergence, "FEBM")
        if not self.divergence.is_smooth:
            raise ValueError(
                f"{self.divergence!r} has a kink, where a critic gets no gradient; write JS(0.5)"
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip is finite and > 0, or None, got {self.clip!r}")
        if not (isinstance(self.chains, int) and self.chains >= 2):
            raise ValueError(f"chains is a number of at least 2, got {self.chains!r}")
        for name in ("every", "steps"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"{name} is a number of at least 1, got {getattr(self, name)!r}")
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size is finite and > 0, got {self.step_size!r}")
        if not 0 <= self.jump <= 1:
            raise ValueError(f"jump is a share of the chains, in [0, 1], got {self.jump!r}")
        _noise.check(None, self.widen)

    def beside(self, network: Any, p_network: Any = None) -> Critic:
        return Critic(network)

    def initial_memory(self, data: Any, reference: Any = None) -> dict[str, Tensor]:
        noise = _noise.fitted(data.inputs, None, self.widen)
        generator = torch.Generator().manual_seed(0)
        return noise | {"chains": _noise.drawn(noise, self.chains, data.inputs, generator)}

    def remember(self, memory: dict[str, Tensor], *, network: Any, **_: Any) -> None:
        """After a step: the chains go on, under the model that the next one starts from."""
        start = memory["chains"]
        offered = torch.rand(len(start)) < self.jump
        if bool(offered.any()):
            start = jumped(network, memory, start, offered.to(start.device))
        memory["chains"].copy_(langevin(network, start, self.steps, self.step_size))

    def __call__(
        self,
        *,
        inputs: Tensor,
        network: Any,
        module: Any,
        memory: dict[str, Tensor],
        step: int = 0,
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...], B > 0. The loss's value is V, of which the critic's part is ascended.

        metrics: `divergence` is V, `log ratio` the mean of log u over the data.
        """
        if not len(inputs):
            raise ValueError("f-EBM's data term is a mean over the batch, and the batch is empty")
        chains = memory["chains"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and step % self.every == self.every - 1):
            energy_p, energy_q = (_noise.energy_of(network, x) for x in (inputs, chains))
        return self.minimax(energy_p, module(inputs), energy_q, module(chains))

    def minimax(self, energy_p: Tensor, critic_p: Tensor, energy_q: Tensor, critic_q: Tensor) -> Out:
        """The loss from energies E and critics H at data [B] and at model samples [N]."""
        ours = self._value(critic_p.detach() + energy_p, critic_q.detach() + energy_q)
        theirs = self._value(critic_p + energy_p.detach(), critic_q + energy_q.detach())
        price = self._price(critic_q + energy_q).detach()
        # As q moves with E, its mean of F does by -Cov(F, grad E); n - 1 makes that unbiased.
        moved = ((price - price.mean()) * energy_q).sum() / (len(energy_q) - 1)
        value = theirs.detach()
        metrics = {"divergence": value, "log ratio": (critic_p + energy_p).detach().mean()}
        return Out(ours - theirs + moved - moved.detach() + value, metrics)

    def _value(self, log_ratio_p: Tensor, log_ratio_q: Tensor) -> Tensor:
        return self._held(self.divergence.phi, log_ratio_p).mean() - self._price(log_ratio_q).mean()

    def _price(self, log_ratio: Tensor) -> Tensor:
        """F(u)."""
        return -self._held(self.divergence.psi, log_ratio)

    def _held(self, function: Callable[[Tensor], Tensor], log_ratio: Tensor) -> Tensor:
        """The function of log u, linear beyond +-clip."""
        if self.clip is None:
            return function(log_ratio)
        inside = log_ratio.clamp(-self.clip, self.clip)
        slope = derivative(function, inside.detach())
        return function(inside) + slope * (log_ratio - inside)


def langevin(network: Any, x: Tensor, steps: int, step_size: float) -> Tensor:
    """x [N, ...] after unadjusted Langevin steps under e^-E, by torch's global generator."""
    for _ in range(steps):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(_noise.energy_of(network, x).sum(), x)
        noise = torch.randn(x.shape).to(x)
        x = x.detach() - step_size / 2 * slope + math.sqrt(step_size) * noise
    return x


@torch.no_grad()
def jumped(network: Any, memory: dict[str, Tensor], x: Tensor, offered: Tensor) -> Tensor:
    """x [N, ...]; those offered [N] are moved to noise where Metropolis and Hastings accept it."""
    fresh = _noise.drawn(memory, len(x), x)

    def log_weight(x: Tensor) -> Tensor:
        return -_noise.energy_of(network, x) - _noise.log_density(memory, x)

    accepted = torch.rand(len(x)).to(x).log() < log_weight(fresh) - log_weight(x)
    return torch.where((accepted & offered).reshape(-1, *[1] * (x.ndim - 1)), fresh, x)
