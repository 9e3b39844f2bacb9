"""Sinkhorn divergences of very large clouds, by the kernels of geomloss and KeOps."""

from typing import Literal

from torch import Tensor

from fdiv._metric import weighted_points
from fdiv.divergences.sinkhorn import Sinkhorn
from fdiv.divergences.wasserstein import require_equal_masses

try:
    from geomloss import SamplesLoss
except ImportError as error:
    raise ImportError('this needs geomloss: pip install "fdiv[transport]"') from error

Backend = Literal["auto", "tensorized", "online", "multiscale"]


def between(
    divergence: Sinkhorn,
    x: Tensor,
    y: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    scaling: float = 0.99,
    backend: Backend = "auto",
) -> Tensor:
    """`divergence.between(x, y, log_a, log_b)` of clouds [..., N, D] and [..., M, D], in memory of N + M.

    scaling: ratio of two steps of a descent from the clouds' diameter to blur, in (0, 1). Nothing tests its
        convergence: at a blur of a third of the clouds' spread 0.9 leaves 3 % of the value, 0.99 leaves 0.1 %
        and 0.999 leaves 3e-5; more at a smaller blur.
    backend: "online" and "multiscale" need pykeops; "auto" takes them from 5,000 points on.
    Gradients are of first order only. Errors: ValueError for what geomloss would ignore or not know.
    """
    if divergence.tolerance is not None or divergence.chunk is not None:
        raise ValueError(
            f"geomloss has no test of convergence and chunks by itself: leave tolerance and chunk out of "
            f"{divergence!r}, and set scaling"
        )
    if divergence.p not in (1, 2):
        raise ValueError(f"geomloss knows the costs of p = 1 and p = 2, got {divergence!r}")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling is in (0, 1), got {scaling!r}")
    x, y, a, b = weighted_points(x, y, log_a, log_b)
    require_equal_masses(a, b, "geomloss")
    batch = x.shape[:-2]
    loss = SamplesLoss(
        "sinkhorn",
        p=int(divergence.p),
        blur=divergence.blur,
        debias=divergence.debias,
        scaling=scaling,
        backend=backend,
    )
    a, b = a.expand(x.shape[:-1]), b.expand(y.shape[:-1])
    if not batch:
        return loss(a, x, b, y)
    one, other, points, targets = (t.flatten(0, len(batch) - 1) for t in (a, b, x, y))
    return loss(one, points, other, targets).reshape(batch)
