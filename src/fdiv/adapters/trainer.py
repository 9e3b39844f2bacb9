"""transformers.Trainer with the loss of an fdiv method: distillation from a teacher, or SFT.

from fdiv.adapters.trainer import Trainer
Trainer(method=GKD(JS(0.5), FusedLinear()), teacher=teacher, model=student, args=..., ...).train()
"""

from typing import Any

import torch
from torch import Tensor

try:
    import transformers
except ImportError as error:
    raise ImportError('fdiv.adapters.trainer needs transformers: pip install "fdiv[trainer]"') from error

from fdiv.adapters._evidence import as_forward, batch_evidence, check_models, sums_over
from fdiv.adapters._options import refuse_options, require_method, require_teacher
from fdiv.methods._method import Method, Out

INSTEAD = {
    "label_smoothing_factor": "mix a uniform teacher in by hand if it is wanted",
    "average_tokens_across_devices": "keep it: the loss is a mean over the tokens of the global batch",
}
UNUSED = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")


class Trainer(transformers.Trainer):
    """The Trainer, its loop, logs and checkpoints; the loss is `method`'s.

    method: consumes "responses" (with `teacher`, a causal LM of the student's vocabulary) or "tokens".
    Other arguments are those of transformers.Trainer, by keyword. Batches hold input_ids, attention_mask and
    labels, -100 where a token takes no part. The loss is a mean over the labelled tokens of the global batch:
    all micro-batches of a step, all processes. Evaluation reports the same mean over the whole set as
    `eval_loss`, and for "responses" the estimator's value as `eval_divergence`.
    """

    def __init__(self, *, method: Method, teacher: Any = None, args: Any = None, **options: Any):
        require_method(method, ("responses", "tokens"), "Trainer", "method=GKD(KL()) and teacher=, or SFT()")
        require_teacher(method, teacher, "Trainer")
        for name in UNUSED:
            if options.get(name) is not None:
                raise TypeError(f"Trainer({name}=...) would do nothing: the model makes no logits here")
        if args is not None:
            refuse_options(args, transformers.TrainingArguments, INSTEAD)
        super().__init__(args=args, **options)
        _check_processes(self.args)
        self.method = method
        # So that the Trainer counts labels, of which the first predicts nothing, and divides by nothing else.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._sums: dict[str, Tensor] = {}
        self._metrics: dict[str, list[float]] = {}
        self.teacher: Any = None
        check_models(self.model, teacher)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs:
            raise TypeError("no outputs of the model are made here; call the model itself for its logits")
        out = as_forward(model, self.accelerator.unwrap_model(model), self._out, inputs, num_items_in_batch)
        for name, value in out.metrics.items():
            self._metrics.setdefault(name, []).append(value.item())
        # Gradients will be averaged over processes, while tokens are counted over all of them.
        averaged = self.accelerator.num_processes // self.get_tp_size()
        return out.loss if num_items_in_batch is None else out.loss * averaged

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            sums = as_forward(model, self.accelerator.unwrap_model(model), self._evaluated, inputs)
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        return sums["loss"] / sums["tokens"].clamp(min=1), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        self._sums.clear()
        result = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        accelerator: Any = self.accelerator
        sums = {name: accelerator.reduce(value, "sum").item() for name, value in self._sums.items()}
        tokens = max(sums.pop("tokens", 0), 1)
        # The Trainer's own mean is over examples, whatever number of tokens each has.
        metrics: Any = result.metrics
        metrics.update({f"{metric_key_prefix}_{name}": total / tokens for name, total in sums.items()})
        return result

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            logs.update({name: sum(values) / len(values) for name, values in self._metrics.items()})
            self._metrics.clear()
        super().log(logs, *args, **options)

    def _out(self, inputs: Any, count: Tensor | None) -> Out:
        return self.method(count=count, **self._tensors(inputs))

    def _evaluated(self, inputs: Any) -> dict[str, Tensor]:
        return sums_over(self.method, self._tensors(inputs))

    def _tensors(self, inputs: Any) -> dict[str, Tensor]:
        student: Any = self.accelerator.unwrap_model(self.model)
        teacher: Any = None if self.teacher is None else self.accelerator.unwrap_model(self.teacher)
        with (
            self.accelerator.autocast()
        ):  # which accelerate puts around the forward pass that is left out here
            return batch_evidence(self.method, student, teacher, inputs)


def _check_processes(args: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} devices in one process mean nn.DataParallel, which is not supported; "
            "start one process a device, with torchrun or accelerate launch"
        )
    parallel = args.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError("context and sequence parallelism cut labels from their states; set both sizes to 1")
