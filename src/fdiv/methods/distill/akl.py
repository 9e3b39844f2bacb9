"""AKL: forward and reverse KL, weighted by where teacher and student differ.

Wu, Tao, Wang, Yang, Zhao and Wong, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
Large Language Models", arXiv 2404.02657.

    L = < g_h/(g_h + g_t) KL(p, q) + g_t/(g_h + g_t) KL(q, p) > over tokens
    g_h = sum over the head of |p - q|,  g_t = sum over the tail

The head holds the teacher's likeliest tokens up to the mass mu, and always the likeliest one. The paper's mu
is `head`; p is the teacher and q the student. The weights carry no gradient.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, on_one_support, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill._writer import require_sampler
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Offline


@dataclass(frozen=True)
class AKL:
    """The mean over response tokens of share D(p, q) + (1 - share) D(q, p), share as in `head_share`.

    divergence: fits the head; its reverse fits the tail. KL() is the paper's.
    head: the teacher's mass that counts as its head.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: FDivergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=Exact)
    sampler: Sampler = field(default_factory=Offline)
    head: float = 0.5

    def __post_init__(self):
        require_f_divergence(self.divergence, "AKL, which weights D(p, q) against D(q, p),")
        require_sampler(self.sampler)
        if self.estimator.sees != "logits":
            raise TypeError(
                f"AKL sorts whole rows of the teacher, which {self.estimator!r} does not see; write Exact(), "
                "TopK(k) or SampledLogits(n)"
            )
        if not 0 <= self.head < 1:
            raise ValueError(
                f"head is a mass in [0, 1), got {self.head!r}: 0 is the likeliest token alone; with no tail "
                "left the loss is D(p, q), write GKD()"
            )

    def __call__(self, *, log_p: Tensor, log_q: Tensor, count: Tensor | float | None = None) -> Out:
        """log_p, log_q [rows, vocab]; count: response tokens of the global batch (default: here)."""
        share = head_share(log_p, log_q, self.head)
        forward = self.estimator(self.divergence, log_p, log_q)
        backward = self.estimator(self.divergence.reverse, log_p, log_q)
        loss = mean_over_tokens(share * forward + (1 - share) * backward, count=count)
        return Out(loss, {"head_share": mean_over_tokens(share)})


@torch.no_grad()
def head_share(log_p: Tensor, log_q: Tensor, mass: float) -> Tensor:
    """The part of sum |p - q| that lies in p's head, 1/2 where p = q; [..., vocab] twice -> [...]."""
    p, q = (t.exp() for t in on_one_support(log_p, log_q))
    p, order = torch.sort(p, stable=True, dim=-1, descending=True)
    in_head = p.cumsum(-1) <= mass
    in_head[..., 0] = True
    gap = (p - q.gather(-1, order)).abs()
    inside, total = torch.where(in_head, gap, 0.0).sum(-1), gap.sum(-1)
    return torch.where(total > 0, inside / total, 0.5)
