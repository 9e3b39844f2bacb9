"""DPT: a sequence model learns in context to act as an expert does, by matching its actions.

Lin, Bai and Mei, "Transformers as Decision Makers: Provable In-Context Reinforcement Learning via Supervised
Pretraining", arXiv 2310.08566; the decision-pretrained transformer of Lee et al., arXiv 2306.14892.

    L = mean over steps t of D(expert(. | D_t), model(. | D_t)),   D_t made by a context algorithm

The paper's loss is KL(), the log-likelihood of the expert's action. p is the expert, its distribution or the
action it took (`of_actions`), q the model. `coverage` estimates the paper's ratio of the two algorithms.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Out, blank, mean_over_tokens, named


@dataclass(frozen=True)
class DPT:
    """The mean over steps of D(expert, model).

    Where experts differ at one history, or one is seen only by its actions, the optimum depends on the
    divergence: KL() learns the mean of their distributions, Alpha(a) (mean of p^a)^(1/a), normalised, which
    from actions alone is the mean distribution to the power 1/a.
    """

    divergence: FDivergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=Exact)

    def __post_init__(self):
        require_f_divergence(self.divergence, "DPT")
        self.estimator.check(self.divergence)
        if self.estimator.sees != "logits" or not {"log_p", "log_q"} <= set(self.estimator.evidence):
            raise TypeError(
                f"DPT sees the probabilities of all actions, got {self.estimator!r}; write Exact()"
            )

    def __call__(
        self, *, mask: Tensor | None = None, count: Tensor | float | None = None, **evidence: Tensor
    ) -> Out:
        """log_p, log_q [..., actions] of expert and model; mask [...] selects steps.

        count: the steps of the global batch (default: here).
        """
        tensors = named(evidence, self.estimator.evidence)
        if mask is not None:
            tensors = [blank(tensor, mask) for tensor in tensors]
        log_p, log_q = (tensors[self.estimator.evidence.index(name)] for name in ("log_p", "log_q"))
        if math.isinf(self.divergence.f_at_zero) and bool((log_p == -math.inf).any()):
            raise ValueError(
                f"{self.divergence!r} is infinite where the expert never takes an action that the model can; "
                "take KL(), or smooth the expert"
            )
        rows = self.estimator(self.divergence, *tensors)
        with torch.no_grad():
            agree = (log_p.argmax(-1) == log_q.argmax(-1)).to(rows.dtype)
            metrics = {
                "divergence": mean_over_tokens(rows, mask),
                "agreement": mean_over_tokens(agree, mask),
            }
        return Out(mean_over_tokens(rows, mask, count), metrics)


def of_actions(actions: Tensor, number: int) -> Tensor:
    """log of the distribution that is sure of each action: [...] -> [..., number]."""
    return torch.nn.functional.one_hot(actions, number).to(torch.get_default_dtype()).log()


class Coverage(NamedTuple):
    """How well trajectories of a context algorithm cover an expert's.

    log_ratio: log(1 + chi-square(expert, context)) of whole trajectories, estimated; the paper's ratio is its
    exponential. effective: the share of the trajectories that the estimate rests on, (sum w)^2 / (B sum w^2).
    largest: an upper bound, over the histories seen, of the log of the largest ratio (Renyi's divergence of
    order infinity): inf where the expert takes an action that the context algorithm never does.
    """

    log_ratio: Tensor
    effective: Tensor
    largest: Tensor


def coverage(
    log_expert: Tensor, log_context: Tensor, actions: Tensor, mask: Tensor | None = None
) -> Coverage:
    """From log-probabilities [B, T, actions] along trajectories of the context algorithm, and its actions.

    actions and mask [B, T]; mask selects steps. Environments are the same for both and cancel.
    """
    impossible = (log_expert == -math.inf) & (log_context == -math.inf)
    gap = (log_expert - log_context).masked_fill(impossible, -math.inf)
    taken = gap.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    highest = gap.amax(-1)
    if mask is not None:
        taken, highest = blank(taken, mask), blank(highest, mask)
    log_weight = taken.double().sum(-1)  # [B]
    log_square = (2 * log_weight).logsumexp(0)
    number = math.log(len(log_weight))
    effective = (2 * log_weight.logsumexp(0) - log_square - number).exp().nan_to_num(0.0)
    return Coverage(log_square - number, effective, highest.double().sum(-1).amax())
