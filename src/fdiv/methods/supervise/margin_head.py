"""A support vector machine as the last layer of a network, in the place of softmax and cross-entropy.

Agarap, "A Neural Network Architecture Combining Gated Recurrent Unit (GRU) and Support Vector Machine (SVM)
for Intrusion Detection in Network Traffic Data", arXiv 1709.03082.

    L = |W|^2 / 2 + C sum over examples i and classes k of max(0, 1 - y_ik s_ik)^2

W is the head's weight without its bias, s are the scores, y is 1 for the label and -1 for the other classes.
The class is that of the largest s. The paper's network is a GRU, fdiv.networks.gru.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fdiv._divergence import FDivergence
from fdiv.divergences.tv import TV
from fdiv.methods._method import Consumes, Out
from fdiv.methods.supervise._labels import scores_of


@dataclass(frozen=True)
class MarginHead:
    """The squared hinge of scores, one class against the others, and the squared norm of the head's weight.

    c: the paper's C, of hinges summed over the *batch* against the norm, so that twice the batch is twice
        the c.
    aggregate: "sum", the paper's; "mean" divides all of it by the examples of the global batch, which leaves
        where it is least and makes gradients as large as cross-entropy's.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("logits", "labels", "network")
    divergence: ClassVar[FDivergence] = (
        TV()
    )  # scores tell no probabilities; the hinge stands for the error rate

    c: float = 0.5
    aggregate: Literal["mean", "sum"] = "mean"

    def __post_init__(self):
        if not 0 < self.c < math.inf:
            raise ValueError(f"c is finite and > 0, got {self.c!r}")
        if self.aggregate not in ("mean", "sum"):
            raise ValueError(f"aggregate is 'mean' or 'sum', got {self.aggregate!r}")

    def __call__(
        self, *, logits: Tensor, labels: Tensor, network: nn.Module, count: Tensor | float | None = None
    ) -> Out:
        """logits [B, C], labels [B], network.head of which the weight is taken.

        count: examples of the global batch (default: here). A call has its examples' share of the norm.
        metrics: `hinge`, the mean over examples of their sum over classes; `norm`, of the weight.
        """
        scores = scores_of(logits, labels)
        sign = torch.where(
            torch.arange(scores.shape[1], device=scores.device) == labels.unsqueeze(-1), 1.0, -1.0
        )
        hinge = (1 - sign.to(scores) * scores).clamp(min=0.0).square().sum(-1)
        weight = head_of(network).weight
        whole = max(float(len(scores) if count is None else count), 1.0)
        square = weight.square().sum()
        loss = square / 2 * (len(scores) / whole) + self.c * hinge.sum()
        metrics = {"hinge": hinge.detach().sum() / max(len(scores), 1), "norm": square.detach().sqrt()}
        return Out(loss if self.aggregate == "sum" else loss / whole, metrics)


def head_of(network: nn.Module) -> nn.Linear:
    head = getattr(network, "head", None)
    if not isinstance(head, nn.Linear):
        raise TypeError(f"network.head is the linear layer whose norm is kept small, got {head!r}")
    return head
