"""R2PVI: offline value iteration against dynamics that an f-divergence keeps near those of the data.

Tang, Liu and Xu, "Robust Offline Reinforcement Learning with Linearly Structured f-Divergence
Regularization", arXiv 2411.18612.

    Q_h(s, a) = phi' (theta_h + nu_h) - penalty,  nu_h,i = min over mu_i of E_mu_i[V_h+1] + lam D(mu_i, mu0_i)

The expectations under the nominal factors mu0_i are ridge regressions on the features phi, which are >= 0
and sum to one. The paper's lambda, beta and gamma are `lam`, `beta` and `ridge`, its H `reward_max` a step;
its TV, KL and chi-square are TV(), KL() and Pearson(), with the worst case as their p (see `worst_case`).
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.chi_square import Pearson
from fdiv.divergences.kl import KL
from fdiv.divergences.tv import TV
from fdiv.operators.worst_case import weighted, worst_case


class Plan(NamedTuple):
    """weights theta_h + nu_h [steps, d], and the inverse of Lambda_h [steps, d, d]."""

    weights: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class R2PVI:
    """Pessimistic value iteration in a d-rectangular linear robust regularised MDP.

    lam: the price of moving the dynamics; math.inf moves nothing and is the nominal algorithm.
    penalty: beta sum_i phi_i sqrt(Lambda^-1_ii) ("paper"), or the smaller sqrt(sum_i phi_i^2 Lambda^-1_ii)
    of the "authors" in code. shrink_to: where the ridge draws KL's regression of exp(-V/lam): to "ones", a
    value of 0 as for the others, or as the authors to "zeros", the largest value there is.
    Divergences other than TV, KL and chi-square need weights >= 0, as one-hot features have.
    """

    divergence: FDivergence = field(default_factory=KL)
    lam: float = 0.1
    beta: float = 1.0
    ridge: float = 0.1
    reward_max: float = 1.0
    penalty: Literal["paper", "authors"] = "paper"
    shrink_to: Literal["ones", "zeros"] = "ones"

    def __post_init__(self):
        require_f_divergence(self.divergence, "R2PVI")
        for name in ("lam", "ridge", "reward_max"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is > 0, got {getattr(self, name)!r}")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is >= 0, got {self.beta!r}; 0 leaves the penalty out")
        if self.penalty not in ("paper", "authors"):
            raise ValueError(f"penalty is 'paper' or 'authors', got {self.penalty!r}")
        is_kl = weighted(1.0, self.divergence)[1] == KL()
        if self.shrink_to not in (("ones", "zeros") if is_kl else ("ones",)):
            raise ValueError(
                f"shrink_to is 'ones', or 'zeros' for KL() alone, got {self.shrink_to!r} with "
                f"{self.divergence!r}"
            )

    def __call__(
        self,
        features: Tensor,
        next_features: Tensor,
        *,
        theta: Tensor | None = None,
        next_stop: Tensor | None = None,
    ) -> Plan:
        """Backward induction on `rows` transitions at each of `steps` steps.

        features [steps, rows, d] of what was done; next_features [steps - 1, rows, actions, d] of all that
        can be done in the state that followed (nothing follows the last step). theta [steps, d]: the
        rewards, 0 by default. next_stop [steps - 1, rows]: a known return for stopping in that state, if one
        may stop.
        """
        _check_features(features, next_features)
        steps, _, d = features.shape
        weights = features.new_zeros(steps, d) if theta is None else theta.clone()
        eye = torch.eye(d, dtype=features.dtype, device=features.device)
        inverse = torch.linalg.inv(features.mT @ features + self.ridge * eye)
        plan = Plan(weights, inverse)
        for step in range(steps - 2, -1, -1):
            values = self.action_values(plan, step + 1, next_features[step]).amax(-1)
            if next_stop is not None:
                values = values.maximum(next_stop[step])
            weights[step] += self._worst_means(inverse[step], features[step], values, steps)
        return plan

    def action_values(self, plan: Plan, step: int, features: Tensor) -> Tensor:
        """Q [...] of features [..., d], at least 0 and at most what the steps that are left can bring."""
        diagonal = plan.inverse[step].diagonal()
        if self.penalty == "paper":
            unsure = features @ diagonal.sqrt()
        else:
            unsure = (features.square() @ diagonal).sqrt()
        value = features @ plan.weights[step] - self.beta * unsure
        return value.clamp(0.0, self.reward_max * (len(plan.weights) - step))

    def _worst_means(self, inverse: Tensor, features: Tensor, values: Tensor, steps: int) -> Tensor:
        """nu [d]: of each factor, the worst expectation of the values [rows]."""
        weights = inverse @ features.mT  # [d, rows]; with those of the ridge each row sums to one
        lam, divergence = weighted(self.lam, self.divergence)
        if lam == math.inf:
            return weights @ values
        if divergence == TV():
            return weights @ values.clamp(max=values.min() + lam)
        of_ridge = self.ridge * inverse.sum(-1, keepdim=True)  # the weight of a value of 0
        if divergence == KL():
            least = values.min() if self.shrink_to == "zeros" else values.new_zeros(())
            moment = weights @ ((least - values) / lam).exp()
            if self.shrink_to == "ones":
                moment = moment + of_ridge.squeeze(-1)
            # The paper's floor e^(-H/lam) of the moment, which may be estimated below 0.
            return (least - lam * moment.clamp(min=0.0).log()).clamp(max=steps * self.reward_max)
        if divergence == Pearson():
            return best_level(weights, values, lam)
        weights = torch.cat([weights, of_ridge], -1)
        if weights.min() < -1e-9:
            raise ValueError(
                f"a ridge regression on these features has negative weights ({weights.min().item():.2g}), "
                f"and the dual of {divergence!r} is then not concave; take TV(), KL() or Pearson(), or "
                "one-hot features"
            )
        atoms = torch.cat([values, values.new_zeros(1)])
        return worst_case(atoms, weights.clamp(min=0.0).log(), divergence, lam).value


def best_level(weights: Tensor, values: Tensor, lam: float) -> Tensor:
    """max over a in [0, max v] of m + (m^2 - s)/(4 lam): m and s the weighted means of min(v, a), its square.

    weights [d, rows] may be negative, values [rows] are >= 0. Between two values the objective is a parabola
    in a, so that the best of all vertices and ends is the maximum.
    """
    v, order = values.sort()
    w = weights[:, order]
    above = w.sum(-1, keepdim=True) - torch.cat([torch.zeros_like(w[:, :1]), w.cumsum(-1)], -1)
    first, second = (
        torch.cat([torch.zeros_like(w[:, :1]), (w * power).cumsum(-1)], -1) for power in (v, v.square())
    )  # of the values below each level, [d, rows + 1]
    low = torch.cat([v.new_zeros(1), v])
    high = torch.cat([v, v[-1:]])
    vertex = ((2 * lam + first) / (1 - above)).nan_to_num(math.inf)
    levels = torch.stack([vertex.maximum(low).minimum(high), low.expand_as(vertex), high.expand_as(vertex)])
    mean, square = first + above * levels, second + above * levels.square()
    return (mean + (mean.square() - square) / (4 * lam)).amax((0, -1))


def _check_features(features: Tensor, next_features: Tensor) -> None:
    steps, rows, d = features.shape
    if next_features.shape[:2] != (steps - 1, rows) or next_features.shape[3:] != (d,) or not rows:
        raise ValueError(
            "features are [steps, rows >= 1, d] and next_features [steps - 1, rows, actions, d], got "
            f"{tuple(features.shape)} and {tuple(next_features.shape)}"
        )
    for tensor in (features, next_features):
        if not bool((tensor >= 0).all()) or not bool(((tensor.sum(-1) - 1).abs() <= 1e-5).all()):
            raise ValueError(
                "features are >= 0 and sum to one, as factors of a transition do; divide them by their sum"
            )
