"""Text and its labels."""

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import Counts, Feed, Part
from fdiv.methods._method import Out
from fdiv.tasks._task import Text

# What a method that consumes "examples" can read of a text, whose R predicted tokens are its rows.
READABLE_OF_TEXT = {
    "logits": "[R, V] of the student, with gradient",
    "labels": "[R] the tokens, as indices into V",
    "q_hidden, q_weight": "[R, width], [V, width] the student's hidden states and head, in place of logits",
    "p_weight": "[V, width of the reference] the head of the reference, without gradient",
    "log_prior": "[V] the logarithm of each token's share of the training text; -inf where it has none",
}


class Tokens(Feed):
    """Drawn from the task, or from the reference if there is one."""

    def __init__(self, *args, data: str | None = None, **options):
        self.data = data
        super().__init__(*args, **options)

    def prepare(self, generator: torch.Generator) -> None:
        self.reads = frozenset(getattr(self.method, "reads", ("logits", "labels")))
        self.log_prior: Tensor | None = None
        if self.method.consumes == "examples":
            self._check()
        self.text = self._draw(self.spec.examples, generator)

    def _check(self) -> None:
        """Raise where something that was asked for is not to be had of a text, or would be ignored."""
        known = {name for names in READABLE_OF_TEXT for name in names.split(", ")}
        if unknown := self.reads - known:
            raise TypeError(
                f"{self.method!r} reads {', '.join(sorted(unknown))}, which a text has not; of one there are "
                f"{', '.join(sorted(known))}. Train it on a task with examples, such as Classification(...)"
            )
        if {"logits", "q_hidden"} <= self.reads:
            raise TypeError(
                f"{self.method!r} reads both logits and q_hidden, which would run the student twice; "
                "logits are q_hidden @ q_weight.T"
            )
        if getattr(self.method, "teaches", None):
            raise TypeError(f"{self.method!r} trains its teacher too, which nothing does on a text")
        if "p_weight" in self.reads and self.reference is None:
            raise TypeError(f"{self.method!r} reads the head of a reference, and there is none")
        self._check_unit()

    def _check_unit(self) -> None:
        whole = (self.spec.micro_batch or self.spec.batch_size) >= self.spec.batch_size
        if getattr(self.method, "unit", None) == "batch" and not (whole and self.world.size == 1):
            raise ValueError(
                f"{self.method!r} compares the tokens of a batch, so that it takes batches whole: one "
                "process, and no train.micro_batch below train.batch_size"
            )

    def _draw(self, count: int, generator: torch.Generator) -> Text:
        if self.data:
            return self.task.data(self.data, count, generator)
        return self.task.responses(self.reference, count, generator)

    def parts(self, model: CausalLM, step: int) -> list[Part]:
        index = torch.randint(len(self.text.ids), (self.spec.batch_size,), generator=self.generator(step))
        return self.mine(Part(self.text.rows(index)))

    def loss(self, model: CausalLM, part: Part, batch: Counts) -> Out:
        if self.method.consumes == "examples":
            return self.method(**self._read(model, *self.on_device(part.text)), count=batch.tokens)
        return self.method(log_q=model.token_log_probs(*self.on_device(part.text)), count=batch.tokens)

    def _read(self, model: CausalLM, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What the method is called with, [R, ...] of the R predicted tokens."""
        makers = {
            "logits": lambda: model.logits(ids, mask),
            "labels": lambda: model.labels(ids, mask),
            "q_hidden": lambda: model.hidden(ids, mask),
            "q_weight": lambda: model.head,
            "p_weight": lambda: self.reference.head.detach(),
            "log_prior": lambda: self._log_prior(model),
        }
        return {name: makers[name]() for name in makers if name in self.reads}

    @torch.no_grad()
    def _log_prior(self, model: CausalLM) -> Tensor:
        """Counted once, of all text that batches are drawn from."""
        if self.log_prior is None:
            counted = model.labels(*self.on_device(self.text)).bincount(minlength=model.size)
            self.log_prior = (counted.double() / counted.sum()).log().float()
        return self.log_prior

    def validation(self, model: CausalLM) -> list[Part]:
        generator, count = self.generator(-2), self.spec.validate_on
        if hasattr(self.task, "held_out_responses"):
            text = self.task.held_out_responses(self.reference or model, count, generator)
        else:  # every draw is new
            text = self._draw(count, generator)
        return self.mine(Part(self.shareable(text)))
