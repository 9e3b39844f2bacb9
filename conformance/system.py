"""What a system can be asked: an adapter overrides what its package has, and nothing else.

Conventions: teacher (or reference) before student (or policy); logits [rows, vocab]; a divergence gives one
number a row, [rows]. Gradients flow to the student's tensors. Divergences go by the names of
`conformance.oracle.DIVERGENCES`.
"""

from collections.abc import Callable
from typing import ClassVar, NoReturn

from torch import Tensor

Rows = Callable[[Tensor, Tensor], Tensor]  # (teacher logits, student logits) -> [rows]
TruncatedRows = Callable[[Tensor, Tensor, int], Tensor]  # the same over k atoms
Score = Callable[[Tensor], Tensor]  # log policy / reference -> the score that a preference loss compares
Penalty = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # log-probs of reference, policy, behaviour -> loss terms


class NotApplicable(Exception):
    """The system has nothing of the kind; the message says what is missing."""


class System:
    """A system under test."""

    name: str
    version: str
    reasons: ClassVar[dict[str, str]] = {}  # case: why it does not apply, where "no ..." says too little

    # -- on the whole vocabulary --------------------------------------------------------------------------

    def divergences(self) -> dict[str, Rows]:
        """Every divergence it offers on the whole vocabulary."""
        self.lacks("divergence on logits")

    def jsd(self, teacher: Tensor, student: Tensor, beta: float) -> Tensor:
        """Its generalised Jensen-Shannon divergence, beta as the system's own users write it: [rows]."""
        self.lacks("generalised Jensen-Shannon divergence")

    def configure_jsd(self, beta: float) -> object:
        """What its user builds to train with this beta."""
        self.lacks("configuration with a beta")

    def skew_kl(self, teacher: Tensor, student: Tensor, skew: float) -> Tensor:
        """KL(p, skew p + (1 - skew) q): [rows]."""
        self.lacks("skewed KL")

    def mismatched_vocabulary(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Its reverse KL [rows] of logits of different widths; raising an error counts as refusing."""
        self.lacks("loss on logits of two models")

    def padded_vocabulary(self, teacher: Tensor, student: Tensor, size: int) -> Tensor:
        """The same where the system can be told that only the first `size` columns are real."""
        return self.mismatched_vocabulary(teacher, student)

    # -- from hidden states and heads ---------------------------------------------------------------------

    def fused_jsd(
        self,
        teacher: tuple[Tensor, Tensor],  # hidden [rows, width], head [vocab, width]
        student: tuple[Tensor, Tensor],
        beta: float,  # 0 is KL(p, q), 1 KL(q, p)
        mask: Tensor | None = None,  # [rows], true where a row counts
        chunk: int | None = None,
    ) -> Tensor:
        """The mean over the rows that count, without both models' logits in memory: a scalar."""
        self.lacks("fused linear divergence")

    # -- on a few atoms -----------------------------------------------------------------------------------

    def truncated(self) -> dict[str, TruncatedRows]:
        """Every divergence it offers on k atoms of the vocabulary, at its default settings."""
        self.lacks("top-k divergence")

    def with_tail(self) -> dict[str, TruncatedRows]:
        """Those that keep the mass outside the k atoms as an atom, if it is asked for."""
        self.lacks("tail atom")

    def tempered_truncated(self, teacher: Tensor, student: Tensor, k: int, temperature: float) -> Tensor:
        """One of them at a temperature, in its own way of applying it: [rows]."""
        self.lacks("temperature for top-k")

    def served(self, log_probs: Tensor, ids: Tensor, student: Tensor) -> Tensor:
        """A loss from a served teacher's top-k log-probabilities, padded with -inf: a scalar."""
        self.lacks("loss on served top-k log-probabilities")

    # -- sampled tokens -----------------------------------------------------------------------------------

    def penalties(self) -> dict[str, Penalty]:
        """Terms whose mean over sampled tokens keeps the policy near the reference.

        The name is that of the divergence; after a comma it may say which estimator.
        """
        self.lacks("penalty on sampled tokens")

    def off_policy_penalties(self) -> dict[str, Penalty]:
        """What it offers where another policy drew the samples."""
        return self.penalties()

    def full_penalty(self, reference: Tensor, policy: Tensor, name: str) -> Tensor:
        """A policy-gradient penalty that looks at more than the sampled token: a loss on 1 row of logits."""
        self.lacks("full-vocabulary penalty in policy gradients")

    def policy_gradient(self, log_policy: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
        """The policy-gradient loss of one group of sequences [B, T] with a reward each [B]: a scalar."""
        self.lacks("policy gradient that can be called alone")

    def future_credit(self, log_ratios: Tensor, mask: Tensor) -> Tensor:
        """The gradient of a penalty at each token of one sequence [T], from its future alone."""
        self.lacks("credit for later tokens")

    def ratio_functions(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Functions of the log-ratio that are clamped or continued far out, to be differentiated."""
        self.lacks("clamped function of the log-ratio")

    # -- preferences --------------------------------------------------------------------------------------

    def preference_scores(self) -> dict[str, Score]:
        """The scores f'(policy / reference) of its preference loss."""
        self.lacks("f-DPO score")

    def absolute_scores(self) -> dict[str, Score]:
        """Those scores that a loss uses other than in a difference of two."""
        self.lacks("score outside a difference")

    def alpha_score(self, log_ratio: Tensor, alpha: float) -> Tensor:
        """The score under its alpha divergence, alpha as its documentation defines it."""
        self.lacks("alpha divergence for preferences")

    def preference_margins(self, chosen: float, rejected: float) -> tuple[float, float]:
        """(logged, optimised) reward margin at these log-ratios, under its "forward KL"."""
        self.lacks("logged preference reward")

    # -- a training loss ----------------------------------------------------------------------------------

    def token_mean(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
        """The forward-KL training loss of a (micro-)batch of rows; count is the global batch's tokens."""
        self.lacks("reduced loss")

    def reductions(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Every reduced loss that it offers, from (teacher, student, mask)."""
        return {"the token mean": self.token_mean}

    def distil(self, teacher, student, ids: Tensor, mask: Tensor) -> Tensor:
        """The forward-KL training loss of two causal models of transformers on ids [B, T].

        mask [B, T] is true for each token of a response; the rest is prompt and, on the right, padding.
        """
        self.lacks("loss on models")

    def stop_token_mask(self, rollout: Tensor, prompt: int, eos: int) -> Tensor:
        """Which tokens [B, T] of rollouts enter its loss, padding being `eos` too: bool [B, T]."""
        self.lacks("mask for rollouts")

    def on_policy_denominator(self) -> tuple[float, float]:
        """(tokens summed, what the sum is divided by) in a training step on the student's own text."""
        self.lacks("on-policy training that can be called alone")

    def cached_signal(self) -> tuple[Tensor, Tensor]:
        """What a teacher says of two samples, (computed, read from a cache filled in another order)."""
        self.lacks("cache of the teacher's signal")

    # -- configuration ------------------------------------------------------------------------------------

    def unknown_options(self) -> dict[str, Callable[[], object]]:
        """Calls with an option that does not exist; each has to raise."""
        self.lacks("options that can be set alone")

    def doubled_penalty(self) -> Callable[[], object]:
        """A configuration that penalises the same divergence in two places."""
        self.lacks("second place for the penalty")

    def state_as_advantage(self) -> Callable[[], object]:
        """A configuration that makes a per-state divergence an advantage."""
        self.lacks("divergence as an advantage")

    def lacks(self, what: str) -> NoReturn:
        raise NotApplicable(f"no {what}")
