"""Speculative decoding: a quick model drafts, a good one reads the draft at once and corrects it.

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192;
Chen, Borgeaud, Irving, Lespiau, Sifre and Jumper, "Accelerating Large Language Model Decoding with
Speculative Sampling", arXiv 2302.01318.

    x ~ q is kept with probability min(1, p(x)/q(x)), else replaced by a draw from max(p - q, 0), normalised
    acceptance = sum min(p, q) = 1 - TV(p, q);  tokens a call = (1 - a^(gamma+1)) / (1 - a) at a constant a

The papers' target is p, their approximation (draft) model q, gamma (K) `draft_tokens`. Other verdicts than
the lossless one are in verdict.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.methods.decode.draws import Draws
from fdiv.methods.decode.verdict import Lossless, Verdict
from fdiv.methods.decode.warp import warped
from fdiv.sample._sampler import Decoding

# reader(ids [S], last) -> [last, vocab]: the log-probabilities of what follows each of the `last` last tokens
# of the text, columns being ids. It may keep what it read of a text that begins alike.
Reader = Callable[[Tensor, int], Tensor]


class Decoded(NamedTuple):
    """The text with its prompt, and what it took.

    `judged` drafts were read until the first that was not kept, `kept` of them were; `chance` is the sum of
    their acceptances in closed form, the less noisy count.
    """

    ids: Tensor
    written: int
    calls: int
    judged: int
    kept: int
    chance: float

    @property
    def acceptance(self) -> float:
        """Kept drafts over judged ones; nan if none was."""
        return self.kept / self.judged if self.judged else float("nan")

    @property
    def tokens_per_call(self) -> float:
        """New tokens a call of the target."""
        return self.written / self.calls


class Block(NamedTuple):
    """What one call of the target gave."""

    tokens: list[int]
    judged: int
    kept: int
    chance: float


@dataclass(frozen=True)
class Speculative:
    """Text of `target`, written mostly by `draft`; under Lossless() its law is exactly the target's.

    draft_tokens: drafted before each call of the target.
    verdict: Lossless(), or at the price of another law Lenient(), Ensemble(), Typical().
    decoding: temperature and truncation, of both models; temperature 0 is the target's greedy text.

    >>> speculative = Speculative(draft_tokens=4)
    >>> round(speculative.tokens_per_call(0.8), 4)
    3.3616
    """

    draft_tokens: int = 4
    verdict: Verdict = field(default_factory=Lossless)
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self):
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens is a number of tokens >= 1, got {self.draft_tokens!r}")
        if not isinstance(self.verdict, Verdict):
            raise TypeError(
                f"verdict is Lossless(), Lenient(), Ensemble() or Typical(), got {self.verdict!r}"
            )

    @torch.no_grad()
    def __call__(
        self,
        target: Reader,
        draft: Reader,
        ids: Tensor,
        length: int,
        generator: torch.Generator,
        ends: tuple[int, ...] = (),
    ) -> Decoded:
        """`length` tokens after the prompt ids [S], or fewer where one of `ends` is written, as the last."""
        return self.write(target, draft, ids, length, Draws(generator), ends)

    def write(
        self,
        target: Reader,
        draft: Reader,
        ids: Tensor,
        length: int,
        draws: Draws,
        ends: tuple[int, ...] = (),
    ) -> Decoded:
        """The same by any source of decisions, which is how its law can be enumerated."""
        if length < 1 or not len(ids):
            raise ValueError(f"a prompt of at least one token and length >= 1, got {len(ids)} and {length!r}")
        start, blocks = len(ids), []
        while len(ids) - start < length and not (blocks and blocks[-1].tokens[-1] in ends):
            blocks.append(self.block(target, draft, ids, length - (len(ids) - start), draws, ends))
            ids = torch.cat([ids, ids.new_tensor(blocks[-1].tokens)])
        judged, kept, chance = (sum(part) for part in zip(*(b[1:] for b in blocks), strict=True))
        return Decoded(ids, len(ids) - start, len(blocks), int(judged), int(kept), chance)

    def block(
        self,
        target: Reader,
        draft: Reader,
        ids: Tensor,
        most: int,
        draws: Draws,
        ends: tuple[int, ...] = (),
    ) -> Block:
        """Between 1 and `most` tokens, by one call of the target."""
        text, q = self._drafted(draft, ids, min(self.draft_tokens, most - 1), draws, ends)
        drafted = text[len(ids) :].tolist()
        p = warped(target(text, len(q) + 1), self.decoding).exp()
        chance = 0.0
        for i, token in enumerate(drafted):
            _check(p[i], q[i])
            kept = self.verdict.kept(p[i], q[i])
            chance += kept.sum().item()
            if not draws.coin((kept[token] / q[i][token]).item()):
                other = draws.token(self._replacement(p[i], q[i]))
                return Block([*drafted[:i], other], i + 1, i, chance)
        if not (drafted and drafted[-1] in ends):
            bonus = self.verdict.bonus(p[-1], lambda: self._law(draft, text))
            drafted.append(draws.token(bonus))
        return Block(drafted, len(q), len(q), chance)

    def _drafted(self, draft: Reader, ids: Tensor, count: int, draws: Draws, ends: tuple[int, ...]):
        """(the text with its draft, the laws that each token of it was drawn from)."""
        laws = []
        while len(laws) < count and not (laws and int(ids[-1]) in ends):
            laws.append(self._law(draft, ids))
            ids = torch.cat([ids, ids.new_tensor([draws.token(laws[-1])])])
        return ids, laws

    def _law(self, reader: Reader, ids: Tensor) -> Tensor:
        return warped(reader(ids, 1), self.decoding)[-1].exp()

    def _replacement(self, p: Tensor, q: Tensor) -> Tensor:
        residual = self.verdict.residual(p, q)
        # Where p = q nothing is left over and nothing is rejected but by rounding.
        return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)

    # -- in closed form ------------------------------------------------------------------------------------

    def acceptance(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The probability that a drafted token is kept, [rows]: 1 - TV(p, q) under Lossless()."""
        p, q = (warped(t, self.decoding).exp() for t in (log_p, log_q))
        return self.verdict.kept(p, q).sum(-1)

    def law(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The probabilities of what is written where a draft is judged, [rows, vocab]."""
        p, q = (warped(t, self.decoding).exp() for t in (log_p, log_q))
        kept, other = self.verdict.kept(p, q), self._replacement(p, q)
        return kept + (1 - kept.sum(-1, keepdim=True)) * other / other.sum(-1, keepdim=True)

    def tokens_per_call(self, acceptance: float) -> float:
        """Expected tokens a call of the target where each draft is kept with this probability.

        The papers' "block efficiency"; acceptances that vary from place to place give another number.
        """
        return sum(acceptance**kept for kept in range(self.draft_tokens + 1))

    def speedup(self, acceptance: float, cost: float) -> float:
        """Of the wall time over the target alone, where a call of the draft costs `cost` of the target's."""
        return self.tokens_per_call(acceptance) / (self.draft_tokens * cost + 1)


def _check(p: Tensor, q: Tensor) -> None:
    if p.shape != q.shape:
        raise ValueError(
            f"target and draft have {len(p)} and {len(q)} tokens; they share a vocabulary, or slice padded "
            "heads to the tokenizer's size"
        )
