"""TRL's experimental GKDTrainer under any divergence: given responses, the student's own, or a mix."""

import copy
import random
from typing import Any

from torch import Tensor
from trl.experimental.gkd import gkd_trainer as host
from trl.experimental.gkd.gkd_config import GKDConfig
from trl.models.utils import unwrap_model_for_generation

from fdiv.adapters._evidence import as_forward, batch_evidence, check_models
from fdiv.adapters._options import refuse_options, require_method
from fdiv.adapters.trl._metrics import log_of, mean
from fdiv.methods._method import Method, Out

INSTEAD = {
    "beta": "name the divergence: KL() for beta 0, ReverseKL() for beta 1, JS(beta) between",
    "lmbda": "write GKD(lmbda={value!r})",
}


class GKDTrainer(host.GKDTrainer):
    """TRL's trainer and its ways to write responses; the loss is `method`'s, as GKD's.

    method: consumes "responses"; its lmbda is the fraction of micro-batches that the student writes. Other
    arguments are those of TRL's GKDTrainer, by keyword; GKDConfig(temperature=...) is that of sampling alone.
    The responses of a whole step are written before its first backward pass, so that the loss is a mean over
    the tokens that do count; TRL 1.16 counts those of the data set that the written ones replace.
    """

    def __init__(self, *, method: Method, args: Any, **options: Any):
        require_method(method, ("responses",), "GKDTrainer", "method=GKD(JS(0.5), FusedLinear(), lmbda=0.5)")
        refuse_options(args, GKDConfig, INSTEAD)
        if options.get("compute_metrics") is not None:
            raise TypeError("GKDTrainer(compute_metrics=...) would do nothing: no logits are made here")
        args = copy.copy(args)
        args.lmbda = getattr(method, "lmbda", 0.0)
        self.method = method
        super().__init__(args=args, **options)
        # So that labels are counted, of which the first predicts nothing, and nothing else divides the loss.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        check_models(self.model, self.accelerator.unwrap_model(self.teacher_model))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._with_response(batch) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        return super(host.GKDTrainer, self).training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs:
            raise TypeError("no outputs of the model are made here; call the model itself for its logits")
        out = as_forward(model, self.accelerator.unwrap_model(model), self._out, inputs, num_items_in_batch)
        for name, value in out.metrics.items():
            log_of(self)[name].append(mean(self.accelerator, value))
        # Gradients will be averaged over processes, while tokens are counted over all of them.
        return out.loss if num_items_in_batch is None else out.loss * self.accelerator.num_processes

    def _out(self, inputs: Any, count: Tensor | None) -> Out:
        self.teacher_model.eval()
        student, teacher = (self.accelerator.unwrap_model(m) for m in (self.model, self.teacher_model))
        with self.accelerator.autocast():
            return self.method(count=count, **batch_evidence(self.method, student, teacher, inputs))

    def _with_response(self, batch: Any) -> Any:
        if random.random() < self.lmbda:
            writer: Any = self.model_wrapped
        elif self.seq_kd:
            writer = self.teacher_model
        else:
            return batch
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with unwrap_model_for_generation(
            writer,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=checkpointing,
        ) as model:
            ids, mask, labels = self.generate_on_policy_outputs(model, batch, self.generation_config)
        return dict(batch) | {"input_ids": ids, "attention_mask": mask, "labels": labels}
