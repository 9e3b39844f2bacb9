"""One training run in several processes, as torchrun starts them: DDP or FSDP2 on torch.distributed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

How = Literal["ddp", "fsdp"]
# Rank 0 evaluates a finished model while the others wait for it.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """This process among those that train together; alone, every collective is the identity."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: str = "auto") -> "World":
        """As the environment of torchrun says; a process started otherwise is alone."""
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":  # each process has one of its own
            device = f"cuda:{local}"
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls(device=device)
        if not dist.is_initialized():
            if device.startswith("cuda"):
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
        if dist.get_world_size() != size:
            raise RuntimeError(f"torchrun started {size} processes and {dist.get_world_size()} joined")
        return cls(dist.get_rank(), size, device)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The part of `count` things in a row that is this process's; all parts are of one size."""
        if count % self.size:
            raise ValueError(f"{count} sequences cannot be shared evenly by {self.size} processes")
        return slice(count // self.size * self.rank, count // self.size * (self.rank + 1))

    def sum(self, numbers: list[float]) -> list[float]:
        """Of each number over all processes."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, decide: Callable[[], Any]) -> Any:
        """What the first process decides, in all of them."""
        if self.size == 1:
            return decide()
        box = [decide() if self.leads else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, thing: Any) -> list[Any]:
        """One from each process, in their order."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


class Step(nn.Module):
    """Calls a function inside `forward`, where DDP and FSDP2 have their hooks."""

    def __init__(self, model: nn.Module, beside: nn.Module | None):
        super().__init__()
        self.model, self.beside = model, beside

    def forward(self, function: Callable, *args: Any) -> Any:
        return function(*args)


class Spread:
    """A model under training, on one process or on many.

    how: "ddp" copies it to each process, "fsdp" shards parameters, gradients and optimiser (FSDP2). Whatever
    computes with the model goes through `run`. beside: what is trained with it, and left out in the end.
    alternating: a step may train the one and not the other.
    """

    def __init__(
        self,
        model: nn.Module,
        how: How,
        world: World,
        beside: nn.Module | None = None,
        alternating: bool = False,
    ):
        self.model, self.world = model, world
        self.sharded = world.size > 1 and how == "fsdp"
        self.trained = Step(model, beside)
        self.step: nn.Module = self.trained
        if self.sharded:
            _shard(self.step, model, world)
        elif world.size > 1:
            self.step = DistributedDataParallel(self.step, find_unused_parameters=alternating)

    def run(self, function: Callable, *args: Any) -> Any:
        """function(*args), from which gradients are wanted."""
        return self.step(function, *args)

    @torch.no_grad()
    def look(self, function: Callable, *args: Any) -> Any:
        """function(*args) without gradients."""
        if not self.sharded:  # DDP would wait for a backward pass
            return function(*args)
        found = self.step(function, *args)
        for module in self._shards():
            module.reshard()
        return found

    def backward(self, loss: Tensor) -> None:
        """Gradients of the *sum* of all processes' losses."""
        # Both engines average over the processes.
        (loss * self.world.size).backward()

    def accumulating(self, last: bool):
        """Around the passes of a micro-batch; gradients are communicated with the last."""
        if last or self.world.size == 1:
            return nullcontext()
        if isinstance(self.step, DistributedDataParallel):
            return self.step.no_sync()
        return _unsynchronised(self.step)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around generation: every process holds all weights, so that none waits for another's last token.

        Inside `look`, which goes on with the outermost module's weights and gives them back in the end.
        """
        for module in self._shards():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self._shards():
                module.set_reshard_after_forward(True, recurse=False)
                if module is not self.step:
                    module.reshard()

    def _shards(self) -> list[FSDPModule]:
        return [m for m in self.step.modules() if isinstance(m, FSDPModule)] if self.sharded else []

    def clip(self, norm: float) -> Tensor:
        """Clip the gradients to this norm; returns what it was."""
        found = torch.nn.utils.clip_grad_norm_(self.parameters(), norm)
        return found.full_tensor() if isinstance(found, DTensor) else found

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters by name, whole, on the CPU of the first process."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return cast(dict[str, Tensor], get_model_state_dict(self.trained, options=options))

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.trained.parameters() if p.requires_grad]

    def everything(self) -> dict[str, Tensor]:
        """All weights of a sharded model, whole, on the CPU of the first process."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(self.model, options=options))

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state, likewise: it fits any number of processes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.trained, optimizer, options=options)

    def restore(self, weights: dict, optimizer: torch.optim.Optimizer, moments: dict) -> None:
        """Both back from a checkpoint, which every process has read."""
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.trained, weights, options=options)
        set_optimizer_state_dict(self.trained, optimizer, moments, options=options)


def _shard(step: nn.Module, model: nn.Module, world: World) -> None:
    mesh = init_device_mesh(world.device.split(":")[0], (world.size,))
    layers = getattr(getattr(model, "base_model", model), "layers", None)
    for layer in layers if isinstance(layers, nn.ModuleList) else []:
        fully_shard(layer, mesh=mesh)
    fully_shard(step, mesh=mesh)
    if not all(isinstance(p, DTensor) for p in step.parameters()):
        raise RuntimeError("fully_shard left parameters whole; train with parallel: ddp")


@contextmanager
def _unsynchronised(step: nn.Module) -> Iterator[None]:
    assert isinstance(step, FSDPModule)
    step.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        step.set_requires_gradient_sync(True)
