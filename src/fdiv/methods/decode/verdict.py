"""When a drafted token is kept, and what stands in its place when it is not.

p is the target's law of the next token, q the draft's, both as probabilities [..., vocab] in float64. A
verdict is two masses: of the tokens that are drafted and kept, kept <= q, and, up to its scale, of what
replaces the others. What is written then has the law

    kept + (1 - sum kept) residual / sum residual

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192,
and Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv 2302.01318, for
`Lossless` and (the former) lenience; Cai et al., "Medusa", arXiv 2401.10774, for `Typical`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Verdict(Protocol):
    """A frozen dataclass of three laws."""

    def kept(self, p: Tensor, q: Tensor) -> Tensor: ...

    def residual(self, p: Tensor, q: Tensor) -> Tensor: ...

    def bonus(self, p: Tensor, q: Callable[[], Tensor]) -> Tensor:
        """Of the token that follows a draft that was kept whole; q() asks the draft model, for a call."""
        ...


@dataclass(frozen=True)
class Lossless:
    """Kept with probability min(1, p/q), else drawn from max(p - q, 0): the law is p, for any q."""

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        return torch.minimum(p, q)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return (p - q).clamp(min=0)

    def bonus(self, p: Tensor, q: Callable[[], Tensor]) -> Tensor:
        return p


@dataclass(frozen=True)
class Lenient:
    """Kept with probability min(1, p/(lenience q)): more is kept, and the law is no longer p.

    residual_of: "target" draws from max(p - q, 0), "lenient" from max(p/lenience - q, 0). They write
    different laws; lenience = 1 is Lossless() with either.
    """

    lenience: float = 0.5
    residual_of: Literal["target", "lenient"] = "target"

    def __post_init__(self):
        if not 0 < self.lenience <= 1:
            raise ValueError(f"lenience is in (0, 1], 1 being lossless, got {self.lenience!r}")
        if self.residual_of not in ("target", "lenient"):
            raise ValueError(f"residual_of is 'target' or 'lenient', got {self.residual_of!r}")

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        return torch.minimum(p / self.lenience, q)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return ((p / self.lenience if self.residual_of == "lenient" else p) - q).clamp(min=0)

    def bonus(self, p: Tensor, q: Callable[[], Tensor]) -> Tensor:
        return p


@dataclass(frozen=True)
class Ensemble:
    """Kept with probability min(1, 1 - weight + weight p/q): the law is weight p + (1 - weight) q."""

    weight: float = 0.5

    def __post_init__(self):
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight is the target's, in (0, 1], 1 being lossless, got {self.weight!r}")

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        return torch.minimum(torch.lerp(q, p, self.weight), q)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return (p - q).clamp(min=0)

    def bonus(self, p: Tensor, q: Callable[[], Tensor]) -> Tensor:
        return torch.lerp(q(), p, self.weight)


@dataclass(frozen=True)
class Typical:
    """Kept if p > min(epsilon^2, epsilon e^-H), H the entropy of p in nats; else drawn anew, from p."""

    epsilon: float = 0.3

    def __post_init__(self):
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon is in (0, 1), got {self.epsilon!r}; what is unlikelier goes")

    def kept(self, p: Tensor, q: Tensor) -> Tensor:
        entropy = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
        threshold = (self.epsilon * (-entropy).exp()).clamp(max=self.epsilon**2)
        return torch.where(p > threshold, q, 0.0)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        return p

    def bonus(self, p: Tensor, q: Callable[[], Tensor]) -> Tensor:
        return p
