"""Liger-Kernel: the chunked distillation losses, which run without a GPU."""

from importlib.metadata import version

import torch
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction, LigerFusedLinearJSDLoss
from torch import Tensor

from conformance.system import Rows, System

BETAS = {"forward KL": 0.0, "reverse KL": 1.0, "JSD(0.1)": 0.1, "JSD(0.5)": 0.5, "JSD(0.9)": 0.9}


class Adapter(System):
    name = "liger"
    version = version("liger-kernel")

    def divergences(self) -> dict[str, Rows]:
        return {name: lambda p, q, beta=beta: self.jsd(p, q, beta) for name, beta in BETAS.items()}

    def jsd(self, teacher: Tensor, student: Tensor, beta: float) -> Tensor:
        loss = LigerFusedLinearJSDFunction.distillation_loss_fn
        rows = zip(student.split(1), teacher.split(1), strict=True)
        return torch.stack([loss(q, p, beta=beta) for q, p in rows])

    def configure_jsd(self, beta: float) -> object:
        return LigerFusedLinearJSDLoss(beta=beta)

    def mismatched_vocabulary(self, teacher: Tensor, student: Tensor) -> Tensor:
        one = torch.ones(1, 1)
        heads = zip(teacher.float(), student.detach().float(), strict=True)  # a row of logits is a head on 1
        rows = [self.fused_jsd((one, p.unsqueeze(1)), (one, q.unsqueeze(1)), 1.0) for p, q in heads]
        return torch.stack(rows)

    def fused_jsd(self, teacher, student, beta, mask=None, chunk=None) -> Tensor:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=chunk or 1024
        )
        labels = torch.zeros(len(student[0]), dtype=torch.long)
        if mask is not None:
            labels[~mask] = -100
        return loss(*student, *teacher, labels)

    def token_mean(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
        if count is not None:
            self.lacks("global token count: the loss divides by the tokens of its own call")
        head = torch.eye(teacher.shape[-1], dtype=teacher.dtype)
        return self.fused_jsd((teacher, head), (student, head), 0.0, mask=mask)
