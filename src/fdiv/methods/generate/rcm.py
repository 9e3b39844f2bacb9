"""rCM: a consistency model that is regularised by the difference of two scores, of one to a few steps.

Zheng et al., "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency", arXiv
2510.08431; its first half is sCM, Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time
Consistency Models", arXiv 2410.11081.

    x_t = cos t x0 + sin t sigma_data noise,   f(x, t) = cos t x - sin t sigma_data F(x, t)
    g = -cos t sqrt(1 - rho^2 sin^2 t) (sigma_data F - dx/dt) - rho cos t sin t (x + sigma_data dF/dt)
    L = consistency |F - sg F - g / (|g| + 0.1)|^2 + dmd L_DMD(f)

dx/dt is the teacher's slope, dF/dt is taken along it, and rho grows from 0 to 1 over `warmup` steps. In the
words of EDM f is the student itself: f(x_t, t) = network(x_t / cos t, sigma_data tan t), and likewise the
teacher. g = 0 where f is the flow map. The DMD term is that of `FDistill` with ReverseKL(), on samples of the
student's own in one to len(times) + 1 steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fdiv._divergence import FDivergence
from fdiv.diffusion.edm import Denoiser, Preconditioning, denoised, guided, spread_to
from fdiv.divergences.kl import ReverseKL
from fdiv.methods._method import Out, mean_over_tokens
from fdiv.methods.generate._critic import Critic, Known, require_critic
from fdiv.methods.generate._one_step import (
    condition_of,
    generated,
    moves,
    noised,
    require_finite,
    require_plan,
    require_size,
    weights,
)
from fdiv.methods.generate._student import OneStep
from fdiv.methods.generate.f_distill import follow
from fdiv.methods.generate.levels import Levels, LogLogistic, LogNormal, drawn, require_levels

SOFTENING = 0.1  # of the tangent's norm


@dataclass(frozen=True)
class RCM(OneStep):
    """The student moves at every step of the warm-up, by consistency alone, then at the last of `every`.

    levels: of the consistency loss, whose x0 are data; dmd_levels: of the DMD term, and of the steps before
    it. dmd=0 is sCM: nothing is trained beside the student, which moves at every step. times: where `sample`
    goes on from after its first step, falling, in (0, pi/2); () for one step.
    """

    divergence: ClassVar[FDivergence] = ReverseKL()

    consistency: float = 100.0
    dmd: float = 1.0
    warmup: int = 1000
    every: int = 5
    sigma_data: float = 0.5
    sigma_init: float = 80.0
    times: tuple[float, ...] = (1.3, 1.0, 0.6)
    levels: Levels = LogNormal(-1.5, 1.6)
    dmd_levels: Levels = LogLogistic()
    critic: Critic | Known = Critic()
    guidance: float = 1.0

    def __post_init__(self):
        Preconditioning(self.sigma_data)  # checks it
        require_size("RCM", least=0.0, consistency=self.consistency, dmd=self.dmd, guidance=self.guidance)
        if not self.consistency + self.dmd:
            raise ValueError("RCM(consistency=0, dmd=0) trains nothing; leave one of them above 0")
        require_plan(self, self.every, self.warmup, self.sigma_init)
        if not all(1.57 > a > b > 0 for a, b in zip((1.5699, *self.times), self.times, strict=False)):
            raise ValueError(f"RCM(times) fall, in (0, pi/2), got {self.times!r}; write () for one step")
        for name in ("levels", "dmd_levels"):
            require_levels(getattr(self, name), f"RCM({name})")
        require_critic(self.critic, "RCM")

    def beside(self, network: Any, p_network: Any) -> nn.Module:
        return super().beside(network, p_network) if self.dmd else nn.Module()

    def sample(self, network: Any, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """The noise between steps follows from `noise`, by a generator that is seeded with its sum."""
        seed = int(noise.double().sum().view(torch.int64)) % 2**63
        generator = torch.Generator(noise.device).manual_seed(seed)
        x0 = generated(network, noise, self.sigma_init, condition)
        for time in self.times:
            sigma = self.sigma_data * torch.tensor(time, dtype=torch.float64).tan().item()
            fresh = torch.randn(noise.shape, dtype=noise.dtype, device=noise.device, generator=generator)
            x0 = generated(network, x0 / sigma + fresh, sigma, condition)
        return x0

    def __call__(
        self,
        *,
        inputs: Tensor,
        labels: Tensor,
        network: Any,
        p_network: Any,
        module: Any,
        step: int,
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...] are data, labels [B, ...] the condition of networks that read one."""
        condition, warm = condition_of(labels, network, p_network), step >= self.warmup
        learns = not warm or not self.dmd or moves(step, self.every, self.warmup)
        rows, metrics, told = inputs.new_zeros(len(inputs)), {}, guided(p_network, self.guidance)
        if learns and self.consistency:
            rho = min(1.0, step / self.warmup) if self.warmup else 1.0
            own, metrics = self._consistency(inputs, network, told, condition, rho)
            rows = self.consistency * own
        if self.dmd:
            with torch.set_grad_enabled(learns and warm and torch.is_grad_enabled()):
                made = self._simulated(network, inputs, condition)
            own, more = self.critic.rows(module, p_network, inputs, made, condition, self.dmd_levels)
            rows, metrics = rows + own, metrics | more
        if self.dmd and learns and warm:
            rows = rows + self.dmd * self._dmd(made, network, told, module, condition)
        return Out(mean_over_tokens(rows, count=count), metrics)

    def _simulated(self, network: Any, inputs: Tensor, condition: Any) -> Tensor:
        """The student's own samples in a random number of steps, of which the last alone has a gradient."""
        steps = int(torch.randint(len(self.times) + 1, ()))
        x = self.sigma_init * torch.randn_like(inputs)
        sigma = torch.full_like(inputs.flatten(1)[:, 0], self.sigma_init)
        for _ in range(steps):
            with torch.no_grad():
                x0 = denoised(network, x, sigma, condition)
            sigma = torch.minimum(drawn(self.dmd_levels, inputs).sigma, sigma)
            x = x0 + spread_to(sigma, x) * torch.randn_like(x)
        made = denoised(network, x, sigma, condition)
        require_finite(made, "samples of the student")
        return made

    def _consistency(
        self, inputs: Tensor, network: Any, p_network: Any, condition: Any, rho: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """|F - sg F - g/(|g| + 0.1)|^2 [B], at noised data."""
        t = (drawn(self.levels, inputs).sigma / self.sigma_data).atan()
        cos, sin = (spread_to(part, inputs) for part in (t.cos(), t.sin()))
        x = cos * inputs + sin * self.sigma_data * torch.randn_like(inputs)
        with torch.no_grad():
            slope = self.sigma_data * raw(p_network, self.sigma_data, condition)(x, t)
        here, tangent = tangent_of(
            raw(network, self.sigma_data, condition), x, t, slope, rho, self.sigma_data
        )
        norm = tangent.flatten(1).norm(dim=1)
        require_finite(norm, "tangents of the student")
        goal = here.detach() + tangent / (spread_to(norm, x) + SOFTENING)
        return (here - goal).flatten(1).square().sum(1), {"tangent_norm": norm.mean()}

    def _dmd(self, made: Tensor, network: Any, p_network: Any, module: Any, condition: Any) -> Tensor:
        """[B], summed over coordinates as the consistency loss is, and without the half of FDistill's."""
        level, fake = drawn(self.dmd_levels, made), self.critic.denoiser(module, network)
        x = noised(made, level)
        with torch.no_grad():
            teacher, student = (denoised(d, x, level.sigma, condition) for d in (p_network, fake))
            scale = weights("distance", made, teacher, level, self.dmd_levels, power=1)
        return 2 * follow(made, scale * (student - teacher)) * made[0].numel()


def raw(denoiser: Denoiser, sigma_data: float, condition: Any = None) -> Callable[[Tensor, Tensor], Tensor]:
    """F(x_t, t) of a denoiser: what its output is made of beside the skip, of variance 1."""

    def function(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = spread_to(t.cos(), x), spread_to(t.sin(), x)
        return (cos * x - denoised(denoiser, x / cos, sigma_data * t.tan(), condition)) / (sigma_data * sin)

    return function


def tangent_of(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    slope: Tensor,
    rho: float,
    sigma_data: float,
) -> tuple[Tensor, Tensor]:
    """(F, with its gradient in the weights; g, without) at x [B, ...] and t [B], dx/dt = slope.

    The derivative is taken along (cos t sin t slope, cos t sin t), which stays bounded as t nears pi/2.
    """
    cos, sin = spread_to(t.cos(), x), spread_to(t.sin(), x)
    along = cos * sin * slope, t.cos() * t.sin()
    here, change = torch.func.jvp(function, (x, t), along)[:2]
    with torch.no_grad():
        apart = cos * (1 - rho**2 * sin**2).sqrt() * (sigma_data * here - slope)
        return here, -apart - rho * (cos * sin * x + sigma_data * change)
