"""DistillSpec: a draft model distilled so that more of its drafts are kept by speculative decoding.

Zhou, Lyu, Rawat, Menon, Rostamizadeh, Kumar, Kagy and Agarwal, "DistillSpec: Improving Speculative Decoding
via Knowledge Distillation", arXiv 2310.08461.

    minimise E_{x, y ~ draft} mean_t D(p_t, q_t);    acceptance = sum min(p, q) = 1 - TV(p, q)
    acceptance >= 1 - sqrt(KL(p, q) / 2)  and  >= 1 - sqrt(2 JS(p, q)),  by Pinsker's inequality

The paper's target model is p, its draft model q; its divergence is `divergence`, and who writes the text is
`sampler`: the draft itself by default, which costs least. TV is the acceptance itself, but its gradient has
only signs; the paper chooses the divergence by task and decoding.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdiv._divergence import Divergence, FDivergence
from fdiv.divergences.js import JS
from fdiv.divergences.kl import KL
from fdiv.divergences.tv import TV
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.estimate.fused_linear import FusedLinear
from fdiv.methods._method import Consumes, Out, mean_over_tokens
from fdiv.methods.distill.gkd import GKD
from fdiv.sample._sampler import Sampler
from fdiv.sample.fixed import Mix


@dataclass(frozen=True)
class DistillSpec:
    """The mean over response tokens of D(target, draft), with the acceptance it is after.

    metrics: `acceptance`, exact whatever divergence and estimator train (with FusedLinear a forward pass
    more over the heads); with bounds=True, for two passes more, `acceptance_by_kl` and `acceptance_by_js`,
    which KL and JS alone would promise.
    temperature: divides the logits of both; take the one that will be decoded at.
    """

    consumes: ClassVar[Consumes] = "responses"

    divergence: Divergence = field(default_factory=TV)
    estimator: Estimator = field(default_factory=Exact)
    sampler: Sampler = field(default_factory=Mix)
    temperature: float = 1.0
    bounds: bool = False

    def __post_init__(self):
        GKD(divergence=self.divergence, estimator=self.estimator, temperature=self.temperature)
        if self.estimator.sees == "heads" and not isinstance(self.estimator, FusedLinear):
            raise TypeError(
                f"the acceptance needs the target's whole law, of which {self.estimator!r} has a few atoms; "
                "write FusedLinear(), or GKD() to train without knowing the acceptance"
            )

    def __call__(
        self, *, mask: Tensor | None = None, count: Tensor | float | None = None, **evidence: Any
    ) -> Out:
        """`evidence`: the tensors that `estimator.evidence` names, the temperature already applied.

        mask [rows] selects response tokens; count is their number in the global batch (default: here).
        """
        method = GKD(divergence=self.divergence, estimator=self.estimator, temperature=self.temperature)
        loss = method(mask=mask, count=count, **evidence).loss
        with torch.no_grad():
            metrics = {"acceptance": mean_over_tokens(1 - self._exactly(TV(), mask, evidence), mask)}
            if self.bounds:
                kl, js = (self._exactly(divergence, mask, evidence) for divergence in (KL(), JS(0.5)))
                by_kl, by_js = ((1 - t.sqrt()).clamp(min=0) for t in (kl / 2, 2 * js))
                metrics["acceptance_by_kl"] = mean_over_tokens(by_kl, mask)
                metrics["acceptance_by_js"] = mean_over_tokens(by_js, mask)
        return Out(loss, metrics)

    def _exactly(self, divergence: FDivergence, mask: Tensor | None, evidence: dict[str, Any]) -> Tensor:
        """[rows]; what masked ones say is not looked at."""
        if isinstance(self.estimator, FusedLinear):
            whole = FusedLinear(chunk=self.estimator.chunk, compiled=self.estimator.compiled)
            return whole(divergence, *(evidence[name] for name in whole.evidence), mask=mask)
        return divergence(evidence["log_p"], evidence["log_q"])
