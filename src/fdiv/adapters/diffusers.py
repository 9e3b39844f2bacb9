"""Pretrained models of diffusers as denoisers, and the momentum samplers as one of its schedulers.

A model of diffusers reads z = a x0 + s noise at a time of its scheduler's table, a^2 = alphas_cumprod and
s^2 = 1 - a^2. With sigma = s / a that is z = x / sqrt(1 + sigma^2) of our x = x0 + sigma noise.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdiv.diffusion.edm import spread_to
from fdiv.diffusion.samplers import Multistep, Rule
from fdiv.networks._network import Network

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
except ImportError as error:
    raise ImportError('this needs diffusers: pip install "fdiv[diffusers]"') from error

PREDICTS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Pipeline:
    """A pipeline with `unet` and `scheduler`, as DDPMPipeline, for the network of a recipe.

        plugins: [fdiv.adapters.diffusers]
        reference: {model: {network: 'Pipeline("google/ddpm-cifar10-32")'}}

    path: a hub id, or a folder that save_pretrained wrote. What is trained starts from its weights.
    """

    path: str

    def build(self, shape: torch.Size, outputs: int) -> "Pretrained":
        made = Pretrained.of(DiffusionPipeline.from_pretrained(self.path))
        sizes: Any = made.network.config
        side = sizes.sample_size
        own = (sizes.in_channels, *((side, side) if isinstance(side, int) else side))
        if tuple(shape) != own:
            raise ValueError(f"{self.path} makes images of shape {own}, and the task's are {tuple(shape)}")
        return made


class Pretrained(Network):
    """A UNet2DModel with its scheduler, or a pipeline of them, as D(x, sigma, condition).

    `levels` [times] are the sigma that it was trained at; between two of them the time is interpolated in log
    sigma, and beyond the ends it is refused. The condition is the class, [B] int64, where the model has such.
    Parameters keep their requires_grad, and gradients flow to x.
    """

    levels: Tensor

    def __init__(self, network: UNet2DModel, scheduler: Any):
        nn.Module.__init__(self)  # no stages and no head
        self.network, self.predicts = network, _predicts(scheduler)
        self.register_buffer("levels", levels_of(scheduler.alphas_cumprod), persistent=False)
        sizes: Any = network.config
        if sizes.out_channels != sizes.in_channels:
            raise ValueError(
                f"the model returns {sizes.out_channels} channels of {sizes.in_channels}: those that learn "
                "their variance too are not supported"
            )

    @classmethod
    def of(cls, pipeline: Any) -> "Pretrained":
        """From a pipeline with `unet` and `scheduler`, as DDPMPipeline."""
        if not (hasattr(pipeline, "unet") and hasattr(pipeline, "scheduler")):
            raise TypeError(f"a pipeline has a unet and a scheduler, got {type(pipeline).__name__}")
        return cls(pipeline.unet, pipeline.scheduler)

    @property
    def conditional(self) -> bool:
        """Whether it reads a class."""
        return self.network.class_embedding is not None

    @property
    def width(self) -> int:
        """Of its features: the channels of the middle block."""
        sizes: Any = self.network.config
        return sizes.block_out_channels[-1]

    def features(self, x: Tensor, sigma: Tensor | float, condition: Tensor | None = None) -> Tensor:
        """[B, width], what the middle block returns, averaged over places."""
        found: list[Tensor] = []
        middle: Any = self.network.mid_block
        handle = middle.register_forward_hook(lambda _block, _inputs, output: found.append(output))
        try:
            self(x, sigma, condition)
        finally:
            handle.remove()
        return found[0].mean((-2, -1))

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Tensor | None = None) -> Tensor:
        if (condition is not None) != self.conditional:
            wanted = "a class, [B] int64" if self.conditional else "condition=None"
            raise ValueError(f"this model's condition is {wanted}, got {type(condition).__name__}")
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        level = spread_to(sigma, x).to(x.dtype)
        scale = (1 + level**2).rsqrt()
        said = self.network(scale * x, self.time(sigma).float(), class_labels=condition, return_dict=False)[0]
        return clean(said, scale * x, level, self.predicts)

    def time(self, sigma: Tensor) -> Tensor:
        """The place of each sigma in `levels`, between two of them a fraction."""
        low, high = self.levels[0], self.levels[-1]
        inside = (sigma >= low * (1 - 1e-6)) & (sigma <= high * (1 + 1e-6))
        if not bool(inside.all()):
            raise ValueError(
                f"this model knows sigma in [{low:.4g}, {high:.4g}], got {sigma[~inside].tolist()[:3]}; "
                f"write karras(steps, least={low:.4g}, most={high:.4g})"
            )
        right = torch.searchsorted(self.levels, sigma.contiguous()).clamp(1, len(self.levels) - 1)
        below, above = self.levels[right - 1].log(), self.levels[right].log()
        return right - 1 + ((sigma.log() - below) / (above - below)).clamp(0.0, 1.0)


def clean(said: Tensor, z: Tensor, sigma: Tensor | float, predicts: str) -> Tensor:
    """x0 from what the model said of z = (x0 + sigma noise) / sqrt(1 + sigma^2)."""
    scale = (1 + sigma**2) ** 0.5
    if predicts == "sample":
        return said
    return z * scale - sigma * said if predicts == "epsilon" else (z - sigma * said) / scale


def levels_of(alphas_cumprod: Tensor) -> Tensor:
    """sigma = sqrt(1 / alphas_cumprod - 1) of each time, rising; [times] float64."""
    alphas = alphas_cumprod.double()
    return ((1 - alphas) / alphas).sqrt()


def _predicts(scheduler: Any) -> str:
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise TypeError(
            f"{type(scheduler).__name__} has no alphas_cumprod, so that its levels are unknown here; write "
            "the DDPMScheduler or DDIMScheduler that the model was trained with"
        )
    found = scheduler.config.prediction_type
    if found not in PREDICTS:
        raise ValueError(f"prediction_type is one of {', '.join(PREDICTS)}, got {found!r}")
    return found


class MomentumScheduler(SchedulerMixin, ConfigMixin):
    """GHVB, heavy ball or Nesterov steps in a pipeline: see fdiv.diffusion.samplers, also for order and rule.

        pipeline.scheduler = MomentumScheduler.of(pipeline.scheduler, order=2, momentum=0.8)

    The times are evenly spaced from the last one down, as by DDIM's "trailing"; after time 0 comes sigma = 0.
    `timesteps` and `sigmas` hold them once `set_timesteps` was called, which also forgets the slopes so far.
    Nothing is clipped, whatever the scheduler of the training did.
    """

    order = 1  # calls of the model a step, which pipelines read
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        alphas_cumprod: list[float],
        prediction_type: str = "epsilon",
        solver_order: int = 2,
        momentum: float = 0.8,
        rule: Rule = "ghvb",
    ):
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float64)
        self.levels = levels_of(self.alphas_cumprod)
        if not bool(self.levels.isfinite().all()):
            raise ValueError("a level of alphas_cumprod = 0 has no sigma, and cannot be started from here")
        self.predicts = prediction_type
        self.settings: tuple[int, float, Rule] = solver_order, momentum, rule
        self.set_timesteps(len(self.levels))

    @classmethod
    def of(
        cls, scheduler: Any, order: int = 2, momentum: float = 0.8, rule: Rule = "ghvb"
    ) -> "MomentumScheduler":
        """For a model that was trained with this scheduler's levels."""
        return cls(scheduler.alphas_cumprod.tolist(), _predicts(scheduler), order, momentum, rule)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        known = len(self.levels)
        if not 1 <= num_inference_steps <= known:
            raise ValueError(f"there are 1 to {known} steps, got {num_inference_steps!r}")
        spaced = torch.arange(num_inference_steps, dtype=torch.float64) * (known / num_inference_steps)
        times = known - 1 - spaced.round().long()
        self.timesteps = times.to(device)
        self.sigmas = [*self.levels[times].tolist(), 0.0]
        self.solver = Multistep(*self.settings)
        self.taken = 0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next z; steps are taken in the order of `timesteps`, and without noise."""
        if self.taken >= len(self.timesteps) or int(timestep) != int(self.timesteps[self.taken]):
            raise ValueError(f"step {self.taken} of {self.timesteps.tolist()} is not {int(timestep)}")
        sigma, after = self.sigmas[self.taken : self.taken + 2]
        self.taken += 1
        z = sample.double()
        x = z * math.sqrt(1 + sigma**2)
        slope = (x - clean(model_output.double(), z, sigma, self.predicts)) / sigma
        found = (x + (after - sigma) * self.solver.direction(slope)) / math.sqrt(1 + after**2)
        return SchedulerOutput(found.to(sample.dtype)) if return_dict else (found.to(sample.dtype),)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alphas = self.alphas_cumprod.to(original_samples.device)[timesteps].to(original_samples.dtype)
        kept = spread_to(alphas, original_samples)
        return kept.sqrt() * original_samples + (1 - kept).sqrt() * noise

    def __len__(self) -> int:
        return len(self.levels)
