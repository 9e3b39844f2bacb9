"""CS-IB: the information bottleneck for regression, with Cauchy-Schwarz divergences between samples.

Yu, Yu, Loekse, Jenssen and Principe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", arXiv
2404.17951.

    L = D_CS(p(y|x), q(y'|x)) + beta I_CS(x; t)

t are the features, y' the prediction, both of x alone. No likelihood of y is assumed and nothing is bounded:
both terms are sums over Gaussian Gram matrices of the batch, see fdiv.estimate.cauchy_schwarz. The released
code divides the second term by sqrt(I_CS(x; x) I_CS(t; t)), which is `normalised`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fdiv.divergences.cauchy_schwarz import CauchySchwarz
from fdiv.divergences.kernels import require_positive
from fdiv.estimate.cauchy_schwarz import (
    Weighting,
    conditional_cs,
    cs_information,
    normalised_cs_information,
)
from fdiv.methods._method import Consumes, Out
from fdiv.methods.supervise.squared_error import residuals, root_mean_square


@dataclass(frozen=True)
class CSIB:
    """D_CS(y|x) of a batch plus beta times the features' Cauchy-Schwarz information about the inputs.

    divergence: its bandwidth is that of the targets. bandwidth, feature_bandwidth: of the kernels on inputs
    and features; all are lengths in the units of what they compare, and the paper's are 1 on standardised
    inputs. weighting: "row", the paper's, or "both", which is never negative: see `conditional_cs`.
    normalised: without it, the term is lowered by small features alone.
    """

    consumes: ClassVar[Consumes] = "examples"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "features", "logits", "targets")
    unit: ClassVar[str] = "batch"  # examples are compared with each other

    divergence: CauchySchwarz = CauchySchwarz(1.0)
    beta: float = 0.01
    bandwidth: float = 1.0
    feature_bandwidth: float = 1.0
    weighting: Weighting = "row"
    normalised: bool = False

    def __post_init__(self):
        if not isinstance(self.divergence, CauchySchwarz):
            raise TypeError(
                f"CSIB is made of Cauchy-Schwarz divergences, got {self.divergence!r}; write "
                "CauchySchwarz(bandwidth)"
            )
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta is finite and >= 0, got {self.beta!r}")
        if self.weighting not in ("row", "both"):
            raise ValueError(f"weighting is 'row' or 'both', got {self.weighting!r}")
        require_positive(self.bandwidth, "bandwidth")
        require_positive(self.feature_bandwidth, "feature_bandwidth")

    def __call__(
        self,
        *,
        inputs: Tensor,
        features: Tensor,
        logits: Tensor,
        targets: Tensor,
        count: Tensor | float | None = None,
    ) -> Out:
        """inputs [B, ...], features [B, width], the prediction logits and targets [B, K]: a whole batch."""
        errors = residuals(logits, targets)
        if not len(errors):
            return Out(errors.sum() + features.sum(), {})
        y_bandwidth = self.divergence.bandwidth
        missed = conditional_cs(inputs, targets, logits, self.bandwidth, y_bandwidth, self.weighting)
        information = normalised_cs_information if self.normalised else cs_information
        kept = information(inputs, features, self.bandwidth, self.feature_bandwidth)
        loss = missed + self.beta * kept if self.beta else missed
        metrics = {"conditional divergence": missed.detach(), "information": kept.detach()}
        return Out(loss, metrics | {"rmse": root_mean_square(errors)})
