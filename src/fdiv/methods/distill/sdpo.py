"""SDPO: a model distils what it would have said, had it seen the feedback.

Huebotter, Luebeck, Behric, Baumann, Bagatella, Marta, Hakimi, Shenfeld, Kleine Buening, Guestrin and Krause,
"Reinforcement Learning via Self-Distillation", arXiv 2601.20802.

    L = mean over tokens of min(q / behaviour, clip) D(p, q)(.|y_<t),   y ~ student

The teacher p has the student's own weights (their average, at rate `ema` a step) and a prompt that also holds
a right solution, or what the environment said; q sees the prompt alone. The ratio is that of the sampled
token, not differentiated. The authors' alpha is that of `JS(alpha)`, alpha KL(p, m) + (1 - alpha) KL(q, m)
with m = alpha p + (1 - alpha) q; their 0 is `KL()`, their 1 `ReverseKL()`, and their top-k with tail
`TopK(100, "student")`.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.js import JS
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.top_k import TopK
from fdiv.methods._method import Consumes, Out, check_mask, mean_over_tokens, named
from fdiv.methods.distill._rows import some_rows
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Mix


@dataclass(frozen=True)
class SDPO:
    """The mean over response tokens of the weighted D(informed self, self); rows without context give 0.

    clip: the largest weight of a token whose writer is not quite the student any more.
    ema: how far the teacher follows the student each step; 0 keeps the weights of the start.
    """

    consumes: ClassVar[Consumes] = "responses"
    context: ClassVar[str] = "privileged"
    reads: ClassVar[tuple[str, ...]] = ("shown", "log_q_label", "log_behaviour")

    divergence: Divergence = field(default_factory=JS)
    estimator: Estimator = field(default_factory=lambda: TopK(100, "student"))
    clip: float = 2.0
    ema: float = 0.05
    sampler: Sampler = field(default_factory=Mix)

    def __post_init__(self):
        GKD(self.divergence, self.estimator)  # refuses what it cannot train
        if not self.clip >= 1:
            raise ValueError(f"clip is a ratio >= 1 (on-policy tokens have 1), got {self.clip!r}")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema is a rate between 0 and 1, got {self.ema!r}")

    def __call__(
        self,
        *,
        shown: Tensor,
        log_q_label: Tensor,
        log_behaviour: Tensor,
        count: Tensor | float | None = None,
        **evidence: Tensor,
    ) -> Out:
        """`evidence`: the tensors that `estimator.evidence` names; the others [R] of the sampled tokens.

        count: the tokens of the global batch, shown or not (default: here). The authors' mean, over shown
        tokens alone, is loss / metrics["shown"], both of the global batch; or pass the number of those.
        """
        check_mask(shown, log_q_label.shape)
        tensors = named(some_rows(evidence, shown), self.estimator.evidence)
        weight = (log_q_label - log_behaviour).detach().clamp(max=math.log(self.clip)).exp()
        rows = self.estimator(self.divergence, *tensors)
        loss = mean_over_tokens(weight[shown] * rows, count=len(shown) if count is None else count)
        numbers = {"shown": shown.to(weight), "ratio": weight}
        return Out(loss, {name: mean_over_tokens(number) for name, number in numbers.items()})
