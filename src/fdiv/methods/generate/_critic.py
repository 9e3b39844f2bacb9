"""Who says what the student's own law is: a denoiser trained on its samples, and a discriminator.

The denoiser is the fake score, D_q = E[x0 | x0 + sigma noise] under the student; the logit of a discriminator
that tells noised data (1) from noised samples (0) is log p/q at its optimum, p being the law of the *data*.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from fdiv.diffusion.edm import Denoiser, Preconditioning, denoised, spread_to
from fdiv.methods.generate._one_step import mean_coordinate, noised
from fdiv.methods.generate.levels import Levels, drawn, require_levels

LogRatio = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x [B, ...], sigma [B], condition -> [B]
Rows = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Critic:
    """Both are trained at every step, on samples without gradient.

    sigma_data: of the denoiser's loss, the standard deviation of a coordinate. levels: at which the denoiser
    is trained; None for those of the student. The discriminator is a small head on features: of the
    "teacher", whose weights stay, or of a copy that is trained with it ("own").
    """

    sigma_data: float = 0.5
    levels: Levels | None = None
    features: Literal["teacher", "own"] = "teacher"

    def __post_init__(self):
        Preconditioning(self.sigma_data)  # checks it
        if self.levels is not None:
            require_levels(self.levels, "Critic(levels)")
        if self.features not in ("teacher", "own"):
            raise ValueError(f"Critic(features) is 'teacher' or 'own', got {self.features!r}")

    def beside(self, network: Any, p_network: Any, discriminates: bool) -> "Critics":
        """The fake score starts as the teacher; as the student where the teacher is a formula."""
        learnt = [n for n in (p_network, network) if getattr(n, "width", None)]
        if not learnt:
            raise TypeError(
                "a fake score starts as a copy of a network with `features` of a `width`, as Denoiser(), "
                "which neither teacher nor student is; write critic=Known() where both state their law"
            )
        if not discriminates:
            return Critics(deepcopy(learnt[0]), None)
        if self.features == "teacher" and learnt[0] is not p_network:
            raise TypeError("the teacher is a formula and has no features; write Critic(features='own')")
        return Critics(deepcopy(learnt[0]), Discriminator(learnt[0], own=self.features == "own"))

    def denoiser(self, module: Any, network: Any) -> Denoiser:
        """The fake score, as a function of x alone."""
        return frozen(module.fake)

    def log_ratio(self, module: Any, network: Any, p_network: Any) -> LogRatio:
        """The discriminator's logit, as a function of x alone."""
        logit = frozen(module.discriminator)
        return lambda x, sigma, condition: logit(p_network, x, sigma, condition)

    def rows(
        self, module: Any, p_network: Any, real: Tensor, made: Tensor, condition: Any, levels: Levels
    ) -> Rows:
        """What the critics learn from data and samples [B, ...] of one condition: rows [B], metrics."""
        made = made.detach()
        level = drawn(self.levels or levels, made)
        error = denoised(module.fake, noised(made, level), level.sigma, condition) - made
        weight = spread_to(Preconditioning(self.sigma_data).weight(level.sigma), made)
        rows = mean_coordinate(weight * error.square())
        metrics = {"fake_score_loss": rows.detach().mean()}
        if module.discriminator is None:
            return rows, metrics
        logits = []
        for x in (real, made):
            level = drawn(levels, x)
            logits.append(module.discriminator(p_network, noised(x, level), level.sigma, condition))
        right = torch.cat([logits[0] > 0, logits[1] < 0])
        metrics["discriminator_accuracy"] = right.to(rows.dtype).mean()
        return rows + softplus(-logits[0]) + softplus(logits[1]), metrics


@dataclass(frozen=True)
class Known:
    """Nothing is trained: student and teacher state their laws, by `denoise` and `log_prob` of (x, sigma)."""

    def beside(self, network: Any, p_network: Any, discriminates: bool) -> nn.Module:
        for who, model in (("student", network), ("teacher", p_network)):
            if not (hasattr(model, "denoise") and hasattr(model, "log_prob")):
                raise TypeError(
                    f"Known() asks both networks for their laws, and the {who} states none, as Affine() and "
                    "ClosedForm() do; write Critic()"
                )
        return nn.Module()

    def denoiser(self, module: Any, network: Any) -> Denoiser:
        return deepcopy(network).requires_grad_(False).denoise

    def log_ratio(self, module: Any, network: Any, p_network: Any) -> LogRatio:
        q = deepcopy(network).requires_grad_(False)
        return lambda x, sigma, condition: p_network.log_prob(x, sigma) - q.log_prob(x, sigma)

    def rows(
        self, module: Any, p_network: Any, real: Tensor, made: Tensor, condition: Any, levels: Levels
    ) -> Rows:
        return made.new_zeros(len(made)), {}


class Critics(nn.Module):
    """What `Critic` trains."""

    def __init__(self, fake: nn.Module, discriminator: "Discriminator | None"):
        super().__init__()
        self.fake, self.discriminator = fake.requires_grad_(True), discriminator


class Discriminator(nn.Module):
    """The logit [B] of x being data, at each level of noise; 0 before training, which is a ratio of 1."""

    def __init__(self, source: Any, own: bool):
        super().__init__()
        width = source.width
        self.trunk = deepcopy(source).requires_grad_(True) if own else None
        if self.trunk is not None and hasattr(self.trunk, "head"):
            self.trunk.head = nn.Identity()  # which features do not read
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, teacher: Any, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        trunk = teacher if self.trunk is None else self.trunk
        return self.head(trunk.features(x, sigma, condition)).squeeze(-1)


def frozen(module: nn.Module) -> Callable[..., Tensor]:
    """module as a function of its arguments: gradients reach them, and none of its weights."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return lambda *arguments: functional_call(module, weights, arguments)


def require_critic(critic: object, who: str) -> None:
    if not isinstance(critic, Critic | Known):
        raise TypeError(f"{who}(critic) is Critic(...) or Known(), got {critic!r}")
