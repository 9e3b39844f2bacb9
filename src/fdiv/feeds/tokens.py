"""Text and its labels."""

import torch

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import Counts, Feed, Part
from fdiv.methods._method import Out


class Tokens(Feed):
    """Drawn from the task, or from the reference if there is one."""

    def __init__(self, *args, data: str | None = None, **options):
        self.data = data
        super().__init__(*args, **options)

    def prepare(self, generator: torch.Generator) -> None:
        self.text = self._draw(self.spec.examples, generator)

    def _draw(self, count: int, generator: torch.Generator):
        if self.data:
            return self.task.data(self.data, count, generator)
        return self.task.responses(self.reference, count, generator)

    def parts(self, model: CausalLM, step: int) -> list[Part]:
        index = torch.randint(len(self.text.ids), (self.spec.batch_size,), generator=self.generator(step))
        return self.mine(Part(self.text.rows(index)))

    def loss(self, model: CausalLM, part: Part, batch: Counts) -> Out:
        return self.method(log_q=model.token_log_probs(*self.on_device(part.text)), count=batch.tokens)

    def validation(self, model: CausalLM) -> list[Part]:
        generator, count = self.generator(-2), self.spec.validate_on
        if hasattr(self.task, "held_out_responses"):
            text = self.task.held_out_responses(self.reference or model, count, generator)
        else:  # every draw is new
            text = self._draw(count, generator)
        return self.mine(Part(self.shareable(text)))
