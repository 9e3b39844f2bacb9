"""The columns that evidence is kept in on disk.

    TopK(k)             index, log_p [tokens, k], by falling log_p; log_mass [tokens] where log_p is float16
    SampledLogits(n)    index, log_p, count [atoms]: each token's different atoms and how often it drew them
    heads               p_hidden [tokens, width], in the model's own dtype; its head is a file of its own
    labels              log_p [tokens]

Ids and counts are in the smallest integer type.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from fdiv.estimate.sampled_logits import SampledLogits
from fdiv.estimate.top_k import TopK
from fdiv.teachers._signal import Terms, atoms_of

Precision = Literal["float32", "float16"]


def pack(evidence: dict[str, Tensor], terms: Terms, precision: Precision) -> dict[str, Tensor]:
    """The columns of some rows of evidence."""
    rows, of = {name: t.cpu() for name, t in evidence.items()}, atoms_of(terms.support)
    if terms.support == "heads":
        return {"p_hidden": rows["p_hidden"]}
    dtype = getattr(torch, precision)
    if terms.support == "labels":
        return {"log_p": rows["log_p"].to(dtype)}
    if isinstance(of, SampledLogits):
        return _different(rows["index"], rows["log_p"].to(dtype), terms.vocabulary.size, of.n)
    index = rows["index"].to(smallest(terms.vocabulary.size - 1))
    columns = {"index": index, "log_p": rows["log_p"].to(dtype)}
    if precision == "float16":
        columns["log_mass"] = rows["log_p"].float().logsumexp(-1)
    return columns


def unpack(columns: dict[str, Tensor], support: str) -> dict[str, Tensor]:
    """The evidence of the rows that these columns keep."""
    of = atoms_of(support)
    if support == "heads":
        return columns
    log_p = columns["log_p"].float()
    if support == "labels":
        return {"log_p": log_p}
    index = columns["index"].long()
    if isinstance(of, SampledLogits):
        count = columns["count"].long()
        index, log_p = (t.repeat_interleave(count).reshape(-1, of.n) for t in (index, log_p))
        return {"index": index, "log_p": log_p, "log_weight": -log_p - math.log(of.n)}
    if "log_mass" in columns:
        # Rounding moves the sum by up to 2^-11 of the entropy, which is more than many a tail: put it back.
        log_p = log_p + (columns["log_mass"] - log_p.logsumexp(-1)).unsqueeze(-1)
    k = of.k if isinstance(of, TopK) else log_p.shape[-1]
    return {"index": index[:, :k], "log_p": log_p[:, :k]}


def _different(index: Tensor, log_p: Tensor, size: int, n: int) -> dict[str, Tensor]:
    """The different atoms among draws [rows, n], all rows behind each other, and how often each was drawn."""
    index, order = index.sort(-1)
    first = torch.ones_like(index, dtype=torch.bool)
    first[:, 1:] = index[:, 1:] != index[:, :-1]
    count = first.flatten().cumsum(0).bincount()[1:]
    return {
        "index": index[first].to(smallest(size - 1)),
        "log_p": log_p.gather(-1, order)[first],
        "count": count.to(smallest(n)),
    }


def smallest(largest: int) -> torch.dtype:
    """The integer type for 0 to `largest`."""
    return torch.uint8 if largest < 1 << 8 else torch.uint16 if largest < 1 << 16 else torch.int32
