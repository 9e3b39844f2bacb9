"""Speculative decoding of transformers' causal language models, each with its key-value cache."""

import torch
from torch import Tensor

from fdiv.adapters.reading import plainly
from fdiv.adapters.transformers import CausalLM
from fdiv.methods.decode.speculative import Decoded, Speculative

try:
    from transformers import DynamicCache
except ImportError as error:
    raise ImportError('this needs transformers: pip install "fdiv[train]"') from error


def speculate(
    target: CausalLM,
    draft: CausalLM,
    prompt: Tensor,
    length: int,
    generator: torch.Generator,
    method: Speculative | None = None,
    ends: tuple[int, ...] | None = None,
) -> Decoded:
    """`length` tokens of the target after one prompt [S] of ids, or fewer if one of `ends` is written.

    Ends are the target's own by default. Both models read each token once and take back what was rejected.
    They share a vocabulary; where it is a restricted one, so must the prompt be.
    """
    vocabulary = _shared_vocabulary(target, draft)
    for model in (target, draft):
        model.check_length(len(prompt) + length)
    columns = _columns(prompt.cpu(), vocabulary)
    last = torch.tensor(target.ends if ends is None else ends, dtype=torch.long)
    if vocabulary is not None:
        last = _columns(last[torch.isin(last, vocabulary)], vocabulary)
    method = method or Speculative()
    with plainly(target, draft):
        readers = Cached(target), Cached(draft)
        out = method(*readers, columns, length, generator, tuple(last.tolist()))
    return out._replace(ids=target.tokens(out.ids))


class Cached:
    """A model that is read as a text grows or is taken back: a Reader of `Speculative`, for one text."""

    def __init__(self, model: CausalLM):
        self.model = model
        self.network = model.model.base_model if model.has_plain_head else model.model
        self._begin()

    def _begin(self) -> None:
        self.read = torch.zeros(0, dtype=torch.long)
        self.cut = 0  # layers that attend to a window have forgotten what it takes to go back further
        self.cache = DynamicCache(config=self.model.model.config)
        getattr(self.cache, "activate_past_recording", lambda: None)()  # else they could not go back at all

    @torch.no_grad()
    def __call__(self, ids: Tensor, last: int) -> Tensor:
        """What follows each of the `last` last tokens of ids [S], columns of the head: [last, vocab]."""
        kept = min(_alike(self.read, ids), len(ids) - last)
        if kept < self.cut:
            self._begin()
            kept = 0
        if kept < len(self.read):
            self.cache.crop(kept - len(self.read))
            self.cut = kept
        self.read = ids
        fresh = self.model.tokens(ids[kept:]).unsqueeze(0).to(self.model.model.device)
        out = self.network(input_ids=fresh, past_key_values=self.cache, use_cache=True)
        if self.model.has_plain_head:
            return self.model.rows_of_hidden(out.last_hidden_state[0, -last:]).cpu()
        return self.model.restricted(out.logits[0, -last:]).cpu().float().log_softmax(-1)


def _alike(first: Tensor, second: Tensor) -> int:
    """How many tokens two texts begin with alike."""
    shorter = min(len(first), len(second))
    return int((first[:shorter] == second[:shorter]).long().cumprod(0).sum())


def _shared_vocabulary(target: CausalLM, draft: CausalLM) -> Tensor | None:
    one, other = (None if m.vocabulary is None else m.vocabulary.tolist() for m in (target, draft))
    if one != other or target.size != draft.size:
        raise ValueError(
            f"target and draft have {target.size} and {draft.size} tokens, or different ones; a draft of "
            "another vocabulary cannot be judged"
        )
    return None if target.vocabulary is None else target.vocabulary.cpu()


def _columns(ids: Tensor, vocabulary: Tensor | None) -> Tensor:
    """Ids as indices into the vocabulary (ascending)."""
    if vocabulary is None:
        return ids
    if outside := ids[~torch.isin(ids, vocabulary)].tolist():
        raise ValueError(f"ids {outside} are outside the vocabulary that the models are restricted to")
    return torch.searchsorted(vocabulary, ids)
