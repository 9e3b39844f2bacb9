"""OPSD: a model that has read the solution teaches itself that has not, on the latter's own text.

Zhao, Xie, Liu, Huang, Pang, Chen and Grover, "Self-Distilled Reasoner: On-Policy Self-Distillation for Large
Language Models", arXiv 2601.18734.

    L = mean over tokens of D(p, q)(.|y_<t),   y ~ student

Both are one model: the teacher p has the weights of the start (`ema` = 0) and a prompt with the reference
solution, the student q the problem alone. The authors' beta is that of `JS(beta)`. Both models' logits are
divided by `temperature`, at which the student is also sampled, from its 20 likeliest tokens and .95 of mass.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.divergences.js import JS
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Decoding, Sampler
from fdiv.sample.fixed import Mix


@dataclass(frozen=True)
class OPSD:
    """The mean over response tokens of D(informed self, self); rows without a solution to show give 0.

    ema: how far the teacher follows the student each step; 0 keeps the weights of the start.
    """

    consumes: ClassVar[Consumes] = "responses"
    context: ClassVar[str] = "privileged"
    reads: ClassVar[tuple[str, ...]] = ("shown",)

    divergence: Divergence = field(default_factory=JS)
    estimator: Estimator = field(default_factory=Exact)
    temperature: float = 1.1
    ema: float = 0.0
    sampler: Sampler = field(default_factory=lambda: Mix(1.0, Decoding(1.1, 20, 0.95)))

    def __post_init__(self):
        GKD(self.divergence, self.estimator, temperature=self.temperature)  # refuses what it cannot train
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema is a rate between 0 and 1, got {self.ema!r}")

    def __call__(self, *, shown: Tensor, count: Tensor | float | None = None, **evidence: Tensor) -> Out:
        """`evidence`: the tensors that `estimator.evidence` names, the temperature already applied.

        shown [R]: whether the teacher had a solution. count: the tokens of the global batch, shown or not
        (default: here); the mean over shown tokens is loss / metrics["shown"], both of the global batch.
        """
        count = len(shown) if count is None else count
        loss = GKD(self.divergence, self.estimator)(mask=shown, count=count, **evidence).loss
        return Out(loss, {"shown": mean_over_tokens(shown.to(loss.dtype))})
