"""TRL: the losses of its trainers, called with the few attributes of a trainer that they read.

Methods of a trainer are called unbound on a namespace in its place: what is judged is TRL's own code, without
the models, data and processes that a trainer is built with.
"""

import math
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor
from trl import DPOConfig, GRPOConfig
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.sdpo import SDPOConfig
from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
from trl.kernels import chunked_divergence
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

from conformance.system import Penalty, Rows, System, TruncatedRows
from conformance.systems import trl_on_policy

BETAS = {"forward KL": 0.0, "reverse KL": 1.0, "JSD(0.1)": 0.1, "JSD(0.5)": 0.5, "JSD(0.9)": 0.9}
TRUNCATED = {"forward KL": 0.0, "reverse KL": 1.0, "JSD(0.5)": 0.5}
PREFERENCES = {
    "reverse KL": "reverse_kl",
    "forward KL": "forward_kl",
    "JS": "js_divergence",
    "alpha": "alpha_divergence",
}


def default(config: type, field: str):
    """What a user gets who does not set the field."""
    return config.__dataclass_fields__[field].default


class Adapter(System):
    name = "trl"
    version = version("trl")
    reasons: ClassVar[dict[str, str]] = {
        "C07": "its scores are made inside its trainer's loss and cannot be called alone",
        "C12": "advantages are computed inside a rollout, not in a function that can be called alone",
    }

    # -- on the whole vocabulary --------------------------------------------------------------------------

    def divergences(self) -> dict[str, Rows]:
        plain = {f"{name}, GKD": partial(self.jsd, beta=beta) for name, beta in BETAS.items()}
        chunked = {f"{name}, chunked": partial(_chunked_rows, beta=beta) for name, beta in BETAS.items()}
        return plain | chunked

    def jsd(self, teacher: Tensor, student: Tensor, beta: float) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1)

    def configure_jsd(self, beta: float) -> object:
        return GKDConfig(beta=beta, **OFFLINE)

    def mismatched_vocabulary(self, teacher: Tensor, student: Tensor) -> Tensor:
        return self.jsd(teacher, student, 1.0)

    # -- from hidden states and heads ---------------------------------------------------------------------

    def fused_jsd(self, teacher, student, beta, mask=None, chunk=None) -> Tensor:
        mask = torch.ones(len(student[0])) if mask is None else mask.int()
        hidden = student[0].unsqueeze(0), teacher[0].unsqueeze(0)
        with mock.patch.object(
            chunked_divergence, "TOKEN_CHUNK_SIZE", chunk or chunked_divergence.TOKEN_CHUNK_SIZE
        ):
            return _chunked_divergence_loss(*hidden, student[1], teacher[1], mask.unsqueeze(0), beta)[0]

    # -- on a few atoms -----------------------------------------------------------------------------------

    def truncated(self) -> dict[str, TruncatedRows]:
        tail = default(SDPOConfig, "distillation_add_tail")
        return {f"{name}, SDPO": partial(_sdpo, alpha=alpha, tail=tail) for name, alpha in TRUNCATED.items()}

    def with_tail(self) -> dict[str, TruncatedRows]:
        return {f"{name}, SDPO": partial(_sdpo, alpha=alpha, tail=True) for name, alpha in TRUNCATED.items()}

    def served(self, log_probs: Tensor, ids: Tensor, student: Tensor) -> Tensor:
        trainer = SimpleNamespace(
            loss_add_tail=default(ServerDistillationConfig, "loss_add_tail"),
            _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss,
        )
        served = {"topk_logprobs": log_probs.unsqueeze(0), "topk_token_ids": ids.unsqueeze(0)}
        labels = torch.where((log_probs > -math.inf).any(-1), 0, -100).unsqueeze(0)
        loss = ServerDistillationTrainer._compute_server_forward_kl_loss
        return loss(trainer, served, student.log_softmax(-1).unsqueeze(0), labels)

    # -- sampled tokens -----------------------------------------------------------------------------------

    def penalties(self) -> dict[str, Penalty]:
        return {"reverse KL, GRPO": _grpo_penalty}

    # -- preferences --------------------------------------------------------------------------------------

    def preference_scores(self):
        coefficient = default(DPOConfig, "f_alpha_divergence_coef")
        return {name: partial(_scores, kind=kind, alpha=coefficient) for name, kind in PREFERENCES.items()}

    def alpha_score(self, log_ratio: Tensor, alpha: float) -> Tensor:
        return _scores(log_ratio, "alpha_divergence", alpha)

    def preference_margins(self, chosen: float, rejected: float) -> tuple[float, float]:
        loss, trainer = _dpo(
            torch.tensor([chosen]), torch.tensor([rejected]), "forward_kl", 0.5, "sigmoid", 0.1
        )
        return trainer._metrics["eval"]["rewards/margins"][-1], -loss.expm1().log().item()

    # -- a training loss ----------------------------------------------------------------------------------

    def token_mean(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(
            student.unsqueeze(0), teacher.unsqueeze(0), _labels(mask), beta=0.0, num_items_in_batch=count
        )

    def reductions(self):
        return {"GKD": self.token_mean, "the chunked kernel": self._chunked_mean}

    def _chunked_mean(self, teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
        head = torch.eye(teacher.shape[-1])
        return self.fused_jsd((teacher, head), (student, head), 0.0, mask=mask)

    def distil(self, teacher, student, ids: Tensor, mask: Tensor) -> Tensor:
        trainer = SimpleNamespace(
            teacher_model=teacher, beta=0.0, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss
        )
        inputs = {
            "input_ids": ids,
            "attention_mask": _attention(mask),
            "labels": torch.where(mask, ids, -100),
        }
        return GKDTrainer.compute_loss(trainer, student, inputs)

    def stop_token_mask(self, rollout: Tensor, prompt: int, eos: int) -> Tensor:
        model = SimpleNamespace(generate=lambda **options: SimpleNamespace(sequences=rollout))
        prompts = rollout[:, :prompt]
        inputs = {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
        generation = SimpleNamespace(eos_token_id=eos)
        return GKDTrainer.generate_on_policy_outputs(model, inputs, generation)[2] != -100

    def on_policy_denominator(self) -> tuple[float, float]:
        return trl_on_policy.denominator()

    # -- configuration ------------------------------------------------------------------------------------

    def unknown_options(self):
        one = torch.ones(1)
        return {
            "GKDConfig(temprature=2)": lambda: GKDConfig(temprature=2, **OFFLINE),
            "f_divergence_type='jensen'": lambda: _dpo(one, one, "jensen", 0.5, "sigmoid", 0.1),
        }


OFFLINE = {"output_dir": "unused", "report_to": [], "use_cpu": True, "bf16": False}


def _labels(mask: Tensor) -> Tensor:
    return torch.where(mask, 0, -100).unsqueeze(0)


def _attention(mask: Tensor) -> Tensor:
    """1 up to the last token of the response."""
    return mask.flip(1).cumsum(1).flip(1).clamp(max=1)


def _chunked_rows(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """The kernel on logits: they are hidden states under the identity, and -inf columns a bias of -inf."""
    columns = [t.isinf().any(0) for t in (student, teacher)]
    hidden = [t.masked_fill(c, 0.0).float() for t, c in zip((student, teacher), columns, strict=True)]
    biases = [torch.zeros(len(c)).masked_fill(c, -math.inf) for c in columns]
    head = torch.eye(teacher.shape[-1])
    arguments = (hidden[0], head, biases[0], hidden[1], head, biases[1])
    return ChunkedDivergenceFunction.apply(*arguments, beta)[0]


def _sdpo(teacher: Tensor, student: Tensor, k: int, alpha: float, tail: bool) -> Tensor:
    return compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=tail
    )


class _Alone:
    """An accelerator of one process."""

    device, num_processes = torch.device("cpu"), 1
    gather = gather_for_metrics = staticmethod(lambda tensor: tensor)
    reduce = staticmethod(lambda tensor, reduction: tensor)


def _grpo_penalty(log_reference: Tensor, log_policy: Tensor, log_behaviour: Tensor) -> Tensor:
    """The KL term of GRPO's loss at coefficient 1 and advantage 0, a rollout of one token at a time."""
    rows = zip(log_reference, log_policy, log_behaviour, strict=True)
    return torch.stack([_grpo(*(t.reshape(1, 1) for t in row)) for row in rows])


def _grpo(log_reference: Tensor, log_policy: Tensor, log_behaviour: Tensor) -> Tensor:
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_policy, torch.zeros(1, 1), None),
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(
            delta=None, use_bias_correction_kl=default(GRPOConfig, "use_bias_correction_kl")
        ),
        accelerator=_Alone(),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=1.0,
        loss_type=default(GRPOConfig, "loss_type"),
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"eval": defaultdict(list)},
    )
    one = torch.ones(1, 1, dtype=torch.long)
    inputs = {name: one for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    inputs |= {
        "advantages": torch.zeros(1),
        "old_per_token_logps": log_behaviour,
        "ref_per_token_logps": log_reference,
        "num_items_in_batch": torch.ones(()),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def _scores(log_ratio: Tensor, kind: str, alpha: float) -> Tensor:
    """Each score less the one at log-ratio 0, read off a hinge loss, which is linear where it is not 0."""
    return torch.stack([_score(x, kind, alpha) for x in log_ratio.split(1)])


def _score(log_ratio: Tensor, kind: str, alpha: float) -> Tensor:
    beta = -1.0 if log_ratio > 0 else 1.0  # relu(1 - beta delta) is not cut off on this side
    loss, _ = _dpo(log_ratio, torch.zeros(1), kind, alpha, "hinge", beta)
    return (1 - loss) / beta


def _dpo(chosen: Tensor, rejected: Tensor, kind: str, alpha: float, loss: str, beta: float):
    """(loss, trainer) of one pair with these log-ratios, each response one token long."""
    log_probs = torch.stack([chosen, rejected])  # [2, 1]
    outputs = SimpleNamespace(
        log_probs=log_probs,
        entropy=torch.zeros(2, 1),
        mean_logits=torch.zeros(2, 1),
        is_top1=torch.ones(2, 1, dtype=torch.bool),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=_Alone(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=kind,
        f_alpha_divergence_coef=alpha,
        loss_types=[loss],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    ids = torch.ones(2, 2, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
        "ref_chosen_logps": torch.zeros(1),
        "ref_rejected_logps": torch.zeros(1),
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False), trainer
