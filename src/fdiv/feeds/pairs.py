"""Preferred and other responses, with what the reference says about each."""

from typing import Any

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import READ_ROWS, READ_TOKENS, Counts, Feed, Part, boxed, chunks, padded, sequence_of
from fdiv.methods._method import Out
from fdiv.tasks._task import Pairs, Text
from fdiv.tasks.padding import answered, prompts_of, rows_of, trimmed

SUMS = ("log_p_chosen", "log_p_rejected", "log_q_chosen", "log_q_rejected")


class PairsFeed(Feed):
    """A part holds the chosen responses as its text; `more` has the rejected, and the reference's numbers."""

    def prepare(self, generator: torch.Generator) -> None:
        self.require_local()
        self.reads = frozenset(getattr(self.method, "reads", SUMS))
        self._check()
        self.estimator: Any = getattr(self.method, "estimator", None)
        self.teacher = self.source.open(self.estimator, 1.0, self.reference) if self.estimator else None
        self.module: torch.nn.Module | None = None
        self.mismatched = torch.zeros(0)  # log-ratios of the global batch
        self.pairs = self._scored(self.task.pairs(self.reference, self.spec.examples, generator))
        self.retained = self._retained(generator) if "retain_sequence" in self.reads else None

    def _check(self) -> None:
        spec = self.spec
        if "log_ratio_mismatched" in self.reads and spec.batch_size < 2:
            raise ValueError(
                f"{self.method!r} puts each answer behind the prompt of another pair: batch_size is at least "
                f"2, got {spec.batch_size}"
            )
        if "retain_sequence" in self.reads and spec.validate_every:
            raise ValueError(f"{self.method!r} has no loss on other text; leave out validate_every")

    def attend(self, model: CausalLM) -> torch.nn.Module | None:
        super().attend(model)
        if "module" not in self.reads:
            return None
        config = self.reference.model.config
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module = self.method.module(config.hidden_size, config.num_hidden_layers)
        self.module = module.to(self.device)
        return self.module

    # -- batches ------------------------------------------------------------------------------------------

    def parts(self, model: CausalLM, step: int) -> list[Part]:
        generator = self.generator(step)
        part = _at(self.pairs, _some(self.pairs, self.spec.batch_size, generator))
        if self.retained is not None:
            kept = _at(self.retained, _some(self.retained, self.spec.batch_size, generator))
            part.more |= {"retain_ids": kept.text.ids, "retain_mask": kept.text.mask} | kept.more
        return self._mine(model, part)

    def validation(self, model: CausalLM) -> list[Part]:
        generator = self.generator(-2)
        held_out = getattr(self.task, "held_out_pairs", self.task.pairs)
        pairs = held_out(self.reference, self.spec.validate_on, generator)
        return self._mine(model, self._scored(Pairs(*map(self.shareable, pairs))))

    def _mine(self, model: CausalLM, part: Part) -> list[Part]:
        if "log_ratio_mismatched" in self.reads:
            self.mismatched = self._mismatch(model, part.text)
        return self.mine(part)

    def _mismatch(self, model: CausalLM, text: Text) -> Tensor:
        """log q - log p of each chosen response behind the prompt of the next pair; [pairs in the batch]."""
        prompts, marks = prompts_of(text), text.mask
        prompts = prompts.rows(torch.arange(len(text.ids)).roll(1))
        responses = [row[mark] for row, mark in zip(text.ids, marks, strict=True)]
        moved = answered(rows_of(prompts), responses, 0).rows(self.world.share(len(text.ids)))
        with torch.no_grad():
            ratio = torch.cat(
                [
                    self._boxed(model, some).sum(1) - self._boxed(self.reference, some).sum(1)
                    for some in chunks(moved, READ_ROWS, READ_TOKENS)
                ]
            )
        return torch.cat(self.world.gather(ratio.cpu())).to(self.device)

    def _scored(self, pairs: Pairs) -> Part:
        """With the reference's log-probability of each token of both, in their places."""
        log_p = [self._log_p(side) for side in pairs]
        more = {"ids": pairs.rejected.ids, "mask": pairs.rejected.mask}
        return Part(pairs.chosen, more | {"log_p_chosen": log_p[0], "log_p_rejected": log_p[1]})

    def _retained(self, generator: torch.Generator) -> Part:
        if not hasattr(self.task, "retained"):
            raise ValueError(f"{self.method!r} asks for text to be retained, which {self.task!r} has not")
        text = self.task.retained(self.reference, self.spec.examples, generator)
        return Part(text, {"log_p_retain": self._log_p(text)})

    @torch.no_grad()
    def _log_p(self, text: Text) -> Tensor:
        parts = [self._boxed(self.reference, some).cpu() for some in chunks(text, READ_ROWS, READ_TOKENS)]
        return torch.cat(parts)

    def _boxed(self, model: CausalLM, text: Text) -> Tensor:
        """In the precision of the loss, so that rounding cancels where policy and reference are alike."""
        ids, mask = self.on_device(text)
        with self.precision():
            return boxed(model.token_log_probs(ids, mask), mask)

    # -- what the method reads ----------------------------------------------------------------------------

    def share(self, part: Part, batch: Counts) -> float:
        """Metrics are means over pairs."""
        return part.counts.sequences / batch.sequences

    def loss(self, model: CausalLM, part: Part, batch: Counts) -> Out:
        pairs = len(part.text.ids)
        text = padded([part.text, Text(part.more["ids"], part.more["mask"])])
        ids, mask = self.on_device(trimmed(text) if text.mask.any() else text)
        evidence = self._evidence(model, ids, mask)
        log_q = model.scored(ids, mask, hidden=evidence.get("q_hidden")).log_prob
        log_p = torch.cat([_rows(part, "log_p_chosen", part.text.mask),
                           _rows(part, "log_p_rejected", part.more["mask"])]).to(log_q.device)  # fmt: skip
        menu = _sums(log_p, log_q, mask, pairs) | self._reference_states(ids, mask)
        menu |= {"log_p_label": log_p, "log_q_label": log_q, "sequence": sequence_of(mask)}
        menu |= {"pairs": pairs, "pairs_in_batch": batch.sequences, "module": self.module}
        menu |= {"log_ratio_mismatched": self.mismatched} | self._of_retained(model, part)
        if missing := self.reads - menu.keys():
            raise TypeError(f"{self.method!r} reads {sorted(missing)}, which pairs cannot tell")
        names = self.estimator.evidence if self.estimator else ()
        out = self.method(**{name: evidence[name] for name in names} | {n: menu[n] for n in self.reads})
        scale = 1.0 if "pairs_in_batch" in self.reads else pairs / batch.sequences
        return Out(out.loss * scale, out.metrics)

    def _evidence(self, model: CausalLM, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """That of the estimator at the tokens of both responses."""
        if self.teacher is None:
            return {}
        found: dict[str, Any] = dict(self.teacher(ids, mask).evidence)
        if self.estimator.sees == "heads":
            return found | {"q_hidden": model.hidden(ids, mask), "q_weight": model.head}
        if self.estimator.sees == "logits":
            return found | {"log_q": model.log_softmax(ids, mask)}
        return found | {"log_q": model.token_log_probs(ids, mask)}

    @torch.no_grad()
    def _reference_states(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        found = {}
        if "p_states" in self.reads:
            found["p_states"] = self.reference.states(ids, mask)
        if "p_activations" in self.reads:
            found["p_activations"] = self.reference.activations(ids, mask)
        return found

    def _of_retained(self, model: CausalLM, part: Part) -> dict[str, Tensor]:
        if self.retained is None:
            return {}
        ids, mask = self.on_device(Text(part.more["retain_ids"], part.more["retain_mask"]))
        log_q = model.token_log_probs(ids, mask)
        return {
            "log_q_retain_label": log_q,
            "log_p_retain_label": _rows(part, "log_p_retain", part.more["retain_mask"]).to(log_q.device),
            "retain_sequence": sequence_of(mask),
        }


def _at(part: Part, index: Tensor) -> Part:
    return Part(part.text.rows(index), {name: t[index] for name, t in part.more.items()})


def _some(part: Part, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(part.text.ids), (count,), generator=generator)


def _rows(part: Part, name: str, mask: Tensor) -> Tensor:
    """[R] of a column [pairs, S - 1]."""
    return part.more[name][mask[:, 1:]]


def _sums(log_p: Tensor, log_q: Tensor, mask: Tensor, pairs: int) -> dict[str, Tensor]:
    """Of whole responses, chosen and rejected, [pairs] each."""
    names = ("log_p", "log_q", "length")
    of_all = [boxed(t, mask).sum(1) for t in (log_p, log_q, torch.ones_like(log_p))]
    return {
        f"{name}_{side}": total[rows]
        for name, total in zip(names, of_all, strict=True)
        for side, rows in (("chosen", slice(0, pairs)), ("rejected", slice(pairs, None)))
    }
