"""A LightningModule whose loss is an fdiv method's: distillation from a teacher, or SFT.

from fdiv.adapters.lightning import MethodModule
module = MethodModule(method=GKD(JS(0.5)), teacher=teacher, model=student, optimizer=torch.optim.AdamW)
lightning.Trainer(...).fit(module, batches)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from lightning import LightningModule
    from lightning.pytorch.strategies import DeepSpeedStrategy
except ImportError as error:
    raise ImportError('this needs Lightning and transformers: pip install "fdiv[lightning]"') from error

from fdiv.adapters._evidence import batch_evidence, check_models, rows_of, sums_over
from fdiv.adapters._options import require_method, require_teacher
from fdiv.methods._method import Method


class MethodModule(LightningModule):
    """Trains `model`, a causal LM of the transformers library, under `method`.

    method: consumes "responses" (with `teacher`, a causal LM of the student's vocabulary) or "tokens".
    optimizer: given the list of trainable parameters, returns whatever configure_optimizers may.
    Batches hold input_ids, attention_mask and labels, -100 where a token takes no part.

    A step's gradient is that of the mean over the labelled tokens of all its micro-batches and processes.
    As their number is known at the end alone, gradients are of sums until `on_before_optimizer_step` divides
    them, before Lightning clips; hooks of callbacks come earlier and see the sums.
    Logged: `train_loss`, and over the tokens of the whole set `val_loss` or `test_loss` and, for "responses",
    `val_divergence`; the method's metrics as `train_NAME`. The teacher is in no checkpoint.
    """

    def __init__(
        self,
        *,
        method: Method,
        model: Any,
        optimizer: Callable[[list[torch.nn.Parameter]], Any],
        teacher: Any = None,
    ):
        instead = "method=GKD(KL()) and teacher=, or method=SFT()"
        require_method(method, ("responses", "tokens"), "MethodModule", instead)
        require_teacher(method, teacher, "MethodModule")
        super().__init__()
        check_models(model, teacher)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self.method, self.optimizer = method, optimizer
        self.model = model.train()  # Lightning keeps the mode it finds, and from_pretrained gives eval
        self._teacher = (teacher,)  # a tuple: a module would be saved, and wrapped by DDP
        self._tokens = torch.tensor(0)

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.model.parameters() if p.requires_grad])

    def on_fit_start(self) -> None:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "DeepSpeed keeps gradients where they cannot be divided by the tokens of a step; use DDP or "
                "FSDP, or fdiv.adapters.trainer.Trainer"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tensors = self._tensors(batch)
        tokens = rows_of(tensors)
        out = self.method(count=1, **tensors)
        self._tokens = self._tokens.to(tokens.device) + tokens
        numbers = {"loss": out.loss.detach() / tokens.clamp(min=1)} | out.metrics
        self.log_dict({f"train_{name}": value for name, value in numbers.items()}, batch_size=int(tokens))
        return out.loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        tokens: Any = self.trainer.strategy.reduce(self._tokens.float(), reduce_op="sum")
        self._tokens = torch.zeros_like(self._tokens)
        # Lightning has divided by the micro-batches of a full step, and DDP by the processes.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(parts / tokens.clamp(min=1))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        sums = sums_over(self.method, self._tensors(batch))
        tokens = sums.pop("tokens")
        means = {f"{stage}_{name}": total / tokens.clamp(min=1) for name, total in sums.items()}
        self.log_dict(means, batch_size=int(tokens), sync_dist=True)

    def _tensors(self, batch: Any) -> dict[str, Tensor]:
        (teacher,) = self._teacher
        if teacher is not None and teacher.device != self.device:
            teacher.to(self.device)
        return batch_evidence(self.method, self.model, teacher, batch)
