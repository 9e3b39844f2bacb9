"""The groups of a step, written as trees: see fdiv.sample.branching.

An answer is made of its own row of draws, token t of number t whoever wrote the tokens before it: the answers
do not depend on how many processes write them, and with epsilon=1 they are those of independent rollouts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import READ_ROWS, READ_TOKENS, chunks, padded
from fdiv.feeds.continuing import Continuing
from fdiv.sample._sampler import Decoding
from fdiv.sample.branching import SemanticEntropy, Written, token_entropy
from fdiv.tasks._task import Text
from fdiv.tasks.prompting import uniform

ROWS = 256  # distributions, with the embeddings of their likeliest tokens, at once


def branched(
    feed: Any, writer: CausalLM, prompts: Text, generator: torch.Generator
) -> tuple[Text, dict[str, Tensor]]:
    """(this process's answers to the global batch's prompts [groups], group by group; the trees they make).

    "parent" [N]: the number within its group of the answer that one branches off, -1 at the root. "branch"
    [N]: the tokens of it that it keeps.
    """
    plan, size, groups = feed.method.branching, feed.spec.group_size, len(prompts.ids)
    plan.check(size)
    # All is drawn for the global batch: what a process writes is not to depend on how many there are.
    draws = feed.draws(groups * size, generator).unflatten(0, (groups, size))
    coins = torch.rand(groups, size, generator=generator, dtype=torch.float64)
    seeds = torch.randint(2**62, (groups, size), generator=generator)
    share = feed.world.share(groups)
    with feed.whole():
        trees = Trees(feed, writer, prompts.rows(share), draws[share], coins[share], seeds[share])
        trees.grow(0, plan.first)
        for answer in range(plan.first, size):
            trees.grow(answer, answer + 1)
    return trees.told()


class Trees:
    """The groups of a few prompts while they are written, turn by turn.

    draws [groups, size, tokens]; coins [groups, size] decide on epsilon; seeds [groups, size] of what is
    written only to see where it leads.
    """

    def __init__(
        self, feed: Any, writer: CausalLM, prompts: Text, draws: Tensor, coins: Tensor, seeds: Tensor
    ):
        self.plan, self.task, self.device = feed.method.branching, feed.task, feed.device
        self.writer, self.hand = writer, feed.hand.of(writer)
        self.prompts, self.draws, self.coins, self.seeds = prompts, draws, coins, seeds
        self.groups, self.size = draws.shape[:2]
        self.texts: list[Text] = []
        self.rows: list[tuple[int, int]] = []  # (group, answer) of all rows of the texts
        self.answers: list[list[Tensor]] = [[] for _ in range(self.groups)]
        self.scores: list[list[Tensor]] = [[] for _ in range(self.groups)]
        self.places: list[list[tuple[int, int]]] = [[] for _ in range(self.groups)]

    def grow(self, start: int, stop: int) -> None:
        """Write the answers of these numbers to every prompt, none of which branches off another of them."""
        rows = [(group, answer) for group in range(self.groups) for answer in range(start, stop)]
        places = [self._place(*row) for row in rows]
        kept = [self._kept(group, *place) for (group, _), place in zip(rows, places, strict=True)]
        draws = self.draws[:, start:stop].flatten(0, 1)
        text = self._written([group for group, _ in rows], kept, draws)
        self.texts.append(text)
        self.rows += rows
        for (group, _), place, ids, mask in zip(rows, places, *text, strict=True):
            self.places[group].append(place)
            self.answers[group].append(ids[mask])
        if stop < self.size and self.plan.epsilon < 1:
            begin = torch.tensor([n for _, n in places])
            for (group, _), scores in zip(rows, self._scores(rows, text, begin), strict=True):
                self.scores[group].append(scores)

    def told(self) -> tuple[Text, dict[str, Tensor]]:
        """All answers, group by group, and the places where they branch off."""
        order = sorted(range(len(self.rows)), key=lambda n: self.rows[n])
        places = torch.tensor(self.places).reshape(-1, 2)
        return padded(self.texts).rows(torch.tensor(order)), {"parent": places[:, 0], "branch": places[:, 1]}

    def _place(self, group: int, answer: int) -> tuple[int, int]:
        if answer < self.plan.first:
            return -1, 0
        return self.plan.place(self.scores[group], float(self.coins[group, answer]))

    def _kept(self, group: int, parent: int, tokens: int) -> Tensor:
        return self.answers[group][parent][:tokens] if parent >= 0 else torch.empty(0, dtype=torch.long)

    def _written(self, groups: list[int], kept: list[Tensor], draws: Tensor) -> Text:
        writer = Continuing(self.hand, kept, self.writer)
        return self.task.answer(writer, self.prompts.rows(torch.tensor(groups)), draws, Decoding())

    # -- how open each place is -----------------------------------------------------------------------------

    @torch.no_grad()
    def _scores(self, rows: list[tuple[int, int]], text: Text, begin: Tensor) -> list[Tensor]:
        """Of each answer's tokens; -inf of the first `begin`, whose places are another answer's."""
        lengths = text.mask.sum(1).tolist()
        own = Text(text.ids, text.mask & (text.mask.cumsum(1) > begin.unsqueeze(1)))
        measure = self.plan.measure
        if isinstance(measure, SemanticEntropy):
            entropies = self._of_tokens(own, lambda log_probs, _: token_entropy(log_probs))
            return self._of_meanings(measure, rows, entropies, begin)
        found = self._of_tokens(own, measure)
        return [pad(row, (length - len(row), 0), value=-torch.inf)
                for row, length in zip(found, lengths, strict=True)]  # fmt: skip

    def _of_tokens(self, text: Text, measure: Any) -> list[Tensor]:
        """What the measure says of each masked token's distribution, sequence by sequence."""
        model, found = self.writer, []
        embeddings: Any = model.model.get_input_embeddings().weight
        if model.vocabulary is not None:
            embeddings = embeddings[model.vocabulary.to(embeddings.device)]
        for some in chunks(text, READ_ROWS, READ_TOKENS):
            for rows in _distributions(model, some.ids.to(self.device), some.mask.to(self.device)):
                found.append(measure(rows, embeddings.to(rows.device)).cpu())
        return list(torch.cat(found).split(text.mask.sum(1).tolist()))

    def _of_meanings(
        self, measure: SemanticEntropy, rows: list[tuple[int, int]], entropies: list[Tensor], begin: Tensor
    ) -> list[Tensor]:
        tries, scores, asked = measure.candidates * measure.continuations, [], []
        for (group, answer), entropy, start in zip(rows, entropies, begin.tolist(), strict=True):
            scores.append(torch.full((start + len(entropy),), -torch.inf, dtype=torch.float64))
            likely = (entropy.double() * 1e6).round().argsort(descending=True, stable=True) + start
            likely = likely[likely > 0]  # the most is open at the root, to which epsilon leads
            generator = torch.Generator().manual_seed(int(self.seeds[group, answer]))
            draws = uniform(tries, self.draws.shape[-1], generator).split(measure.continuations)
            for place, some in zip(likely[: measure.candidates].tolist(), draws, strict=False):
                asked.append((scores[-1], place, group, self.answers[group][answer][:place], some))
        batch = max(1, READ_ROWS // measure.continuations)
        for first in range(0, len(asked), batch):
            at, places, *what = zip(*asked[first : first + batch], strict=True)
            for row, place, answers in zip(at, places, self._continued(*what), strict=True):
                row[place] = measure(answers)
        return scores

    def _continued(
        self, groups: tuple[int], kept: tuple[Tensor], draws: tuple[Tensor]
    ) -> list[list[Written]]:
        """What may follow each of these beginnings of answers, as often as there are rows of draws."""
        times = len(draws[0])
        begun = [tokens for tokens in kept for _ in range(times)]
        text = self._written([g for g in groups for _ in range(times)], begun, torch.cat(draws))
        new = [ids[mask][len(k) :].tolist() for ids, mask, k in zip(*text, begun, strict=True)]
        tokenizer = self.writer.tokenizer
        words = [tokenizer and tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
        told = [Written(tuple(ids), text) for ids, text in zip(new, words, strict=True)]
        return [told[n : n + times] for n in range(0, len(told), times)]


def _distributions(model: CausalLM, ids: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """Log-probabilities [some, vocab] of the next token at all masked tokens."""
    if not model.has_plain_head:
        yield from model.log_softmax(ids, mask).split(ROWS)
        return
    for hidden in model.hidden(ids, mask).split(ROWS):
        yield model.rows_of_hidden(hidden)
