"""Weights of tokens from what the reference model sees there: learned, and without parameters."""

import torch
from torch import Tensor, nn

from fdiv._math import in_working_precision


class TokenMask(nn.Module):
    """One weight >= 0 a token from the hidden states of all layers, [R, layers, width] -> [R].

    Each layer's state, normalised, goes through its own linear map to one number and a ReLU; a second ReLU
    is on their mixture.
    """

    def __init__(self, width: int, layers: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(layers))
        self.mixer = nn.Linear(layers, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        # Random mixers are all negative once in 2^layers times; such a mask is 0 and gets no gradient.
        nn.init.constant_(self.mixer.weight, 1 / layers)

    def forward(self, states: Tensor) -> Tensor:
        states = self.norm(states.to(self.mixer.weight.dtype))
        each = torch.cat([head(states[:, layer]) for layer, head in enumerate(self.heads)], dim=-1)
        return self.dropout(self.mixer(self.dropout(each.relu())).relu()).squeeze(-1)


class SparseMask(nn.Module):
    """The masks of log-ratios and of divergences, [R] each: one and the same where they are `common`."""

    def __init__(self, width: int, layers: int, common: bool = True, dropout: float = 0.01):
        super().__init__()
        self.ratios = TokenMask(width, layers, dropout)
        self.divergences = None if common else TokenMask(width, layers, dropout)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        of_ratios = self.ratios(states)
        return of_ratios, of_ratios if self.divergences is None else self.divergences(states)


@torch.no_grad()
def activation_mask(activations: Tensor, sequence: Tensor, responses: int) -> Tensor:
    """The mean over hooks of each one's place between its smallest and largest value in the response, [R].

    activations [R, hooks]. A hook that is the same at all tokens of a response, a single one for example,
    cannot tell them apart and gives them the weight 1.
    """
    if activations.ndim != 2 or not activations.shape[1]:
        raise ValueError(f"activations are [R, hooks >= 1], got {tuple(activations.shape)}")
    (rows,) = in_working_precision(activations)
    if not bool(rows.isfinite().all()):
        raise ValueError(
            "an activation of the reference is not finite; run the reference in bfloat16 or float32"
        )
    index = sequence.unsqueeze(-1).expand_as(rows)
    empty = rows.new_zeros(responses, rows.shape[1])
    low, high = (empty.scatter_reduce(0, index, rows, end, include_self=False) for end in ("amin", "amax"))
    varies = (high > low)[sequence]
    width = torch.where(varies, (high - low)[sequence], 1.0)
    return torch.where(varies, (rows - low[sequence]) / width, 1.0).mean(-1)
