"""DisCO: right answers scored above wrong ones, inside a trust region that is a constraint.

Li, Lin, Galanti, Tu and Yang, "DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained
Optimization", arXiv 2505.12366.

    maximise over the policy  (1/Q) sum_q J_q - beta/2 [D - delta]_+^2,   D = KL(pi_old, pi) a token
    J_q = mean over right answers of s - tau log mean over wrong ones of exp(s / tau)

s(answer) is the mean over its tokens of log pi ("log-likelihood") or of pi / pi_old ("ratio"). A question
whose answers are all right or all wrong has J_q = 0, and stays among the Q. p is pi_old, who wrote the
answers, and q the policy pi.

tau log mean exp(s / tau) is max over w of <w, s> - tau KL(w, uniform), the most adverse weights on the wrong
answers. `tilt` puts any f-divergence there: KL() is the paper's DisCO, another one is ours, and None, all
weights equal, is its DisCO-b.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.kl import KL
from fdiv.estimate.monte_carlo import MonteCarlo
from fdiv.methods._method import Consumes, Out, blank, mean_over_tokens
from fdiv.methods.rl._groups import check_correct
from fdiv.methods.rl.clipping import log_importance
from fdiv.operators.softargmax import f_softargmax

TAU = {"log-likelihood": 10.0, "ratio": 1.0}  # the authors'


@dataclass(frozen=True)
class DisCO:
    """Right answers above the wrong ones, the hardest of which count most; no reference model, no clipping.

    divergence: D of the constraint, from who wrote the answers. beta, delta: its weight and its bound.
    tau: how far the weights leave the mean, None for the authors' (10, or 1 for score="ratio").
    The loss is the objective's true value, and its gradient is the objective's.
    """

    consumes: ClassVar[Consumes] = "rollouts"
    unit: ClassVar[str] = "group"
    reads: ClassVar[tuple[str, ...]] = ("correct", "group", "groups", "batch_value")

    divergence: FDivergence = field(default_factory=KL)
    score: Literal["log-likelihood", "ratio"] = "log-likelihood"
    tilt: FDivergence | None = field(default_factory=KL)
    tau: float | None = None
    beta: float = 1e3
    delta: float = 1e-4

    def __post_init__(self):
        require_f_divergence(self.divergence, "DisCO")
        if self.score not in TAU:
            raise ValueError(f"score is 'log-likelihood' or 'ratio', got {self.score!r}")
        if self.tilt is None and self.tau is not None:
            raise ValueError(f"tau={self.tau!r} does nothing where tilt=None weighs wrong answers alike")
        if self.tilt is not None:
            require_f_divergence(self.tilt, "DisCO's tilt")
            if not 0 < self.tilt.curvature_at_one < math.inf:
                raise TypeError(f"the tilt has to be smooth, got {self.tilt!r}; write KL() or JS(0.5)")
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise ValueError(f"tau is a number > 0, got {self.tau!r}; its limit, the mean, is tilt=None")
        for name in ("beta", "delta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)!r}")

    def survey(self, log_policy: Tensor, log_behaviour: Tensor) -> Tensor:
        """The constraint's value at each token, [B, T]; its mean over the global batch is `batch_value`."""
        return MonteCarlo("p")(self.divergence, log_behaviour.detach(), log_policy)

    def __call__(
        self,
        *,
        log_policy: Tensor,
        log_behaviour: Tensor,
        mask: Tensor,
        count: Tensor | float | None = None,
        correct: Tensor,
        group: Tensor,
        groups: Tensor | float | None = None,
        batch_value: Tensor | float | None = None,
    ) -> Out:
        """log_policy, log_behaviour, mask [B, T]; correct [B] bool, group [B] numbers the questions.

        count, groups, batch_value: the tokens, the questions and the mean of `survey` over the tokens of the
        global batch (default: here).
        """
        check_correct(correct)
        log_policy, log_behaviour = blank(log_policy, mask), blank(log_behaviour, mask)
        score, told = self.scores(log_policy, log_behaviour, mask), mask.any(-1)
        if bool(score.detach().isinf().any()):
            raise ValueError("an answer has no finite score: the policy gives one of its tokens no mass")
        sides = [(score[own & correct & told], score[own & ~correct & told]) for own in _members(group)]
        mixed = [self.contrast(*side) for side in sides if all(map(len, side))]
        here = max(1, len(sides))
        objective = torch.stack([*mixed, 0.0 * score.sum()]).sum()
        penalty, excess, total = self._penalty(log_policy, log_behaviour, mask, count, batch_value)
        loss = penalty - objective / (here if groups is None else groups)
        metrics = {
            "objective": objective.detach() / here,
            "mixed": score.new_tensor(len(mixed) / here),
            "divergence": total,
            "penalty": self.beta / 2 * excess * excess,
        }
        if not bool(metrics["penalty"].isfinite()):
            raise ValueError(
                f"the policy is {total.item():.3g} of {self.divergence!r} away from who wrote the answers, "
                "and the square of it overflows; take fewer steps on one batch, or smaller ones"
            )
        return Out(loss, metrics)

    def scores(self, log_policy: Tensor, log_behaviour: Tensor, mask: Tensor) -> Tensor:
        """s of each answer, [B]; 0 of one without a token, which is neither right nor wrong."""
        (rows,) = in_working_precision(log_policy)
        if self.score == "ratio":
            rows = log_importance(log_policy, log_behaviour, mask).exp()
        return torch.where(mask, rows, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)

    def contrast(self, right: Tensor, wrong: Tensor) -> Tensor:
        """J of a question, from the scores of its answers."""
        return right.mean() - self.hardest(wrong)

    def hardest(self, scores: Tensor) -> Tensor:
        """max over w of <w, scores> - tau D(w, uniform); their mean without a tilt."""
        if self.tilt is None:
            return scores.mean()
        tau = TAU[self.score] if self.tau is None else self.tau
        uniform = torch.full_like(scores, -math.log(len(scores)))
        weight = f_softargmax(scores.detach() / tau, self.tilt, uniform)
        # At a maximum over w, moving the scores moves w to no effect.
        return weight @ scores - tau * self.tilt(weight.log(), uniform)

    def _penalty(
        self,
        log_policy: Tensor,
        log_behaviour: Tensor,
        mask: Tensor,
        count: Tensor | float | None,
        batch_value: Tensor | float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(this call's part of beta/2 [D - delta]_+^2 with its gradient, [D - delta]_+, D)."""
        rows = self.survey(log_policy, log_behaviour)
        total = mean_over_tokens(rows, mask).detach()
        if batch_value is not None:
            total = torch.as_tensor(batch_value).to(rows).detach()
        excess = (total - self.delta).relu()
        part = mean_over_tokens(rows, mask, count)
        share = mean_over_tokens(torch.ones_like(rows), mask, count)  # of the global batch's tokens
        # D is of the whole batch: its slope is known beforehand, and the parts add up.
        value = (part.detach() - self.delta * share) / 2
        return self.beta * excess * (value + part - part.detach()), excess, total


def _members(group: Tensor) -> list[Tensor]:
    """The answers to each question, [B] bool each."""
    return [group == number for number in group.unique()]
