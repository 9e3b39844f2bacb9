"""SparsePO and MaPO: preferences in which each token has a weight.

Christopoulou, Cardenas, Lampouras, Bou-Ammar and Wang, "SparsePO: Controlling Preference Alignment of LLMs
via Sparse Token Masks", arXiv 2410.05102.

    L = -log sigmoid( beta [ (u_w - u_l) + (d_w - d_l) ] ) + lambda (|m_u|_1 + |m_d|_1)
    u = sum_i m_u,i log (policy / reference)_i,   d = sum_i m_d,i D(reference, policy)_i

over the tokens i of a response, w and l the chosen and the rejected. With both masks 1 this is TDPO1.
SparsePO learns its masks from the reference's hidden states; a common mask is penalised once. MaPO makes a
common one of the reference's activations, without parameters or penalty. The paper's D is KL(reference,
policy), here KL(); its lambda is `l1`. The authors write -(d_w - d_l), with d the masked sum of -KL.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fdiv._divergence import Divergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.fused_linear import FusedLinear
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.prefer._responses import (
    check_estimator,
    log_ratios,
    preference_loss,
    preference_metrics,
    token_divergences,
    totals,
)
from fdiv.methods.prefer.masks import SparseMask, activation_mask

TOKENS = ("log_p_label", "log_q_label", "sequence", "pairs", "pairs_in_batch")


@dataclass(frozen=True)
class SparsePO:
    """Preference loss with learned masks, of which an l1 penalty makes zeros.

    common: one mask for log-ratios and divergences, or two. l1: of a mask's sum over a response.
    dropout: of the network that makes the masks.
    """

    consumes: ClassVar[Consumes] = "pairs"
    reads: ClassVar[tuple[str, ...]] = (*TOKENS, "p_states", "module")

    divergence: Divergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=FusedLinear)
    beta: float = 0.1
    l1: float = 0.001
    common: bool = True
    dropout: float = 0.01

    def __post_init__(self):
        check_estimator(self.divergence, self.estimator, "SparsePO")
        _check_beta(self.beta)
        if not self.l1 >= 0:
            raise ValueError(f"l1 must be >= 0, got {self.l1!r}; 0 leaves the masks free")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is in [0, 1), got {self.dropout!r}")

    def module(self, width: int, layers: int) -> SparseMask:
        """The network that makes the masks, to be trained beside the policy."""
        return SparseMask(width, layers, self.common, self.dropout)

    def __call__(
        self,
        *,
        p_states: Tensor,
        module: nn.Module,
        sequence: Tensor,
        pairs: int,
        pairs_in_batch: Tensor | float | None = None,
        **tokens: Tensor,
    ) -> Out:
        """p_states [R, layers, width]: the reference's, where it predicts the token. The rest as in TDPO."""
        masks = in_working_precision(*module(p_states.detach()))
        margin, metrics = _masked(self, masks, sequence, pairs, **tokens)
        norm = totals(masks[0] if self.common else masks[0] + masks[1], sequence, 2 * pairs)
        penalty = norm[:pairs] + norm[pairs:]
        loss = preference_loss(margin, pairs_in_batch)
        loss = loss + self.l1 * mean_over_tokens(penalty, count=pairs_in_batch)
        return Out(loss, metrics | {"l1": mean_over_tokens(penalty.detach())})


@dataclass(frozen=True)
class MaPO:
    """Preference loss whose common mask is the reference's activations, on a scale from 0 to 1."""

    consumes: ClassVar[Consumes] = "pairs"
    reads: ClassVar[tuple[str, ...]] = (*TOKENS, "p_activations")

    divergence: Divergence = field(default_factory=KL)
    estimator: Estimator = field(default_factory=FusedLinear)
    beta: float = 0.1

    def __post_init__(self):
        check_estimator(self.divergence, self.estimator, "MaPO")
        _check_beta(self.beta)

    def __call__(
        self,
        *,
        p_activations: Tensor,
        sequence: Tensor,
        pairs: int,
        pairs_in_batch: Tensor | float | None = None,
        **tokens: Tensor,
    ) -> Out:
        """p_activations [R, hooks]: the reference's, averaged over hidden units. The rest as in TDPO."""
        mask = activation_mask(p_activations, sequence, 2 * pairs)
        margin, metrics = _masked(self, (mask, mask), sequence, pairs, **tokens)
        return Out(preference_loss(margin, pairs_in_batch), metrics)


def _masked(
    method: SparsePO | MaPO,
    masks: tuple[Tensor, ...],
    sequence: Tensor,
    pairs: int,
    *,
    log_p_label: Tensor,
    log_q_label: Tensor,
    **evidence: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(beta [(u_w - u_l) + (d_w - d_l)], metrics), masks [R] of log-ratios and of divergences."""
    tokens = log_ratios(log_p_label, log_q_label)
    spent = token_divergences(method.divergence, method.estimator, evidence)
    weighted = masks[0] * tokens + masks[1] * spent
    sums = {"reward": method.beta * weighted, "log_ratio": tokens, "divergence": spent}
    sums = {name: totals(rows, sequence, 2 * pairs) for name, rows in sums.items()}
    margin = sums["reward"][:pairs] - sums["reward"][pairs:]
    return margin, preference_metrics(margin, **sums) | _sparsity(masks, sequence, 2 * pairs)


@torch.no_grad()
def _sparsity(masks: tuple[Tensor, ...], sequence: Tensor, responses: int) -> dict[str, Tensor]:
    """The share of zeros among tokens, and of responses with tokens whose masks are all 0: no gradient."""
    alive = totals(((masks[0] != 0) | (masks[1] != 0)).to(masks[0]), sequence, responses)
    present = sequence.bincount(minlength=responses) > 0
    return {
        "sparsity_ratio": mean_over_tokens((masks[0] == 0).to(masks[0])),
        "sparsity_divergence": mean_over_tokens((masks[1] == 0).to(masks[1])),
        "dead": mean_over_tokens((alive[present] == 0).to(masks[0])),
    }


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta!r}")
