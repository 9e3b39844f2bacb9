"""GRPO with any f-divergence to the reference, and its exact gradient.

Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", arXiv
2402.03300, for the group-relative advantage; the paper puts the k3 estimate of reverse KL into the loss,
whose gradient is that of *forward* KL. Here the penalty's gradient is the divergence's own:

    maximise E_pi[r] - beta sum_i D(ref, pi)(.|s_i)
    gradient of the penalty at token i: g_i = psi_i (or the whole vocabulary's) + sum over j > i of D_j

psi_i acts through token i itself, the later values through where token i leads. p is the reference, q the
policy pi: ReverseKL() is RLHF's regulariser. In the reward -beta g_i, detached, joins the advantage of
token i. The *value* there, -beta f(u_i), would be wrong for every f, and is not offered.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.kl import ReverseKL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.monte_carlo import MonteCarlo
from fdiv.estimate.tokens import Penalty, per_sequence, per_token
from fdiv.methods._method import Consumes, Out, mean_over_tokens, named
from fdiv.methods.rl._groups import group_advantage as group_advantage
from fdiv.methods.rl.clipping import (
    Aggregate,
    Clip,
    aggregated,
    check_aggregate,
    check_clip,
    clipped_gain,
    log_importance,
)

CHOICES = {
    "place": ("loss", "reward"),
    "level": ("token", "sequence"),
    "ratio": ("token", "sequence"),
    "advantage": ("std", "mean"),
}


@dataclass(frozen=True)
class GRPO:
    """Clipped policy gradient on group-normalised rewards, plus beta times a divergence to the reference.

    estimator: MonteCarlo() sees the sampled tokens, Exact() the whole vocabulary at the sampled prefixes.
    beta = 0 turns the penalty off. future: include its effect on later tokens; without it the gradient is
    only partial. place: in the "loss", or in the "reward", where clip and importance ratio act on it too; on
    the policy's own samples the gradient is the same. level: the sum of D over tokens, or D of whole
    "sequence"s, of which only ReverseKL() says the same.
    The penalty's gradient is exact where the policy itself sampled. MonteCarlo("behaviour") weights each
    token's penalty by its own importance ratio only, the usual approximation; a sequence's exactly.
    clip, aggregate: see clipping.py. ratio: the importance ratio of each token, or "sequence" (GSPO).
    advantage: divided by the group's "std", or only less its "mean" (Dr. GRPO, with aggregate=<a length>).
    """

    consumes: ClassVar[Consumes] = "rollouts"

    divergence: Divergence = field(default_factory=ReverseKL)
    estimator: Estimator = field(default_factory=MonteCarlo)
    beta: float = 0.04
    clip: Clip = 0.2
    future: bool = True
    place: Literal["loss", "reward"] = "loss"
    level: Literal["token", "sequence"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    aggregate: Aggregate = "tokens"
    advantage: Literal["std", "mean"] = "std"

    def __post_init__(self):
        self.estimator.check(self.divergence)
        _check_estimator(self.estimator)
        if not self.beta >= 0:
            raise ValueError(f"beta must be >= 0, got {self.beta!r}: a negative one maximises the divergence")
        check_clip(self.clip)
        check_aggregate(self.aggregate)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        _check_level(self)
        if self.place == "reward":
            _check_reward(self)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("advantage",) if self.aggregate == "tokens" else ("advantage", "sequences")

    def advantages(self, rewards: Tensor) -> Tensor:
        """[groups, samples] of rewards -> of advantages."""
        return group_advantage(rewards, self.advantage)

    def __call__(
        self,
        *,
        log_policy: Tensor,
        log_behaviour: Tensor,
        rewards: Tensor | None = None,
        advantage: Tensor | None = None,
        mask: Tensor,
        count: Tensor | float | None = None,
        sequences: Tensor | float | None = None,
        **evidence: Tensor,
    ) -> Out:
        """log_policy, log_behaviour, mask [B, T] of the sampled tokens; rewards [groups, B / groups].

        advantage [B] in place of rewards: normalised elsewhere, where this batch has no whole groups.
        count, sequences: those of the global batch (default: here). `evidence`: what else
        `estimator.evidence` names, over [B, T].
        """
        advantage, metrics = self._advantage(rewards, advantage)
        if len(advantage) != len(log_policy):
            raise ValueError(f"{len(advantage)} rewards for {len(log_policy)} sequences; one each is needed")
        if self.beta or evidence:
            evidence = self._evidence(evidence, log_behaviour.detach())
        if self.beta and self.place == "reward":
            score, value = self._score(evidence, mask)
            advantage = advantage - self.beta * score
        log_ratio = log_importance(log_policy, log_behaviour, mask, self.ratio)
        gain = clipped_gain(log_ratio, advantage, self.clip)
        rows = -gain.gain
        if self.beta and self.place == "loss":
            penalty, value = self._penalty(evidence, log_policy, mask)
            rows = rows + self.beta * penalty
        if self.beta:
            metrics["divergence"] = self._logged(value, mask)
        metrics["ratio"] = mean_over_tokens(gain.ratio, mask)
        metrics["clipped"] = mean_over_tokens(gain.clipped, mask)
        return Out(aggregated(rows, mask, self.aggregate, count, sequences), metrics)

    def _evidence(self, evidence: dict[str, Tensor], log_behaviour: Tensor) -> dict[str, Tensor]:
        names = self.estimator.evidence
        if "log_behaviour" in names:
            evidence = evidence | {"log_behaviour": log_behaviour}
        return dict(zip(names, named(evidence, names), strict=True))

    def _penalty(self, evidence: dict[str, Tensor], log_policy: Tensor, mask: Tensor) -> Penalty:
        tensors = list(evidence.values())
        if self.level == "sequence":
            return per_sequence(self.estimator, self.divergence, tensors, mask)
        penalty = per_token(self.estimator, self.divergence, tensors, log_policy, mask, future=self.future)
        _refuse_infinite(penalty.value, self.divergence)
        return penalty

    def _score(self, evidence: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        """(what the penalty multiplies the gradient of each token's log-probability by, its values)."""
        with torch.enable_grad():
            log_q = evidence["log_q"].detach().requires_grad_()
            penalty = self._penalty(evidence | {"log_q": log_q}, log_q, mask)
            (score,) = torch.autograd.grad(penalty.surrogate.sum(), log_q)
        return score, penalty.value

    def _logged(self, value: Tensor, mask: Tensor) -> Tensor:
        """The mean over tokens, or over answers, whose rows sum to their D."""
        if self.level == "token":
            return mean_over_tokens(value, mask)
        return mean_over_tokens(value.sum(-1), mask.any(-1))

    def _advantage(
        self, rewards: Tensor | None, advantage: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """([B, 1], what there is to log of the rewards); neither is differentiated."""
        if advantage is not None and rewards is None:
            return advantage.detach().reshape(-1, 1), {}
        if rewards is None or advantage is not None:
            raise TypeError("GRPO takes either rewards [groups, B / groups] or advantage [B]")
        rewards = rewards.detach()
        return self.advantages(rewards).reshape(-1, 1), {"reward": rewards.float().mean()}


def _refuse_infinite(values: Tensor, divergence: Divergence) -> None:
    broken = int((~values.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{divergence!r} is infinite at {broken} sampled prefixes: the reference has no mass where the "
            "policy has some, or the other way round. Take a divergence that allows it, as JS(0.5)"
        )


def _check_estimator(estimator: Estimator) -> None:
    if estimator.sees not in ("logits", "log_probs"):
        raise TypeError(
            f"GRPO penalises the policy at sampled prefixes, which {estimator!r} cannot see; "
            "write MonteCarlo() or Exact()"
        )
    if getattr(estimator, "samples", "q") == "p":
        raise TypeError(
            f"GRPO's rollouts are not samples of the reference, as {estimator!r} takes them to be; "
            "write MonteCarlo(), or MonteCarlo('behaviour') off-policy"
        )


def _check_level(method: GRPO) -> None:
    if method.level == "token":
        return
    if method.estimator.sees != "log_probs":
        raise TypeError(
            f"D of whole answers is a sum over all answers, and {method.estimator!r} sees one token's "
            "vocabulary at a time; write MonteCarlo(), or level='token'"
        )
    if not method.beta or not method.future:
        raise ValueError(
            "level='sequence' is of the penalty, which beta=0 turns off; leave level out"
            if not method.beta
            else "a whole answer has no later tokens; leave future=False out at level='sequence'"
        )


def _check_reward(method: GRPO) -> None:
    if not method.beta:
        raise ValueError("beta=0 leaves no penalty to put into the reward; leave place out")
    if method.estimator.sees != "log_probs":
        raise TypeError(
            f"a reward is one number a token, and {method.estimator!r} moves the whole vocabulary at each "
            "prefix; write MonteCarlo(), or place='loss'"
        )
    if getattr(method.estimator, "samples", "q") != "q":
        raise TypeError(
            "the policy gradient weights a reward by the importance ratio already, and "
            f"{method.estimator!r} would do so again; write MonteCarlo()"
        )
    if method.ratio == "sequence" and method.level == "token":
        raise ValueError(
            "one importance ratio a sequence cannot carry a reward that differs from token to token; "
            "write ratio='token', level='sequence' or place='loss'"
        )
