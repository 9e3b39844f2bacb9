"""TRL's DistillationTrainer under any divergence."""

from typing import Any

import torch
from torch import Tensor
from trl.trainer import distillation_trainer as host
from trl.trainer.distillation_config import DistillationConfig

from fdiv.adapters._evidence import entropy_of_some, evidence, head_of
from fdiv.adapters._options import refuse_options, require_method
from fdiv.adapters.trl._metrics import log_of, mean
from fdiv.methods._method import Method

INSTEAD = {
    "beta": "name the divergence: KL() for beta 0, ReverseKL() for beta 1, JS(beta) between",
    "temperature": "write GKD(temperature={value!r}) for the loss, and generation_kwargs="
    "{{'temperature': {value!r}}} if the student is to sample at it too",
}
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class DistillationTrainer(host.DistillationTrainer):
    """TRL's trainer, which has the student write the responses; the loss is `method`'s, as GKD's.

    method: consumes "responses", with lmbda = 1, for every response here is the student's own.
    Other arguments are those of trl.DistillationTrainer, by keyword. Under an estimator that sees heads
    (FusedLinear) no logits are made. Logged beside TRL's numbers: the method's metrics. `entropy` is taken
    on at most 64 tokens of a micro-batch.
    """

    def __init__(self, *, method: Method, args: Any = None, **options: Any):
        require_method(
            method, ("responses",), "DistillationTrainer", "method=GKD(JS(0.5), FusedLinear(), lmbda=1.0)"
        )
        if getattr(method, "lmbda", 1.0) != 1.0:
            raise ValueError(
                f"TRL's DistillationTrainer trains on the student's own responses alone, and {method!r} asks "
                "for lmbda < 1: write lmbda=1.0, or use fdiv.adapters.trainer.Trainer for given responses"
            )
        if options.get("teacher_model") is None:
            raise TypeError("DistillationTrainer needs a teacher: write teacher_model=, a model or its path")
        if args is not None:
            refuse_options(args, DistillationConfig, INSTEAD)
        self.method = method
        super().__init__(args=args, **options)
        for model in (self.model, self.teacher_model):
            head_of(self.accelerator.unwrap_model(model))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Here, and not in _compute_loss: no collective may run inside the wrapped forward pass.
        for name, value in self._method_metrics.items():
            log_of(self)[name].append(mean(self.accelerator, value))
        return result

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        wrapped: Any = self.teacher_model
        wrapped.eval()
        teacher: Any = self.accelerator.unwrap_model(wrapped)
        p_head, q_head = head_of(teacher), head_of(unwrapped_student)
        q_hidden = self._predicting(unwrapped_student, inputs, unwrapped_student).to(q_head.weight.device)
        with torch.no_grad():
            p_hidden = self._predicting(wrapped, inputs, teacher).to(p_head.weight.device)
        tensors = evidence(self.method, p_hidden, p_head, q_hidden, q_head)
        out = self.method(count=num_items_in_batch, **tensors)
        self._method_metrics = out.metrics
        entropy = entropy_of_some(q_hidden, q_head)
        return out.loss, entropy.sum(), torch.tensor(len(entropy), device=entropy.device)

    def _predicting(self, wrapper: Any, inputs: dict[str, Tensor], model: Any) -> Tensor:
        """The hidden states that predict the response tokens that count: [tokens, width]."""
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        images = {name: inputs[name] for name in MULTIMODAL if name in inputs}
        arguments = (
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask.shape[1],
        )
        with self.accelerator.autocast():  # which the redirected pass would otherwise go without
            if wrapper is model:  # the caller already is inside the student's forward pass
                states = self._get_last_hidden_state(*arguments, **images)
            else:
                states = self._forward_redirection(
                    wrapper, model, self._get_last_hidden_state, *arguments, **images
                )
        return states[mask.bool().to(states.device)]
