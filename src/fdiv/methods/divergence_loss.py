"""A divergence as a module, for training loops that are made of modules."""

from torch import Tensor, nn

from fdiv._divergence import Divergence
from fdiv.divergences.kl import KL
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.exact import Exact
from fdiv.methods.distill.gkd import GKD


class DivergenceLoss(nn.Module):
    """The mean over rows of D(p, q), as `estimator` finds it: `DivergenceLoss(JS(0.5))(log_p, log_q)`.

    Called with the estimator's evidence in its order: log_p and log_q [..., vocab] for Exact(), p_hidden,
    p_weight, q_hidden and q_weight for FusedLinear(). mask [...] selects rows; count is their number in the
    global batch (default: here). It has no parameters; what it cannot train it refuses when it is built.
    """

    def __init__(self, divergence: Divergence | None = None, estimator: Estimator | None = None):
        super().__init__()
        self.method = GKD(divergence or KL(), estimator or Exact())

    def forward(
        self, *evidence: Tensor, mask: Tensor | None = None, count: Tensor | float | None = None
    ) -> Tensor:
        names = self.method.estimator.evidence
        if len(evidence) != len(names):
            raise TypeError(
                f"{self.method.estimator!r} reads {', '.join(names)}; got {len(evidence)} tensors"
            )
        return self.method(mask=mask, count=count, **dict(zip(names, evidence, strict=True))).loss

    def extra_repr(self) -> str:
        return f"{self.method.divergence!r}, {self.method.estimator!r}"
