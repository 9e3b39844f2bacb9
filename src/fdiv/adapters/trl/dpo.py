"""TRL's DPOTrainer under any divergence."""

from typing import Any

import torch
from torch import Tensor
from trl.trainer import dpo_trainer as host
from trl.trainer.dpo_config import DPOConfig

from fdiv.adapters._options import refuse_options, require_method
from fdiv.adapters.trl._metrics import log_of, masked_mean, mean
from fdiv.methods._method import Method

INSTEAD = {
    "beta": "write FDPO(beta={value!r})",
    "loss_type": "write FDPO(loss='sigmoid'), 'hinge', 'ipo', 'robust' or 'exo' (exo_pair), and "
    "length_normalised=True for TRL's ipo and sigmoid_norm; use trl.DPOTrainer for its other losses",
    "loss_weights": "train under one loss",
    "f_divergence_type": "write FDPO(divergence=...): ReverseKL(), KL(), 2 * JS(0.5), Alpha.trl(c)",
    "f_alpha_divergence_coef": "write FDPO(divergence=Alpha.trl({value!r}))",
    "label_smoothing": "write FDPO(label_smoothing={value!r})",
    "ld_alpha": "use trl.DPOTrainer for it",
    "use_weighting": "use trl.DPOTrainer for it",
    "discopop_tau": "use trl.DPOTrainer for it",
}
# Under TRL's names, so that its dashboards go on working.
NAMES = {
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
}
Pair = tuple[Tensor, Tensor]  # of chosen and rejected responses
WITHOUT_LENGTHS = ("log_p_chosen", "log_p_rejected", "log_q_chosen", "log_q_rejected")
READABLE = {*WITHOUT_LENGTHS, "length_chosen", "length_rejected"}
NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


class DPOTrainer(host.DPOTrainer):
    """TRL's trainer, its pairs and its reference model; the loss is `method`'s, as FDPO's.

    method: consumes "pairs". Other arguments are those of trl.DPOTrainer, by keyword. The loss is a mean over
    pairs and, as TRL's, over the micro-batches of a step, which therefore should be of one size. Logged:
    the method's metrics (its rewards are those that are optimised) and TRL's numbers on the policy.
    """

    def __init__(self, *, method: Method, args: Any = None, **options: Any):
        require_method(method, ("pairs",), "DPOTrainer", "method=FDPO(ReverseKL(), beta=0.1)")
        if unknown := set(getattr(method, "reads", WITHOUT_LENGTHS)) - READABLE:
            raise TypeError(
                f"{method!r} reads {', '.join(sorted(unknown))}, which TRL's pairs do not have; train it "
                "by a recipe, or write a method of whole responses such as FDPO()"
            )
        if args is not None:
            refuse_options(args, DPOConfig, INSTEAD)
        self.method = method
        super().__init__(args=args, **options)

    def _compute_loss(self, model, inputs, return_outputs):
        arguments = {name: t for name, t in inputs.items() if name not in NOT_FOR_THE_MODEL}
        arguments["use_cache"] = False
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        outputs = self._scored(model, arguments, inputs)
        log_q = _per_response(outputs.log_probs, inputs)
        log_p = self._reference(inputs)
        out = self.method(**self._readable(log_p, log_q, inputs))
        loss = out.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._record(model, inputs, outputs, log_q, out.metrics)
        if not return_outputs:
            return loss
        with torch.no_grad():  # the scored forward pass makes no logits
            return loss, model(**arguments)

    def _readable(self, log_p: Pair, log_q: Pair, inputs: dict) -> dict[str, Tensor]:
        scored = inputs["completion_mask"][:, 1:].sum(1)  # the first token of a text has no prediction
        lengths = scored.to(log_q[0].dtype).chunk(2)
        menu = {
            f"{name}_{side}": pair[i]
            for name, pair in (("log_p", log_p), ("log_q", log_q), ("length", lengths))
            for i, side in enumerate(("chosen", "rejected"))
        }
        return {name: menu[name] for name in getattr(self.method, "reads", WITHOUT_LENGTHS)}

    def _scored(self, model: Any, arguments: dict, inputs: dict) -> Any:
        """log_probs, entropy, mean_logits and is_top1 of each completion token, [2 pairs, S - 1]."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return model(**arguments, labels=labels, fused_lm_head=True)

    def _reference(self, inputs: dict) -> Pair:
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    def _record(
        self, model: Any, inputs: dict, outputs: Any, log_q: Pair, metrics: dict[str, Tensor]
    ) -> None:
        log = log_of(self)
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = mask.chunk(2)
        width = mask.shape[1]  # prompt-learning adapters put virtual tokens in front
        logits = outputs.mean_logits[:, -width:].chunk(2)
        log["entropy"].append(masked_mean(self.accelerator, outputs.entropy[:, -width:], mask))
        log["logits/chosen"].append(masked_mean(self.accelerator, logits[0], chosen))
        log["logits/rejected"].append(masked_mean(self.accelerator, logits[1], rejected))
        top1 = outputs.is_top1[:, -width:].chunk(2)[0]
        log["mean_token_accuracy"].append(masked_mean(self.accelerator, top1, chosen))
        log["logps/chosen"].append(mean(self.accelerator, log_q[0].mean()))
        log["logps/rejected"].append(mean(self.accelerator, log_q[1].mean()))
        for name, value in metrics.items():
            log[NAMES.get(name, name)].append(mean(self.accelerator, value))
        if self.aux_loss_enabled:
            log["aux_loss"].append(mean(self.accelerator, outputs.aux_loss))
        if model.training:
            accelerator: Any = self.accelerator
            tokens = accelerator.reduce(inputs["attention_mask"].sum(), "sum").item()
            self._total_train_tokens += tokens // self._tp_size
        log["num_tokens"] = [self._total_train_tokens]


def _per_response(log_probs: Tensor, inputs: dict) -> Pair:
    """The sums over chosen and rejected completions, [pairs] each; tokens that do not count are 0."""
    width = inputs["completion_mask"].shape[1] - 1
    chosen, rejected = log_probs[:, -width:].sum(1).chunk(2)
    return chosen, rejected
