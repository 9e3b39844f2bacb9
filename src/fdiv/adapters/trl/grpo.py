"""TRL's GRPOTrainer under any divergence to the reference."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer import grpo_trainer as host
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.utils import get_config_model_id, use_adapter

from fdiv.adapters._options import refuse_options, require_method
from fdiv.adapters.trl._metrics import log_of, masked_mean, mean
from fdiv.methods._method import Out
from fdiv.methods.rl.grpo import GRPO

ELSEWHERE = "use trl.GRPOTrainer for it"
INSTEAD = {
    "beta": "write GRPO(beta={value!r})",
    "epsilon": "write GRPO(clip={value!r})",
    "epsilon_high": "write GRPO(clip=(low, high))",
    "use_bias_correction_kl": "write GRPO(estimator=MonteCarlo()), whose gradient is the divergence's own",
    "loss_type": "write GRPO(aggregate='tokens') for 'dapo', 'sequences' for 'grpo', a length for 'dr_grpo'",
    "importance_sampling_level": "write GRPO(ratio={value!r})",
} | dict.fromkeys(
    (
        "delta",
        "off_policy_mask_threshold",
        "top_entropy_quantile",
        "entropy_coef",
        "use_adaptive_entropy",
        "entropy_coef_min",
        "entropy_coef_max",
        "entropy_coef_delta",
        "entropy_target",
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "vespo_k_pos",
        "vespo_lambda_pos",
        "vespo_k_neg",
        "vespo_lambda_neg",
    ),
    ELSEWHERE,
)
IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class Seen(NamedTuple):
    """What one forward pass of the policy tells of the sampled tokens."""

    log_policy: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    router_loss: Tensor | None
    evidence: dict[str, Tensor]


class GRPOTrainer(host.GRPOTrainer):
    """TRL's trainer, its sampling, rewards and advantages; the loss is `method`'s.

    method: a GRPO. Other arguments are those of trl.GRPOTrainer, by keyword. Advantages stay TRL's
    (`scale_rewards`, `reward_weights`, ...): by default they are the method's own formula, and a micro-batch
    need not hold whole groups. MonteCarlo() scores the sampled tokens; Exact(), TopK(k) and SampledLogits(n)
    see log-probabilities of policy and reference, each [B, T, vocabulary] of the micro-batch.
    Logged beside TRL's numbers: `divergence`, `ratio`, `clip_ratio/region_mean`.
    """

    def __init__(self, *, method: GRPO, model: Any, args: Any = None, **options: Any):
        require_method(method, ("rollouts",), "GRPOTrainer", "method=GRPO(ReverseKL(), beta=0.04)")
        if not isinstance(method, GRPO):
            raise TypeError(f"GRPOTrainer hands TRL's advantages to a GRPO, got {method!r}; write GRPO(...)")
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
        _check(args, method)
        args = copy.copy(args)
        args.beta = method.beta  # TRL loads and scores a reference if its beta is not 0
        self.method = method
        super().__init__(model=model, args=args, **options)
        if method.estimator.sees == "logits" and (self._is_vlm or self.aux_loss_enabled):
            raise ValueError(
                f"{method.estimator!r} is not supported for models of images or with a router loss; "
                "write GRPO(estimator=MonteCarlo())"
            )

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"]
        mask = (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()
        whole = self.method.estimator.sees == "logits"
        seen = self._see_vocabulary(model, inputs) if whole else self._see_tokens(model, inputs)
        log_behaviour = inputs.get("old_per_token_logps", seen.log_policy.detach())
        count = self._count(inputs, model.training)
        out = self.method(
            log_policy=seen.log_policy,
            log_behaviour=log_behaviour,
            advantage=inputs["advantages"],
            mask=mask,
            count=count,
            sequences=self._sequences(len(mask), model.training),
            **seen.evidence,
        )
        self._record(out, seen, mask)
        if seen.router_loss is None:
            return out.loss
        # TRL leaves it to this function to scale by the micro-batches of a step.
        parts = self.current_gradient_accumulation_steps if model.training else 1
        return out.loss + self.router_aux_loss_coef * seen.router_loss / parts

    def _record(self, out: Out, seen: Seen, mask: Tensor) -> None:
        log = log_of(self)
        log["entropy"].append(masked_mean(self.accelerator, seen.entropy, mask))
        log["ratio"].append(mean(self.accelerator, out.metrics["ratio"]))
        log["clip_ratio/region_mean"].append(mean(self.accelerator, out.metrics["clipped"]))
        if "divergence" in out.metrics:
            log["divergence"].append(mean(self.accelerator, out.metrics["divergence"]))
        if seen.router_loss is not None:
            log["aux_loss"].append(mean(self.accelerator, seen.router_loss))

    def _count(self, inputs: dict, training: bool) -> Tensor:
        """The tokens of the global batch that one step sees, over the processes that average gradients."""
        count = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if not training:
            return count
        # TRL counts over all it generated at once, which may last for several steps or for part of one.
        args: Any = self.args
        return count * self.current_gradient_accumulation_steps / args.steps_per_generation

    def _sequences(self, rows: int, training: bool) -> float:
        """The sequences of the global batch, likewise: every micro-batch has as many."""
        return rows * (self.current_gradient_accumulation_steps if training else 1)

    def _see_tokens(self, model: Any, inputs: dict) -> Seen:
        log_policy, entropy, router_loss = self._get_per_token_logps_and_entropies(
            model,
            *_sequences(inputs),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in IMAGES if name in inputs},
        )
        evidence = {"log_p": inputs["ref_per_token_logps"], "log_q": log_policy} if self.method.beta else {}
        return Seen(log_policy, entropy, router_loss, evidence)

    def _see_vocabulary(self, model: Any, inputs: dict) -> Seen:
        log_q = self._log_softmax(model, *_sequences(inputs))
        log_policy = log_q.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
        entropy = -(log_q.detach().exp() * log_q.detach()).sum(-1)
        evidence = {"log_p": self._reference(inputs), "log_q": log_q} if self.method.beta else {}
        return Seen(log_policy, entropy, None, evidence)

    def _log_softmax(self, model: Any, ids: Tensor, attention: Tensor, width: int) -> Tensor:
        """Log-probabilities of the last `width` tokens' whole vocabulary, [B, width, vocab]."""
        with self.accelerator.autocast():
            logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=width + 1).logits
        return (logits[:, -width - 1 : -1].float() / self.temperature).log_softmax(-1)

    @torch.no_grad()
    def _reference(self, inputs: dict) -> Tensor:
        if self.ref_model is not None:
            return self._log_softmax(self.ref_model, *_sequences(inputs))
        policy: Any = self.accelerator.unwrap_model(self.model)  # with adapters, the reference is without
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            return self._log_softmax(self.model, *_sequences(inputs))


def _sequences(inputs: dict) -> tuple[Tensor, Tensor, int]:
    """Prompts with completions [B, S], their attention mask, and the width T of the completions."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return ids, mask, inputs["completion_ids"].shape[1]


def _check(args: Any, method: GRPO) -> None:
    refuse_options(args, GRPOConfig, INSTEAD)
    if method.advantage == "mean" and args.scale_rewards not in (False, "none"):
        raise ValueError(
            f"{method!r} does not divide by the group's deviation, and TRL makes the advantages: write "
            "GRPOConfig(scale_rewards=False)"
        )
    if args.use_vllm and args.vllm_importance_sampling_correction:
        raise ValueError(
            "the ratio between vLLM's and the trainer's probabilities is no part of the method: write "
            "GRPOConfig(vllm_importance_sampling_correction=False)"
        )
