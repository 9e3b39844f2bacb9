"""The running estimate of a target's sum: log Z(c) = log of the mean of P(y|c) / behaviour(y|c) so far.

Every answer to the prompt c counts alike, whoever wrote it: each term's expectation is Z(c) as long as its
writer can write whatever P gives mass to, so that the mean is unbiased while the writer changes.
"""

import hashlib
import math

import torch
from torch import Tensor

NAMES = ("partition_key", "partition_log_sum", "partition_count")
PADDING = -1  # behind the tokens of a prompt


class Partition:
    """Keeps `partition_key`, `partition_log_sum` and `partition_count`, [prompts] each, in `memory`.

    They are replaced, never written to, and are not there before the first update: a checkpoint saves what it
    finds. Everything is float64 on the CPU and in logs.
    """

    def __init__(self, memory: dict[str, Tensor]):
        self.memory = memory

    def update(self, keys: Tensor, log_target: Tensor, log_behaviour: Tensor) -> Tensor:
        """Take in some answers, once each, and return log Z of their prompts, these answers included.

        keys: integers [B] that tell prompts apart, as of `prompt_keys`; log_target [B] the log of P, -inf
        where it has no mass; log_behaviour [B] the log-probability with which each answer was drawn.
        """
        keys, log_target, log_behaviour = keys.cpu(), log_target.detach(), log_behaviour.detach()
        if not keys.shape == log_target.shape == log_behaviour.shape == (len(keys),):
            raise ValueError(
                "keys, log_target and log_behaviour are [B] each, got "
                f"{tuple(keys.shape)}, {tuple(log_target.shape)} and {tuple(log_behaviour.shape)}"
            )
        weights = log_target.cpu().double() - log_behaviour.cpu().double()
        if bool((weights.isnan() | (weights == math.inf)).any()):
            raise ValueError("P / behaviour is infinite or nan: what was drawn had a probability > 0")
        known, log_sums, counts = self._kept()
        everything, place = torch.cat([known, keys]).unique(return_inverse=True)
        log_sum = _log_sums(torch.cat([log_sums, weights]), place, len(everything))
        count = torch.zeros(len(everything), dtype=torch.float64)
        count = count.index_add(0, place, torch.cat([counts, torch.ones(len(keys), dtype=torch.float64)]))
        self.memory |= dict(zip(NAMES, (everything, log_sum, count), strict=True))
        return (log_sum - count.log())[place[len(known) :]]

    def of(self, keys: Tensor) -> Tensor:
        """log Z of these prompts as it stands, [B]; nan of one that was never seen."""
        known, log_sum, count = self._kept()
        found = torch.full(keys.shape, math.nan, dtype=torch.float64)
        if len(known):
            place = torch.searchsorted(known, keys.cpu()).clamp(max=len(known) - 1)
            found = torch.where(known[place] == keys.cpu(), (log_sum - count.log())[place], found)
        return found

    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        if NAMES[0] not in self.memory:
            none = torch.zeros(0, dtype=torch.float64)
            return none.long(), none, none
        key, log_sum, count = (self.memory[name] for name in NAMES)
        return key, log_sum, count


def prompt_keys(prompts: Tensor) -> Tensor:
    """An integer [N] for each prompt of ids [N, S] padded on the right with -1: 64 bits of its digest."""
    rows = [row[row != PADDING].contiguous().numpy() for row in prompts.cpu().long()]
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.long)


def _log_sums(values: Tensor, place: Tensor, count: int) -> Tensor:
    """log of the sum of e^values within each place, [count]; -inf where there is nothing but -inf."""
    top = values.new_full((count,), -math.inf).scatter_reduce(0, place, values, "amax")
    top = torch.where(top == -math.inf, 0.0, top)
    total = values.new_zeros(count).index_add(0, place, (values - top[place]).exp())
    return total.log() + top
