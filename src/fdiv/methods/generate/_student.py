"""What the methods of one-step students share: who learns when, and what a student is called with."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fdiv._divergence import FDivergence
from fdiv.diffusion.edm import denoised, guided
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.generate._critic import Critic, Known, LogRatio, Rows, require_critic
from fdiv.methods.generate._one_step import (
    condition_of,
    generated,
    moves,
    noised,
    require_plan,
    require_size,
    require_weight,
)
from fdiv.methods.generate._ratio import needs_ratio, require_curvature, require_ratio
from fdiv.methods.generate.levels import Drawn, Levels, drawn, require_levels

READS = ("inputs", "labels", "network", "p_network", "module", "step")


class Compared(NamedTuple):
    """Samples with noise, x [B, ...], their levels, and what student and teacher denoise x to."""

    x: Tensor
    level: Drawn
    student: Tensor
    teacher: Tensor


class Turn(NamedTuple):
    """The student's turn: its samples `made` [B, ...] of `noise`, which carry its gradient."""

    made: Tensor
    noise: Tensor
    condition: Any
    network: Any
    p_network: Any
    module: Any
    state: dict[str, float]


class OneStep:
    """A student that is called once, network(sigma_init z, sigma_init), and the critics it takes turns with.

    A method adds what it `learns` by, its fields, and among them those below.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = READS
    alternating: ClassVar[bool] = True
    through: ClassVar[bool] = True  # gradients pass the two denoisers, into where they are asked

    every: int
    head_start: int
    sigma_init: float
    levels: Levels
    weight: str
    critic: Critic | Known
    guidance: float

    def learns(self, turn: Turn, seen: Compared) -> Rows:
        """(rows [B] of the student's loss, metrics)."""
        raise NotImplementedError

    @property
    def discriminates(self) -> bool:
        """Whether a discriminator is trained."""
        return False

    def beside(self, network: Any, p_network: Any) -> nn.Module:
        return self.critic.beside(network, p_network, self.discriminates)

    def sample(self, network: Any, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        return generated(network, noise, self.sigma_init, condition)

    def __call__(
        self,
        *,
        inputs: Tensor,
        labels: Tensor,
        network: Any,
        p_network: Any,
        module: Any,
        step: int,
        state: dict[str, float] | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...] are data, of which some methods read the shape alone; labels [B, ...] the condition
        of networks that read one.

        Noise and levels come from torch's global generator. count: the examples of the global batch.
        """
        condition, noise = condition_of(labels, network, p_network), torch.randn_like(inputs)
        its_turn = moves(step, self.every, self.head_start)
        with torch.set_grad_enabled(its_turn and torch.is_grad_enabled()):
            made = generated(network, noise, self.sigma_init, condition)
        rows, metrics = self.critic.rows(module, p_network, inputs, made, condition, self.levels)
        if its_turn:
            turn = Turn(made, noise, condition, network, p_network, module, state or {})
            own, more = self.learns(turn, self._compared(turn))
            rows, metrics = rows + own, metrics | more
        return Out(mean_over_tokens(rows, count=count), metrics)

    def _compared(self, turn: Turn) -> Compared:
        level, fake = drawn(self.levels, turn.made), self.critic.denoiser(turn.module, turn.network)
        x, told = noised(turn.made, level), guided(turn.p_network, self.guidance)
        with torch.set_grad_enabled(self.through and torch.is_grad_enabled()):
            student, teacher = (denoised(d, x, level.sigma, turn.condition) for d in (fake, told))
        return Compared(x, level, student, teacher)

    def _require(self, weights: tuple[str, ...]) -> None:
        """Raise unless the fields above make sense; weights: those that the method has."""
        name = type(self).__name__
        require_plan(self, self.every, self.head_start, self.sigma_init)
        require_size(name, least=0.0, guidance=self.guidance)
        require_levels(self.levels, f"{name}(levels)")
        require_weight(name, self.weight, weights)
        require_critic(self.critic, name)


class Weighed(OneStep):
    """A student whose samples are weighed by a ratio of densities, and that real data may teach too."""

    reads: ClassVar[tuple[str, ...]] = (*READS, "state")

    divergence: FDivergence
    gan: float
    ratio: tuple[float, float]
    bins: int
    bin_rate: float

    @property
    def discriminates(self) -> bool:
        return bool(self.gan) or needs_ratio(self.divergence)

    def initial_state(self) -> dict[str, float]:
        """The mean ratio of each bin, if it is remembered."""
        return {f"bin_{k}": 1.0 for k in range(self.bins)} if self.bin_rate else {}

    def advance(
        self, state: dict[str, float], metrics: dict[str, float], progress: float
    ) -> dict[str, float]:
        return {name: metrics.get(name, last) for name, last in state.items()}

    def _log_ratio(self, turn: Turn) -> LogRatio | None:
        if not self.discriminates:
            return None
        return self.critic.log_ratio(turn.module, turn.network, turn.p_network)

    def _with_gan(
        self, rows: Tensor, metrics: dict[str, Tensor], logit: LogRatio | None, seen: Compared, condition: Any
    ) -> Rows:
        """softplus(-logit) of the samples added, `gan` times."""
        if not self.gan or logit is None:
            return rows, metrics
        fooled = softplus(-logit(seen.x, seen.level.sigma, condition))
        return rows + self.gan * fooled, metrics | {"gan_loss": fooled.detach().mean()}

    def _require(self, weights: tuple[str, ...]) -> None:
        name = type(self).__name__
        require_curvature(self.divergence, name)
        super()._require(weights)
        require_size(name, least=0.0, gan=self.gan)
        require_ratio(name, self.ratio, self.bins, self.bin_rate)
        if self.gan and isinstance(self.critic, Known):
            raise ValueError(f"Known() has no discriminator: write gan=0.0, got {self.gan!r}")
