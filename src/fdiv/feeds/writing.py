"""Who writes for the student: its own network, or an engine that has its weights."""

import importlib
import tempfile
from typing import Any

from fdiv.adapters.transformers import CausalLM
from fdiv.parallel import World
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import TeacherMixed


class Hand:
    """`of(model)` answers prompts as the model does now; `engine` is "transformers" or "vllm"."""

    def __init__(self, engine: str, world: World, sampler: Sampler | None):
        self.fast: Any = None
        self.vllm = engine == "vllm"
        if not self.vllm:
            return
        self.adapter = importlib.import_module("fdiv.adapters.vllm")  # which says how to install it
        if world.size > 1:
            raise ValueError("train.generation: vllm writes for one process, and there are several")
        if isinstance(sampler, TeacherMixed):
            raise ValueError(f"vLLM writes from one model, not from {sampler!r}; generation: transformers")

    def of(self, model: CausalLM) -> Any:
        if not self.vllm:
            return model
        if self.fast is None:
            self.folder = tempfile.TemporaryDirectory(prefix="fdiv-vllm-")
            self.fast = self.adapter.VLLM(model, self.folder.name)
        else:
            self.fast.synchronise()
        return self.fast
