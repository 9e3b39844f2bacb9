"""verl: its KL estimators, its top-k distillation loss and its aggregation."""

from types import SimpleNamespace

import torch
from torch import Tensor
from verl import __version__
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk, kl_divergence
from verl.trainer.ppo.core_algos import agg_loss, kl_penalty
from verl.workers.config import ActorConfig

from conformance.system import Penalty, System, TruncatedRows

ESTIMATOR = ActorConfig.__dataclass_fields__["kl_loss_type"].default


class Adapter(System):
    name = "verl"
    version = __version__

    def penalties(self) -> dict[str, Penalty]:
        return {f"reverse KL, {ESTIMATOR}": lambda log_p, log_q, _: kl_penalty(log_q, log_p, ESTIMATOR)}

    def ratio_functions(self):
        return {f"value of {ESTIMATOR}": lambda x: kl_penalty(x, torch.zeros_like(x), ESTIMATOR)}

    def truncated(self) -> dict[str, TruncatedRows]:
        return {"forward KL": _forward_kl_topk}

    def reductions(self):
        return {"agg_loss without batch_num_tokens": self.token_mean}

    def token_mean(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
        rows = kl_divergence(student.log_softmax(-1), teacher.log_softmax(-1))
        return agg_loss(rows.unsqueeze(0), mask.unsqueeze(0), "token-mean", batch_num_tokens=count)


def _forward_kl_topk(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    log_probs, ids = teacher.log_softmax(-1).topk(k)
    # The values of verl's YAML files, which are what runs; its dataclass has a clamp of -10 instead of none.
    config = SimpleNamespace(
        distillation_loss=SimpleNamespace(use_chunked_topk=False, log_prob_min_clamp=None)
    )
    nested = [torch.nested.as_nested_tensor([t], layout=torch.jagged) for t in (log_probs, ids)]
    out = compute_forward_kl_topk(student.unsqueeze(0), *nested, config, "thd")
    return out["distillation_losses"].squeeze(0).clamp_min(0.0)  # the trainer's own next step
