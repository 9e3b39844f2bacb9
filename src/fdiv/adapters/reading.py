"""How a model is read while it, or another, writes."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig

if TYPE_CHECKING:
    from fdiv.adapters.transformers import CausalLM


class Reader:
    """A model that reads a batch a few tokens at a time, with a key-value cache.

    attended: [B, S], 0 where the tokens that it reads first are padding on the left, else 1.
    """

    def __init__(self, model: "CausalLM", attended: Tensor | None = None):
        self.model, self.attended, self.cache = model, attended, None
        self.network = model.model.base_model if model.has_plain_head else model.model

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, vocab] of the next token, up to a constant of each row."""
        device = self.model.model.device
        places = {name: t.to(device) for name, t in self._places(ids).items()}
        out = self.network(input_ids=ids.to(device), past_key_values=self.cache, use_cache=True, **places)
        self.cache = out.past_key_values
        if self.model.has_plain_head:
            return self.model.rows_of_hidden(out.last_hidden_state[:, -1])
        return self.model.restricted(out.logits[:, -1])

    def _places(self, ids: Tensor) -> dict[str, Tensor]:
        if self.attended is None:
            return {}
        if self.cache is not None:
            self.attended = torch.cat([self.attended, torch.ones_like(ids, device=self.attended.device)], 1)
        places = {"attention_mask": self.attended}
        if "position_ids" in inspect.signature(self.network.forward).parameters:
            places["position_ids"] = (self.attended.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return places


@contextmanager
def plainly(*models: "CausalLM") -> Iterator[None]:
    """Models without dropout, and without the decoding options that they were published with."""
    networks = [m.model for m in models]
    before = [(network.training, network.generation_config) for network in networks]
    try:
        for network in networks:
            network.eval()
            network.generation_config = GenerationConfig()
        yield
    finally:
        for network, (training, options) in zip(networks, before, strict=True):
            network.train(training)
            network.generation_config = options
