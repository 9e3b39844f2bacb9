"""The law that a model is sampled from: its log-probabilities under a Decoding."""

import math

import torch
from torch import Tensor

from fdiv.sample._sampler import Decoding


def warped(log_probs: Tensor, decoding: Decoding) -> Tensor:
    """Log-probabilities [..., vocab] as they are sampled, in float64: temperature, then top-k, then top-p.

    Temperature 0 puts all mass on the likeliest token, the first of equals. top_k keeps what is as likely as
    the k-th, and top_p of that the likeliest whose mass, the last one included, first reaches it: as
    transformers does.
    """
    rows = log_probs.detach().double()
    if decoding.temperature == 0:
        best = rows.argmax(-1, keepdim=True)
        return torch.full_like(rows, -math.inf).scatter(-1, best, 0.0)
    rows = (rows / decoding.temperature).log_softmax(-1)
    if decoding.top_k is not None and decoding.top_k < rows.shape[-1]:
        least = rows.topk(decoding.top_k).values[..., -1:]
        rows = rows.masked_fill(rows < least, -math.inf).log_softmax(-1)
    if decoding.top_p == 1:
        return rows
    ordered, index = rows.sort(dim=-1, descending=True, stable=True)
    mass = ordered.exp()
    ordered = ordered.masked_fill(mass.cumsum(-1) - mass >= decoding.top_p, -math.inf)
    return torch.empty_like(rows).scatter(-1, index, ordered.log_softmax(-1))
