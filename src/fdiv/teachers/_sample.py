"""A sequence as a teacher sees it: its tokens up to the last one that is predicted."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.methods._method import check_mask


class Sample(NamedTuple):
    """One sequence with predicted tokens; on the CPU."""

    ids: Tensor  # [length], without whatever follows the last predicted token
    places: Tensor  # [tokens], where predicted tokens stand, ascending

    @property
    def tokens(self) -> int:
        return len(self.places)

    @property
    def key(self) -> bytes:
        """Of the content alone: context, predicted tokens, and which of them are predicted."""
        digest = hashlib.sha256(len(self.ids).to_bytes(8, "little"))
        for tensor in self:
            digest.update(tensor.numpy().tobytes())
        return digest.digest()

    def generator(self) -> torch.Generator:
        """Of the content alone, so that what is drawn for a sample is the same in every batch."""
        return torch.Generator().manual_seed(int.from_bytes(self.key[:8], "little") >> 1)


def samples(ids: Tensor, mask: Tensor) -> list[Sample]:
    """The sequences of ids [B, S] that have predicted tokens under mask [B, S], in their order."""
    ids, mask = predicted(ids, mask)
    found = []
    for row, chosen in zip(ids.cpu().long(), mask.cpu(), strict=True):
        places = chosen.nonzero().squeeze(-1)
        if len(places):
            found.append(Sample(row[: int(places[-1]) + 1].contiguous(), places))
    return found


def batch_of(some: list[Sample], device: torch.device) -> tuple[Tensor, Tensor]:
    """Samples as the right-padded ids and mask that a teacher is asked with."""
    width = max(len(sample.ids) for sample in some)
    ids = torch.zeros(len(some), width, dtype=torch.long)
    mask = torch.zeros(len(some), width, dtype=torch.bool)
    for row, sample in enumerate(some):
        ids[row, : len(sample.ids)] = sample.ids
        mask[row, sample.places] = True
    return ids.to(device), mask.to(device)


def predicted(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Without the columns behind the last predicted token; the first token is predicted by nothing."""
    if ids.ndim != 2:
        raise ValueError(f"ids are [sequences, tokens], got {tuple(ids.shape)}; write ids.unsqueeze(0)")
    check_mask(mask, ids.shape)
    mask = mask.clone()
    mask[:, :1] = False
    used = mask.any(0).nonzero()
    width = int(used[-1]) + 1 if len(used) else 1
    return ids[:, :width], mask[:, :width]
