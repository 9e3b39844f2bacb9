"""SequenceMatch: the text of a model and of data matched as trajectories, by the model's own logits.

Cundy and Ermon, "SequenceMatch: Imitation Learning for Autoregressive Sequence Modelling with Backtracking",
arXiv 2306.05426; the reduction is that of Garg et al., "IQ-Learn: Inverse soft-Q Learning for Imitation",
arXiv 2106.12142. A state s is a prefix, an action a a token, and logits l(a|s) are soft Q-values of a reward:

    V(s) = logsumexp l(.|s),   r = l(a|s) - gamma V(s'),   flow = V(s) - gamma V(s')
    L = -E_data[phi(r)] + (E_data[flow] + E_student[flow]) / 2
    penalty="expert":   phi(r) = -alpha f*(-r / alpha), f the generator of student / data
    penalty="mixture":  phi(r) = r,   and L gains the mean over both texts of r^2 / (4 alpha)

E is a sum over an answer's tokens, discounted by gamma^i. With the first penalty the least L over all logits
is -min over pi of alpha D(data, pi) - H(pi), D between discounted visits and H the entropy of pi; with the
other the divergence that the best reward finds between both texts is 2 alpha Triangular(), Le Cam's. Behind
an answer's end the state stays: r = flow = (1 - gamma) V for ever, which is 0 where V is held at 0.
The paper's data are p, its pi is q, and its chi^2 is Neyman(), sum (q - p)^2 / p.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv._math import in_working_precision
from fdiv.divergences.triangular import Triangular
from fdiv.methods._method import Consumes, Out, earlier, mean_over_tokens
from fdiv.sample._sampler import Sampler, Steered
from fdiv.sample.fixed import Both


class Visits(NamedTuple):
    """States and actions, one a token and perhaps one more for each end; [visits] each."""

    weight: Tensor  # gamma^i
    reward: Tensor
    flow: Tensor
    data: Tensor


@dataclass(frozen=True)
class SequenceMatch:
    """Soft Q-values that make the student's visits those of the data; needs logits, not log-probabilities.

    discounted: weigh token i by gamma^i, so that the flows of an answer telescope to V of its prompt; without
        it all tokens weigh 1, as transitions drawn from a buffer would.
    ramp: the fraction of training in which behaviour cloning (log-likelihood of the data) gives way to L,
    cloning: and the weight that it keeps.
    ceiling: of "expert", the largest weight phi'(r) of a token, which stands for the density ratio student /
        data; phi goes on linearly from there.
    sampler: who writes has to leave half of the sequences to data. Both() has either in every step, the data
        written by the teacher; AdaptiveReplay(start=0.5, step=0.0) has the task's data and steps of one kind.
    """

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = (
        "label_logit",
        "state_value",
        "sequence",
        "sequences",
        "by_student",
        "progress",
    )

    divergence: FDivergence = field(default_factory=Triangular)
    penalty: Literal["mixture", "expert"] = "mixture"
    alpha: float = 1.0
    gamma: float = 0.99
    discounted: bool = True
    ramp: float = 0.5
    cloning: float = 0.0
    ceiling: float = 1000.0
    sampler: Sampler = field(default_factory=Both)

    def __post_init__(self):
        require_f_divergence(self.divergence, "SequenceMatch")
        if self.penalty not in ("mixture", "expert"):
            raise ValueError(f"penalty is 'mixture' or 'expert', got {self.penalty!r}")
        if self.penalty == "mixture" and self.divergence != Triangular():
            raise TypeError(
                "the squared reward of the mixture is that of Triangular(); for "
                f"{self.divergence!r} write penalty='expert'"
            )
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha is finite and > 0, got {self.alpha!r}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma is between 0 and 1, got {self.gamma!r}: an end has to stay finite")
        for name in ("ramp", "cloning"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction in [0, 1], got {getattr(self, name)!r}")
        if not self.ceiling > 1:
            raise ValueError(f"ceiling is a density ratio > 1, got {self.ceiling!r}")
        if (share := share_of_data(self.sampler)) != 0.5:
            raise ValueError(
                f"half of the sequences are to be the data's, of {self.sampler!r} it is {share:g}; write "
                "Both(), Mix(0.5) or AdaptiveReplay(start=0.5, step=0.0)"
            )

    def __call__(
        self,
        *,
        label_logit: Tensor,
        state_value: Tensor,
        sequence: Tensor,
        sequences: Tensor | float,
        by_student: Tensor,
        progress: float,
        end_value: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> Out:
        """label_logit [R]: l of each token; state_value [R]: V of the state that it was chosen in.

        by_student [R]; sequences: those of the global batch, of which half are the data's; end_value: V
        behind the end of each sequence, by its number; held at 0 without it. `count` is not needed.
        """
        label_logit, state_value = in_working_precision(label_logit, state_value)
        visits = self.visits(label_logit, state_value, sequence, by_student, end_value)
        share = 2 * visits.weight / sequences
        matched = (share * self.rows(visits)).sum()
        surprise = state_value - label_logit
        cloned = 2 * torch.where(by_student, 0.0, surprise).sum() / sequences
        done = 1.0 if progress >= self.ramp else progress / self.ramp
        weight = (1 - self.cloning) * done
        with torch.no_grad():
            metrics = {
                "reward_data": mean_over_tokens(visits.reward, visits.data),
                "reward_student": mean_over_tokens(visits.reward, ~visits.data),
                "nll": mean_over_tokens(surprise, ~by_student),
                "state_value": mean_over_tokens(state_value),
                "matching": label_logit.new_tensor(weight),
            }
            if self.penalty == "expert":
                steep = -visits.reward / self.alpha > self._steepest(visits.reward)
                metrics["linearised"] = mean_over_tokens(steep.to(visits.reward), visits.data)
        return Out(weight * matched + (1 - weight) * cloned, metrics)

    def visits(
        self,
        label_logit: Tensor,
        state_value: Tensor,
        sequence: Tensor,
        by_student: Tensor,
        end_value: Tensor | None = None,
    ) -> Visits:
        place, last = earlier(torch.ones_like(state_value), sequence), lasts(sequence)
        end = torch.zeros_like(state_value) if end_value is None else end_value.to(state_value)[sequence]
        following = torch.cat([state_value[1:], state_value[:1]])
        discounted = self.gamma * torch.where(last, end, following)
        weight = self._weight(place)
        found = Visits(weight, label_logit - discounted, state_value - discounted, ~by_student)
        if end_value is None:
            return found
        stays = (1 - self.gamma) * end[last]
        tail = Visits(self._weight(place[last] + 1) / (1 - self.gamma), stays, stays, ~by_student[last])
        return Visits(*(torch.cat(two) for two in zip(found, tail, strict=True)))

    def rows(self, visits: Visits) -> Tensor:
        """What each visit adds to the loss."""
        rows = visits.flow / 2 - torch.where(visits.data, self.phi(visits.reward), 0.0)
        if self.penalty == "mixture":
            return rows + visits.reward.square() / (8 * self.alpha)
        return rows

    def phi(self, reward: Tensor) -> Tensor:
        """What a reward of the data's visits is worth: concave, with slope at most `ceiling`."""
        if self.penalty == "mixture":
            return reward
        slope, steepest = -reward / self.alpha, self._steepest(reward)
        conjugate = self.divergence.reverse.conjugate(slope.clamp(max=steepest))
        return -self.alpha * (conjugate + self.ceiling * (slope - steepest).relu())

    def _steepest(self, like: Tensor) -> float:
        """f' at the ceiling."""
        log_ceiling = torch.tensor(math.log(self.ceiling), dtype=torch.float64, device=like.device)
        return self.divergence.reverse.phi(log_ceiling).item()

    def _weight(self, place: Tensor) -> Tensor:
        return self.gamma**place if self.discounted else torch.ones_like(place)


def lasts(sequence: Tensor) -> Tensor:
    """Whether a row is the last of its sequence, [R]."""
    found = torch.ones_like(sequence, dtype=torch.bool)
    found[:-1] = sequence[1:] != sequence[:-1]
    return found


def share_of_data(sampler: Sampler) -> float:
    """Of the sequences of all steps."""
    state = sampler.initial_state() if isinstance(sampler, Steered) else {}
    if getattr(sampler, "step", 0):  # it changes with the validation loss
        return math.nan
    writers = [
        sampler.writer((n + 0.5) / 100, progress, state) for n in range(100) for progress in (0.0, 0.9)
    ]
    return sum({"data": 1.0, "both": 0.5}.get(writer, 0.0) for writer in writers) / len(writers)
