"""MiniLLM: KL(Q, P) between whole sequences, by policy gradient on text of the student and its teacher.

Gu, Dong, Wei and Huang, "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543.

    grad D(P, Q) = E_{y ~ Q} sum_t [ grad D_t - R_t grad log q(y_t|y_<t) ]
    D_t = KL(q_t, p_t) over the whole vocabulary,   R_t = sum over k > t of r_k,   r_k = log p(y_k) / q(y_k)

For another f-divergence r_k = psi(U_{k-1}) - psi(U_k), with U_k = P(y_<=k) / Q(y_<=k) the ratio of the text
so far and psi = dD/dQ, and grad D_t = sum_v psi(U_{t-1} p_t/q_t) grad q_t. The paper samples every token from
alpha p + (1 - alpha) q (`sampler`) and weighs it by its own q / mixture; gamma, and whether R_t is divided by
the number of tokens it sums, are fields. P is the teacher and Q the student.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fdiv._divergence import FDivergence, require_f_divergence
from fdiv.divergences.kl import ReverseKL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, earlier, later, mean_over_tokens, named
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Mix, TeacherMixed


@dataclass(frozen=True)
class MiniLLM:
    """The mean over tokens: each step exactly, what follows it by policy gradient.

    Under ReverseKL the loss has the value of the single steps; under another divergence only its gradient
    means anything.
    importance: "token", the paper's, weighs R_t by q / mixture of token t, at most 1/(1 - alpha), and is
    biased; "sequence" weighs D_t and each r_k by the product of those before t, and up to k, and is exact.
    Where the student alone wrote, both are 1.
    gamma: r_k counts gamma^(k-t); 0 leaves the single steps, which is GKD on the student's text.
    length_normalised: divide R_t by the number of tokens after t.
    clip: of the importance ratio, as in PPO. reward_scale, reward_clip: r_k / scale within +-clip.
    MiniLLM(importance="sequence", gamma=1.0, length_normalised=False, clip=None, reward_scale=1.0,
    reward_clip=None) is the exact gradient.
    """

    consumes: ClassVar[Consumes] = "responses"
    reads: ClassVar[tuple[str, ...]] = ("sequence", "log_p_label", "log_q_label", "log_behaviour")

    divergence: FDivergence = field(default_factory=ReverseKL)
    estimator: Estimator = field(default_factory=Exact)
    sampler: Sampler = field(default_factory=TeacherMixed)
    importance: Literal["token", "sequence"] = "token"
    gamma: float = 0.95
    length_normalised: bool = True
    clip: float | None = 0.2
    reward_scale: float = 0.5
    reward_clip: float | None = 100.0

    def __post_init__(self):
        require_f_divergence(self.divergence, "MiniLLM")
        self.estimator.check(self.divergence)
        if self.divergence != ReverseKL() and self.estimator != Exact():
            raise TypeError(
                f"under {self.divergence!r} MiniLLM's single step is the whole row's psi, got "
                f"{self.estimator!r}; write Exact(), or ReverseKL()"
            )
        if self.estimator.sees not in ("logits", "heads"):
            raise TypeError(
                f"MiniLLM sums its single step over the vocabulary, which {self.estimator!r} does not see; "
                "write Exact(), FusedLinear(), TopK(k) or SampledLogits(n)"
            )
        student = isinstance(self.sampler, Mix) and self.sampler.lmbda == 1
        if not (student or isinstance(self.sampler, TeacherMixed)):
            raise TypeError(
                f"MiniLLM's expectation is over the student's text, got {self.sampler!r}; write "
                "TeacherMixed(alpha), or Mix(1) for the student alone"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.importance not in ("token", "sequence"):
            raise ValueError(f"importance is 'token' or 'sequence', got {self.importance!r}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is a discount in [0, 1], got {self.gamma!r}")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"clip is between 0 and 1, or None for no clipping, got {self.clip!r}")
        if self.clip is not None and self.importance == "sequence":
            raise ValueError(
                "importance='sequence' has no ratio of a token that clip could bound; write clip=None"
            )
        if not 0 < self.reward_scale < math.inf:
            raise ValueError(f"reward_scale divides the rewards and is > 0, got {self.reward_scale!r}")
        if self.reward_clip is not None and not self.reward_clip > 0:
            raise ValueError(f"reward_clip is > 0, or None for no clipping, got {self.reward_clip!r}")

    def __call__(
        self,
        *,
        sequence: Tensor,
        log_p_label: Tensor,
        log_q_label: Tensor,
        log_behaviour: Tensor,
        count: Tensor | float | None = None,
        **evidence: Tensor,
    ) -> Out:
        """[R] each: see READABLE; `evidence` is the estimator's. count: tokens of the global batch."""
        tensors = named(evidence, self.estimator.evidence)
        log_q = log_q_label.detach()
        single, reward = self._steps(log_p_label.detach() - log_q, sequence, tensors)
        reward = self._bounded(reward)
        log_weight = log_q - log_behaviour.detach()
        if self.importance == "sequence":
            before = earlier(log_weight, sequence)
            single, reward = before.exp() * single, (before + log_weight).exp() * reward
            ratio = (log_q_label - log_q).exp()
        else:
            ratio = (log_q_label - log_behaviour.detach()).exp()
        gain, clipped = self._gain(ratio, self._returns(reward, sequence))
        rows = single - (gain - gain.detach())
        metrics = {"weight": log_weight.exp(), "clipped": clipped, "reward": reward}
        return Out(mean_over_tokens(rows, count=count), {k: mean_over_tokens(v) for k, v in metrics.items()})

    def _steps(self, log_ratio: Tensor, sequence: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(the loss of each step alone, its reward r), [R] each."""
        if self.divergence == ReverseKL():  # its psi is -log u, a sum over tokens: no prefix enters
            return self.estimator(self.divergence, *tensors), log_ratio
        log_p, log_q = tensors
        before = earlier(log_ratio, sequence)
        so_far = self.divergence.psi(before)
        gap = torch.where(log_q == -math.inf, 0.0, log_p - log_q).detach()  # [R, vocab]
        price = self.divergence.psi(before[:, None] + gap) - so_far[:, None]
        return (price * log_q.exp()).sum(-1), so_far - self.divergence.psi(before + log_ratio)

    def _bounded(self, reward: Tensor) -> Tensor:
        reward = reward / self.reward_scale
        return reward if self.reward_clip is None else reward.clamp(-self.reward_clip, self.reward_clip)

    def _returns(self, reward: Tensor, sequence: Tensor) -> Tensor:
        total = discounted(reward, sequence, self.gamma) - reward
        if not self.length_normalised:
            return total
        return total / later(torch.ones_like(reward), sequence).clamp(min=1)

    def _gain(self, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """(what to maximise, whether the clip has cut it off from the graph), [R] each."""
        gain = ratio * advantage
        if self.clip is None:
            return gain, torch.zeros_like(advantage)
        inside = ratio.clamp(1 - self.clip, 1 + self.clip) * advantage
        return torch.minimum(gain, inside), (inside < gain).to(advantage.dtype)


def discounted(rows: Tensor, sequence: Tensor, gamma: float) -> Tensor:
    """The sum over k >= t of gamma^(k-t) rows_k within each sequence, [R], in log2(R) passes."""
    step = 1
    while step < len(rows):
        ahead = torch.where(sequence[step:] == sequence[:-step], rows[step:], 0.0)
        rows = rows + gamma**step * torch.nn.functional.pad(ahead, (0, step))
        step *= 2
    return rows
