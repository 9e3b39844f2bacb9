"""Datamodel matching: fine-tune a model to the outputs predicted for one that never saw the forget set.

Georgiev, Rinberg, Park, Garg, Ilyas, Madry and Neel, "Attribute-to-Delete: Machine Unlearning via Datamodel
Matching", arXiv 2410.23232.

    target(x) = f(x; S) - sum over i in F of beta_i(x),   loss = D(softmax target, softmax f)

beta are linear datamodels, f(x; S') = bias + sum over i in S' of beta_i(x), fitted to models that were
trained on random subsets S' (fdiv.adapters.datamodels). With the outputs of a model retrained without F as
target this is the paper's oracle matching. p is the target, q the model that is trained. `klom` is the
paper's measure.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.methods._method import Out, mean_over_tokens

FARTHEST = 100.0  # margins beyond are taken as this, as in the authors' code
LEAST_MASS = 1e-5  # of the retrained models in a bin, as in the authors' code


class Datamodels(NamedTuple):
    """Outputs as linear functions of which examples were trained on: weights [training, ...], bias [...]."""

    weights: Tensor
    bias: Tensor

    def predict(self, included: Tensor) -> Tensor:
        """Outputs [models, ...] of models that were trained on the examples marked in [models, training]."""
        return torch.tensordot(included.to(self.weights), self.weights, 1) + self.bias

    def without(self, outputs: Tensor, forget: Tensor) -> Tensor:
        """The outputs [..., as the bias] less what the training examples of these numbers add to them."""
        return outputs - self.weights[forget].sum(0)


@dataclass(frozen=True)
class DatamodelMatching:
    """The mean over rows of D(softmax of the target, softmax of the model's logits).

    divergence: None is the squared error of the logits, the authors' loss, which also holds their common
    level. retained: how many retained examples are fine-tuned on, for each one of the forget set.
    """

    divergence: Divergence | None = field(default_factory=KL)
    retained: float = 3.0

    def __post_init__(self):
        if not (self.divergence is None or isinstance(self.divergence, Divergence)):
            raise TypeError(
                "divergence is a divergence (KL(), JS(0.5), ...), or None for the squared error of the "
                f"logits, got {self.divergence!r}"
            )
        if not 0 <= self.retained < math.inf:
            raise ValueError(f"retained is >= 0, got {self.retained!r}")

    def rows(self, forget: Tensor, training: int, generator: torch.Generator | None = None) -> Tensor:
        """The training examples to fine-tune on: `forget`, and retained ones drawn at random."""
        others = torch.ones(training, dtype=torch.bool)
        others[forget] = False
        others = others.nonzero().squeeze(-1)
        drawn = torch.randperm(len(others), generator=generator)[: round(self.retained * len(forget))]
        return torch.cat([forget, others[drawn]])

    def __call__(
        self,
        *,
        target: Tensor,
        logits: Tensor,
        mask: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """target and logits [..., classes]; mask [...] selects rows, count: those of the global batch."""
        target = target.detach()
        if self.divergence is None:
            values = (target - logits).square().mean(-1)
        else:
            values = self.divergence(target.log_softmax(-1), logits.log_softmax(-1))
        loss = mean_over_tokens(values, mask, count)
        agree = (target.argmax(-1) == logits.argmax(-1)).to(values.dtype)
        return Out(loss, {"divergence": loss.detach(), "agreement": mean_over_tokens(agree, mask)})


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """log of the odds of the right class, [..., examples] from [..., examples, classes] and [examples]."""
    right = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    own = logits.masked_fill(~right, -math.inf).logsumexp(-1)
    return own - logits.masked_fill(right, -math.inf).logsumexp(-1)


def klom(
    unlearned: Tensor,
    retrained: Tensor,
    estimate: Literal["histogram", "gaussian"] = "histogram",
    divergence: Divergence | None = None,
    bins: int = 20,
) -> Tensor:
    """KL of margins, from unlearned to retrained models at each example: [models, examples] -> [examples].

    "histogram", the paper's: KL(p, q) between the shares of the models in `bins` equal bins from the least to
    the largest margin of both; in a bin of p, q has at least 1e-5, and is normalised after that. Any
    `divergence` can take the place of KL(). "gaussian": KL between normal distributions of their means and
    (unbiased) variances, log(s_q/s_p) + (s_p^2 + (m_p - m_q)^2)/(2 s_q^2) - 1/2, which needs far fewer
    models; 0 where both are constant and equal. Margins are cut to +-100 first.
    """
    p, q = (side.detach().double().clamp(-FARTHEST, FARTHEST) for side in (unlearned, retrained))
    if p.shape[1:] != q.shape[1:] or min(len(p), len(q)) < 2:
        raise ValueError(
            f"margins are [models >= 2, examples], got {tuple(unlearned.shape)} and {tuple(retrained.shape)}"
        )
    if p.isnan().any() or q.isnan().any():
        raise ValueError("a margin is nan: did a model diverge?")
    if estimate == "histogram":
        low = torch.minimum(p.amin(0), q.amin(0))
        width = (torch.maximum(p.amax(0), q.amax(0)) - low) / bins
        log_p, log_q = (_shares(side, low, width, bins) for side in (p, q))
        least = torch.full_like(log_p, math.log(LEAST_MASS)).masked_fill(log_p == -math.inf, -math.inf)
        log_q = log_q.maximum(least).log_softmax(-1)
        return (divergence or KL())(log_p, log_q)
    if estimate != "gaussian" or divergence is not None:
        raise ValueError(
            f"estimate is 'histogram', or 'gaussian' without a divergence, got {estimate!r} with "
            f"{divergence!r}"
        )
    s_p, s_q = p.std(0), q.std(0)
    apart = (p.mean(0) - q.mean(0)).square()
    value = (s_q / s_p).log() + (s_p.square() + apart) / (2 * s_q.square()) - 0.5
    equal = (s_p == 0) & (apart == 0)
    return torch.where(s_q > 0, value, torch.where(equal, 0.0, math.inf))


def _shares(side: Tensor, low: Tensor, width: Tensor, bins: int) -> Tensor:
    """log of the share of the models in each bin, [examples, bins]; all in one where there is no width."""
    place = ((side - low) / torch.where(width > 0, width, 1.0)).long().clamp(0, bins - 1)
    return torch.nn.functional.one_hot(place, bins).double().mean(0).log()
