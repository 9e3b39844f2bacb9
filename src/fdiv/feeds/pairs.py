"""Preferred and other responses, with the reference's log-probability of each."""

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import READ_ROWS, READ_TOKENS, Counts, Feed, Part, boxed, chunks
from fdiv.methods._method import Out
from fdiv.tasks._task import Pairs, Text


class PairsFeed(Feed):
    """A part holds the chosen responses as its text; `more` has the rejected and both log-probabilities."""

    def prepare(self, generator: torch.Generator) -> None:
        self.require_local()
        self.pairs = self._scored(self.task.pairs(self.reference, self.spec.examples, generator))

    def parts(self, model: CausalLM, step: int) -> list[Part]:
        among = len(self.pairs.text.ids)
        index = torch.randint(among, (self.spec.batch_size,), generator=self.generator(step))
        return self.mine(Part(self.pairs.text.rows(index), {k: t[index] for k, t in self.pairs.more.items()}))

    def validation(self, model: CausalLM) -> list[Part]:
        pairs = self.task.pairs(self.reference, self.spec.validate_on, self.generator(-2))
        return self.mine(self._scored(pairs))

    def share(self, part: Part, batch: Counts) -> float:
        """Metrics are means over pairs."""
        return part.counts.sequences / batch.sequences

    def loss(self, model: CausalLM, part: Part, batch: Counts) -> Out:
        rejected = Text(part.more["ids"], part.more["mask"])
        both = [torch.cat(two) for two in zip(part.text, rejected, strict=True)]
        log_q = self._summed(model, Text(*both))
        chosen, other = log_q.unflatten(0, (2, -1))
        out = self.method(
            log_p_chosen=part.more["log_p_chosen"].to(self.device),
            log_p_rejected=part.more["log_p_rejected"].to(self.device),
            log_q_chosen=chosen,
            log_q_rejected=other,
        )
        return Out(out.loss * (len(chosen) / batch.sequences), out.metrics)  # a mean over pairs

    def _scored(self, pairs: Pairs) -> Part:
        with torch.no_grad():
            log_p = [
                torch.cat([self._summed(self.reference, t) for t in chunks(side, READ_ROWS, READ_TOKENS)])
                for side in pairs
            ]
        more = {"ids": pairs.rejected.ids, "mask": pairs.rejected.mask}
        return Part(pairs.chosen, more | {"log_p_chosen": log_p[0], "log_p_rejected": log_p[1]})

    def _summed(self, model: CausalLM, text: Text) -> Tensor:
        ids, mask = self.on_device(text)
        return boxed(model.token_log_probs(ids, mask), mask).sum(1)
