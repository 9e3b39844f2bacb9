"""f-DPG: a policy gradient towards any target that can be scored, under any f-divergence.

Go, Korbak, Kruszewski, Rozen, Ryu and Dymetman, "Aligning Language Models with Preferences through
f-divergence Minimization", arXiv 2302.08215; `proposal="lagged"` is the KL-adaptive proposal of Khalifa,
Elsahar and Dymetman, "A Distributional Approach to Controlled Text Generation", arXiv 2012.11635.

    grad D(p, pi) = -E_mu[ (pi/mu) (R - baseline) grad log pi ],    p = P/Z,
    R = -psi(log P - log Z - log pi)

The paper's policy pi_theta is q here, its f of pi/p has f'(pi/p) = psi(log p - log pi), mu is whoever wrote
the answer. Its "forward KL" is KL(), R = P/(Z pi) - 1, which is DPG and conditional on a prompt CDPG; its
"reverse KL" is ReverseKL(), R = log P - log Z - log pi, which is RL with a KL penalty where P = a e^(r/beta);
its "JS" is 2 * JS(0.5). The two chi-squares are Pearson() (towards p) and Neyman().
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import effective_count
from fdiv.divergences.js import JS
from fdiv.methods._method import Consumes, Out, blank
from fdiv.methods.match.target import Accept, Target


@dataclass(frozen=True)
class FDPG:
    """Minimises D(p, q), p the normalised target at each prompt and q the policy's law of whole answers.

    target: what p is in proportion to. An answer without mass has the pseudo-reward -f(0), which is finite or
    the divergence cannot be used.
    proposal: who writes. "policy" itself, or a "lagged" copy of it, which is renewed when, over the last
    `every` steps, the policy was nearer to the target in KL.
    baseline: subtract the mean of the pseudo-rewards of the last `horizon` steps or so, before this one.
    """

    consumes: ClassVar[Consumes] = "rollouts"
    reads: ClassVar[tuple[str, ...]] = ("log_target", "log_partition", "sequences", "state")

    divergence: FDivergence = field(default_factory=JS)
    target: Target = field(default_factory=lambda: Target() * Accept())
    proposal: Literal["policy", "lagged"] = "policy"
    every: int = 16
    baseline: bool = True
    horizon: int = 8

    def __post_init__(self):
        require_f_divergence(self.divergence, "FDPG")
        if not isinstance(self.target, Target):
            raise TypeError(f"target is a Target, got {self.target!r}; write Target() * Accept()")
        if self.proposal not in ("policy", "lagged"):
            raise ValueError(f"proposal is 'policy' or 'lagged', got {self.proposal!r}")
        for name in ("every", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number of steps >= 1, got {getattr(self, name)!r}")

    def __call__(
        self,
        *,
        log_policy: Tensor,
        log_behaviour: Tensor,
        mask: Tensor,
        log_target: Tensor,
        log_partition: Tensor,
        sequences: Tensor | float | None = None,
        state: dict[str, float] | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """log_policy, log_behaviour, mask [B, T] of the sampled tokens; log_target, log_partition [B].

        sequences, count: answers and tokens of the global batch (default: here); a mean over answers divides
        by the former. state: as `advance` left it. metrics: means over answers, which weighted by the tokens
        of each call are those of the global batch; `ess` is a fraction of them.
        """
        log_q = blank(log_policy, mask).sum(1, dtype=torch.float64)
        log_mu = blank(log_behaviour.detach(), mask).sum(1, dtype=torch.float64)
        state = self.initial_state() if state is None else state
        with torch.no_grad():
            log_ratio = self._log_ratio(log_target, log_partition, log_q)
            # In the policy's precision psi is continued linearly early enough for the gradient to fit.
            reward = -self.divergence.psi(log_ratio.to(log_policy.dtype))
            weight = (log_q - log_mu).exp().to(reward)
            factor = weight * (reward - state["baseline"])
            self._check(log_q, log_mu, log_ratio, factor)
            metrics = self._metrics(log_target, log_partition, log_q, log_mu, log_ratio)
            metrics["pseudo_reward"] = (weight * reward).mean()
            metrics["baseline"] = reward.new_tensor(state["baseline"])
        sequences = max(len(log_q), 1) if sequences is None else sequences
        loss = -(factor * log_q).sum() / sequences
        share = 1.0 if count is None else float(mask.sum()) / float(count)
        of_call = len(log_q) / (float(sequences) * share or 1.0)  # 1 where all answers are of one length
        return Out(loss, {name: number * of_call for name, number in metrics.items()})

    def _log_ratio(self, log_target: Tensor, log_partition: Tensor, log_q: Tensor) -> Tensor:
        """log p - log q, -inf where p has no mass, also at a prompt none of whose answers had any."""
        none = log_target == -math.inf
        log_target, log_partition = log_target.to(log_q), log_partition.to(log_q)
        return torch.where(none, -math.inf, log_target - log_partition - log_q)

    def _check(self, log_q: Tensor, log_mu: Tensor, log_ratio: Tensor, factor: Tensor) -> None:
        """Raise where the gradient has no finite estimate, and say why."""
        if not bool((log_q.isfinite() & log_mu.isfinite()).all()):
            raise ValueError("an answer has no finite log-probability under the policy or its writer")
        rejected = log_ratio == -math.inf
        if not bool((log_ratio.isfinite() | rejected).all()):
            raise ValueError(
                "log_target or log_partition is nan or +inf, or Z is 0 beside an answer with mass"
            )
        if math.isinf(self.divergence.f_at_zero) and bool(rejected.any()):
            raise ValueError(
                f"{int(rejected.sum())} of {len(rejected)} answers have no mass under the target, which "
                f"{self.divergence!r} forbids at any price. Write a divergence with a finite f(0), as KL(), "
                "JS(), TV() or Pearson(), or a target with mass everywhere: Tilt(beta) in place of Accept()"
            )
        if not bool(factor.isfinite().all()):
            raise FloatingPointError(
                f"importance weights reach e^{(log_q - log_mu).max().item():.4g} and pseudo-rewards are as "
                "large: the answers are too old for this policy. Write proposal='policy', train.reuse: 1"
            )

    def _metrics(
        self, log_target: Tensor, log_partition: Tensor, log_q: Tensor, log_mu: Tensor, log_ratio: Tensor
    ) -> dict[str, Tensor]:
        log_share = log_ratio + log_q - log_mu  # log p / mu
        seen = log_partition.isfinite()  # Z is 0 as far as is known where no answer had mass
        log_z = torch.where(seen, log_partition, 0.0).sum() / seen.sum().clamp(min=1)
        numbers = {
            "divergence": ((log_q - log_mu).exp() * self.divergence.f(log_ratio)).mean(),
            "log_partition": log_z,
            "rejected": (log_target == -math.inf).double().mean(),
            "ess": effective_count(log_share) / max(len(log_share), 1),
            "ratio": (log_q - log_mu).exp().mean(),
        }
        if self.proposal == "lagged":  # KL(p, mu) - KL(p, q), in which log Z cancels but for p's scale
            numbers["gain"] = (log_share.exp() * (log_q - log_mu)).mean()
        return numbers

    def initial_state(self) -> dict[str, float]:
        own = {"baseline": 0.0, "baseline_steps": 0.0}
        return own | ({"gain": 0.0, "gain_steps": 0.0, "adopt": 0.0} if self.proposal == "lagged" else {})

    def advance(
        self, state: dict[str, float], metrics: dict[str, float], progress: float
    ) -> dict[str, float]:
        """The next step's baseline and, in `adopt`, whether a lagged proposal is renewed now (1) or not."""
        new = dict(state)
        if self.baseline:
            new["baseline_steps"] = min(state["baseline_steps"] + 1, self.horizon)
            new["baseline"] += (metrics["pseudo_reward"] - state["baseline"]) / new["baseline_steps"]
        if self.proposal == "lagged":
            new["gain_steps"] = state["gain_steps"] + 1
            new["gain"] += (metrics["gain"] - state["gain"]) / new["gain_steps"]
            new["adopt"] = 0.0
            if new["gain_steps"] == self.every:
                new |= {"adopt": float(new["gain"] > 0), "gain": 0.0, "gain_steps": 0.0}
        return new
