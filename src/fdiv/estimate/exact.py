"""Both densities are known on the whole support: the divergence itself."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fdiv._divergence import Divergence
from fdiv._metric import MetricDivergence
from fdiv.estimate._estimator import Guarantee, Sees


@dataclass(frozen=True)
class Exact:
    """D(p, q) over the last dimension, for any divergence; [rows, vocab] twice -> [rows]."""

    sees: ClassVar[Sees] = "logits"
    evidence = ("log_p", "log_q")
    guarantee = Guarantee(bias="none", bound="exact", support="all atoms")

    def check(self, divergence: object) -> None:
        if isinstance(divergence, MetricDivergence):
            raise TypeError(
                f"{divergence!r} compares points, and a histogram has none: give the atoms their places "
                "with `.on(points)`, points [vocab, D] (an embedding table, say)"
            )
        if not isinstance(divergence, Divergence):
            raise TypeError(f"Exact() takes a divergence, got {divergence!r}; write KL(), not 'KL' or KL")

    def __call__(self, divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
        return divergence(log_p, log_q)
