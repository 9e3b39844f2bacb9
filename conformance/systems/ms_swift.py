"""ms-swift: the loss of its GKD trainer, which it keeps in a module of its own."""

from importlib.metadata import version

import torch
from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss, jsd_loss
from torch import Tensor

from conformance.system import Rows, System, TruncatedRows

BETAS = {"forward KL": 0.0, "reverse KL": 1.0, "JSD(0.1)": 0.1, "JSD(0.5)": 0.5, "JSD(0.9)": 0.9}
TRUNCATED = {"forward KL": 0.0, "reverse KL": 1.0, "JSD(0.5)": 0.5}


class Adapter(System):
    name = "ms-swift"
    version = version("ms-swift")

    def divergences(self) -> dict[str, Rows]:
        return {name: lambda p, q, beta=beta: self.jsd(p, q, beta) for name, beta in BETAS.items()}

    def jsd(self, teacher: Tensor, student: Tensor, beta: float) -> Tensor:
        rows = zip(student.split(1), teacher.split(1), strict=True)
        return torch.stack([jsd_loss(q, p, beta) for q, p in rows])

    def mismatched_vocabulary(self, teacher: Tensor, student: Tensor) -> Tensor:
        return _by_row(student, lambda i: TeacherOutput(full_logits=teacher[i : i + 1].unsqueeze(0)), 1.0)

    def truncated(self) -> dict[str, TruncatedRows]:
        return {name: _truncated(beta) for name, beta in TRUNCATED.items()}

    def tempered_truncated(self, teacher: Tensor, student: Tensor, k: int, temperature: float) -> Tensor:
        return _truncated(0.0, temperature)(teacher, student, k)

    def served(self, log_probs: Tensor, ids: Tensor, student: Tensor) -> Tensor:
        served = TeacherOutput(topk_logprobs=log_probs.unsqueeze(0), topk_indices=ids.unsqueeze(0))
        return _mean(student, served, torch.ones(len(student), dtype=torch.bool))

    def token_mean(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
        return _mean(student, TeacherOutput(full_logits=teacher.unsqueeze(0)), mask, count)


def _truncated(beta: float, temperature: float = 1.0) -> TruncatedRows:
    def rows(teacher: Tensor, student: Tensor, k: int) -> Tensor:
        whole = TeacherOutput(full_logits=teacher.unsqueeze(0)).to_topk(k)
        values, indices = whole.topk_logprobs, whole.topk_indices
        return _by_row(
            student,
            lambda i: TeacherOutput(topk_logprobs=values[:, i : i + 1], topk_indices=indices[:, i : i + 1]),
            beta,
            temperature,
        )

    return rows


def _by_row(student: Tensor, teacher, beta: float, temperature: float = 1.0) -> Tensor:
    label = torch.zeros(1, 1, dtype=torch.long)
    totals = [
        gkd_loss(q.unsqueeze(0), teacher(i), label, beta, temperature)[0]
        for i, q in enumerate(student.split(1))
    ]
    return torch.stack(totals)


def _mean(student: Tensor, teacher: TeacherOutput, mask: Tensor, count: int | None = None) -> Tensor:
    """As the trainer's `_compute_jsd_loss` divides it."""
    labels = torch.where(mask, 0, -100).unsqueeze(0)
    total, valid = gkd_loss(student.unsqueeze(0), teacher, labels, beta=0.0, temperature=1.0)
    if valid == 0:
        return total * 0
    return total / (valid if count is None else count)
