"""Masked rows are taken out before any work is done on them, and put back as zeros."""

import torch
from torch import Tensor


def kept_rows(mask: Tensor | None, rows: int) -> Tensor | None:
    """The numbers of the rows to compute, None for all."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != (rows,):
        raise ValueError(f"mask is boolean [{rows}], got {mask.dtype} {tuple(mask.shape)}")
    return mask.nonzero().squeeze(-1)


def among_zeros(value: Tensor, kept: Tensor | None, rows: int) -> Tensor:
    """The kept rows' values among zeros for the others, [rows]."""
    return value if kept is None else value.new_zeros(rows).index_put((kept,), value)
