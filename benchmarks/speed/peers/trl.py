"""TRL: the divergence on whole logits (GKDTrainer), and its tiled functions (trl.kernels)."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from functools import cache
from tempfile import mkdtemp
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, default_data_collator
from trl.experimental.gkd import GKDConfig
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from benchmarks.speed.case import Outcome
from benchmarks.speed.heads import Heads, differentiate
from benchmarks.speed.peers import beta_of
from fdiv import FDivergence

VOCAB_TILE = 32768  # of ChunkedLogProbFunction: what the trainers pass


def gkd(divergence: FDivergence, given: Heads, valid: Tensor | None = None, upcast: bool = False) -> Outcome:
    """GKDTrainer.generalized_jsd_loss on both models' logits for all rows."""
    with torch.no_grad():
        z_p = given.p_hidden @ given.p_weight.T
    z_q = given.q_hidden @ given.q_weight.T
    if upcast:
        z_p, z_q = z_p.float(), z_q.float()
    loss = GKDTrainer.generalized_jsd_loss(z_q, z_p, _labels(valid), beta_of(divergence))
    return differentiate(loss, given.trained)


def gkd_training_step(divergence: FDivergence, teacher: Any, student: Any, ids: Tensor) -> Outcome:
    """GKDTrainer.training_step on given text: both models' logits, the loss on them, all gradients."""
    trainer = _trainer(beta_of(divergence), teacher, student)
    labels = ids.clone()
    labels[:, 0] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch |= {"prompts": ids[:, :1], "prompt_attention_mask": torch.ones_like(ids[:, :1])}
    student.zero_grad()
    return Outcome(trainer.training_step(trainer.model, batch).detach())


@cache
def _trainer(beta: float, teacher: Any, student: Any) -> GKDTrainer:
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    options = {"output_dir": mkdtemp(), "report_to": "none", "use_cpu": True, "bf16": False}
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(lmbda=0.0, beta=beta, gradient_checkpointing=False, **options),
        train_dataset=Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]}),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.current_gradient_accumulation_steps = 1  # its loop sets it
    return trainer


def gkd_from_logits(divergence: FDivergence, z_p: Tensor, z_q: Tensor) -> Outcome:
    """The same with logits given: the mean over rows and its gradient in z_q."""
    z_q = z_q.detach().requires_grad_()
    loss = GKDTrainer.generalized_jsd_loss(z_q, z_p, beta=beta_of(divergence))
    return differentiate(loss, [z_q])


def chunked_divergence(divergence: FDivergence, given: Heads, valid: Tensor | None = None) -> Outcome:
    """DistillationTrainer's function, called as its loss calls it off CUDA: masked rows are computed too."""
    rows, _ = ChunkedDivergenceFunction.apply(
        given.q_hidden, given.q_weight, None, given.p_hidden, given.p_weight, None, beta_of(divergence)
    )
    loss = rows.mean() if valid is None else rows.masked_fill(~valid, 0).sum() / valid.sum()
    return differentiate(loss, given.trained)


def chunked_log_prob(given: Heads, index: Tensor, entropy_weight: float) -> Outcome:
    log_prob, entropy, *_ = ChunkedLogProbFunction.apply(
        given.q_hidden, given.q_weight, None, index, 1.0, VOCAB_TILE, None, 1.0, ("entropy",)
    )
    return differentiate(-log_prob.mean() - entropy_weight * entropy.mean(), given.trained)


def selected_log_prob(given: Heads, index: Tensor, entropy_weight: float) -> Outcome:
    """selective_log_softmax and entropy_from_logits on logits for all rows."""
    logits = given.q_hidden @ given.q_weight.T
    log_prob, entropy = selective_log_softmax(logits, index), entropy_from_logits(logits)
    return differentiate(-log_prob.mean() - entropy_weight * entropy.mean(), given.trained)


def _labels(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else torch.where(valid, 0, -100)
