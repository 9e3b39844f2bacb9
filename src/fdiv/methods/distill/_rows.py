"""What the methods of this folder that leave rows out have in common."""

from typing import Any

from torch import Tensor

HEADS = ("p_weight", "q_weight")  # evidence without rows


def some_rows(evidence: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """These rows (a boolean mask, or their numbers) of all evidence that has rows.

    Rows left out before the estimator sees them cost no work, and their infinities do no harm.
    """
    return {name: t if name in HEADS else t[rows] for name, t in evidence.items()}
