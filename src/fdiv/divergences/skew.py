"""The skewed KL divergences of DistiLLM: a KL whose second argument is mixed with the first."""

from dataclasses import dataclass

from torch import Tensor

from fdiv._divergence import FDivergence
from fdiv._math import bregman_exp, log_mixture


@dataclass(frozen=True)
class SkewKL(FDivergence):
    """KL(p, skew p + (1 - skew) q): mode-covering as KL, but bounded by -log skew.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv
    2402.03898 (skew 0.1); Lee, "On the effectiveness of the skew divergence for statistical language
    analysis" (2001).
    """

    skew: float

    def __post_init__(self):
        _check_skew(self, "KL()")

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return bregman_exp(log_mixture(log_p, log_q, self.skew), log_p)

    @property
    def reverse(self) -> "SkewReverseKL":
        return SkewReverseKL(self.skew)


@dataclass(frozen=True)
class SkewReverseKL(FDivergence):
    """KL(q, skew q + (1 - skew) p): mode-seeking as ReverseKL, but bounded by -log skew.

    Source: Ko et al., DistiLLM, arXiv 2402.03898 (skew 0.1).
    """

    skew: float

    def __post_init__(self):
        _check_skew(self, "ReverseKL()")

    def perspective(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return bregman_exp(log_mixture(log_q, log_p, self.skew), log_q)

    @property
    def reverse(self) -> SkewKL:
        return SkewKL(self.skew)


def _check_skew(divergence: SkewKL | SkewReverseKL, at_zero: str) -> None:
    if not 0 < divergence.skew < 1:
        raise ValueError(
            f"{type(divergence).__name__}(skew) needs 0 < skew < 1, got {divergence.skew!r}: "
            f"write {at_zero} for skew 0; at skew 1 the divergence is identically 0"
        )
