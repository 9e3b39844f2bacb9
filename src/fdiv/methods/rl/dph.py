"""DPH-RL: policy gradient on what is to be learnt, and a rehearsal of what the initial policy could do.

Li et al., "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in Reinforcement
Learning with Verifiable Reward", arXiv 2509.07430.

    L = L_exp + eta L_pef
    L_exp: clipped policy gradient without a penalty, on the prompts that are left to explore
    L_pef: the token mean of f(pi / pi_0) at stored answers of the initial policy pi_0, one a solved prompt

The samples of L_pef do not move with the policy, so that its own gradient is the exact one, and no reference
model is asked. The paper's f is of pi / pi_0; here p is pi_0 and q is pi, and it is f(u)/u at samples of p:
KL() is the paper's "forward KL", 2 * JS(0.5) its "JS" in generator form, Alpha(a) its alpha = a.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import KL
from fdiv.estimate.monte_carlo import MonteCarlo
from fdiv.methods._method import Consumes, Out, blank, mean_over_tokens
from fdiv.methods.rl.clipping import Clip, check_clip, clipped_gain, log_importance


@dataclass(frozen=True)
class Rehearsal:
    """Which prompts are solved, once and for all: asked of the initial policy before the first step.

    tries: its answers to each prompt. threshold: the share of right ones from which a prompt is rehearsed
    and no longer explored. answers: how many of its right ones are stored, at most; the paper's is one.
    batch: the stored answers that a step goes over.
    """

    tries: int = 8
    threshold: float = 0.75
    batch: int = 32
    answers: int = 1

    def __post_init__(self):
        for name in ("tries", "batch", "answers"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)!r}")
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold is a share of the tries in (0, 1], got {self.threshold!r}; write 6/8 as 0.75"
            )


@dataclass(frozen=True)
class DPH:
    """Clipped policy gradient plus eta times a divergence from the initial policy, at its stored answers.

    cap: the authors' clamp of each token's value, which is 10; it removes the gradient where the policy has
    all but lost a stored answer. None leaves it out.
    """

    consumes: ClassVar[Consumes] = "rollouts"
    reads: ClassVar[tuple[str, ...]] = (
        "advantage",
        "stored_log_policy",
        "stored_log_initial",
        "stored_mask",
        "stored_count",
    )

    divergence: FDivergence = field(default_factory=KL)
    eta: float = 0.01
    clip: Clip = (0.2, 0.28)
    cap: float | None = None
    rehearsal: Rehearsal = field(default_factory=Rehearsal)

    def __post_init__(self):
        require_f_divergence(self.divergence, "DPH")
        check_clip(self.clip)
        if not self.eta > 0:
            raise ValueError(f"eta must be > 0, got {self.eta!r}; without a rehearsal write GRPO(beta=0.0)")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"cap is a value > 0, or None for no cap, got {self.cap!r}")
        if not isinstance(self.rehearsal, Rehearsal):
            raise TypeError(f"rehearsal is a Rehearsal, got {self.rehearsal!r}; write Rehearsal(tries=8)")

    def __call__(
        self,
        *,
        log_policy: Tensor,
        log_behaviour: Tensor,
        mask: Tensor,
        count: Tensor | float | None = None,
        advantage: Tensor,
        stored_log_policy: Tensor,
        stored_log_initial: Tensor,
        stored_mask: Tensor,
        stored_count: Tensor | float | None = None,
    ) -> Out:
        """Rollouts [B, T], advantage [B]; stored answers [b, T']. Either may be empty, B = 0 or b = 0.

        count, stored_count: the tokens of both in the global batch (default: here).
        """
        log_ratio = log_importance(log_policy, log_behaviour, mask)
        gain = clipped_gain(log_ratio, advantage.detach().reshape(-1, 1), self.clip)
        value = self.rehearsed(stored_log_initial, stored_log_policy, stored_mask)
        loss = mean_over_tokens(-gain.gain, mask, count)
        loss = loss + self.eta * mean_over_tokens(value, stored_mask, stored_count)
        metrics = {} if not len(mask) else {"ratio": (gain.ratio, mask), "clipped": (gain.clipped, mask)}
        metrics |= {} if not len(stored_mask) else {"divergence": (value.detach(), stored_mask)}
        return Out(loss, {name: mean_over_tokens(*rows) for name, rows in metrics.items()})

    def rehearsed(self, log_initial: Tensor, log_policy: Tensor, mask: Tensor) -> Tensor:
        """The value of each stored token, whose gradient is the divergence's own; [b, T']."""
        log_p, log_q = blank(log_initial.detach(), mask), blank(log_policy, mask)
        value = MonteCarlo("p")(self.divergence, log_p, log_q)
        return value if self.cap is None else value.clamp(max=self.cap)
