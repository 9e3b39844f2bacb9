"""What the policy could do at the start: answers to rehearse, and prompts that are left to explore."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiv.feeds._feed import READ_ROWS, READ_TOKENS, boxed, chunks, padded
from fdiv.feeds.memory import unique
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text
from fdiv.tasks.padding import rows_of

if TYPE_CHECKING:
    from fdiv.feeds.rollouts import Rollouts


class Rehearsed:
    """Kept in the run's memory: it is asked once, before the first step.

    `of`: the method's Rehearsal. A prompt whose share of right answers among `of.tries` reaches
    `of.threshold` is not explored; some of the right answers are stored with their log-probabilities instead.
    """

    def __init__(self, memory: dict[str, Tensor], of: Any):
        self.memory, self.of = memory, of

    def ask(self, feed: "Rollouts") -> None:
        if "explored" in self.memory:
            return
        prompts = unique(rows_of(feed.task.prompts(feed.spec.examples, feed.generator(-4))))
        answers, right = self._answers(feed, prompts)
        rate = right.float().mean(1)
        perfect = rate >= self.of.threshold
        if bool(perfect.all()):
            raise ValueError(
                f"the initial policy solves every prompt at least {self.of.threshold:.0%} of the time, none "
                f"is left to explore; raise the threshold of {self.of!r}, or take harder prompts"
            )
        self.memory["explored"] = prompts.ids[~perfect]
        solved = perfect.nonzero().flatten().tolist()
        stored = [answers[n].rows(right[n].nonzero().flatten()[: self.of.answers]) for n in solved]
        text = padded(stored) if stored else Text(prompts.ids[:0], prompts.mask[:0])
        self.memory |= {
            "stored_ids": text.ids,
            "stored_mask": text.mask,
            "stored_log_p": self._scored(feed, text),
        }

    def explored(self, count: int, generator: torch.Generator) -> Text:
        """`count` prompts of those that are not solved yet."""
        ids = self.memory["explored"]
        ids = ids[torch.randint(len(ids), (count,), generator=generator)]
        return Text(ids, torch.zeros_like(ids, dtype=torch.bool))

    def drawn(self, generator: torch.Generator, shared_by: int) -> tuple[Text, Tensor]:
        """(stored answers, the initial policy's log-probability of each token in its place).

        At most `of.batch`, and for processes to share evenly some of them again, with the mask all false.
        """
        ids, mask, log_p = (self.memory[f"stored_{name}"] for name in ("ids", "mask", "log_p"))
        index = torch.randperm(len(ids), generator=generator)[: self.of.batch]
        count, silent = len(index), -len(index) % shared_by
        index = torch.cat([index, index[:1].expand(silent)])
        told = torch.arange(len(index)) < count
        return Text(ids[index], mask[index] & told.unsqueeze(1)), log_p[index]

    def _answers(self, feed: "Rollouts", prompts: Text) -> tuple[list[Text], Tensor]:
        """(`tries` answers to each prompt, which of them are right [prompts, tries])."""
        draws = feed.draws(len(prompts.ids) * self.of.tries, feed.generator(-5)).unflatten(
            0, (-1, self.of.tries)
        )
        answers, right, done = [], [], 0
        for some in chunks(prompts, max(1, READ_ROWS // self.of.tries), READ_TOKENS // self.of.tries):
            rows = slice(done, done + len(some.ids))
            asked = Text(*(t.repeat_interleave(self.of.tries, 0) for t in some))
            text = feed.task.answer(feed.reference, asked, draws[rows].flatten(0, 1), Decoding())
            right.append(feed.task.verify(*text).reshape(-1, self.of.tries).bool().cpu())
            answers += [
                text.rows(slice(n, n + self.of.tries)) for n in range(0, len(text.ids), self.of.tries)
            ]
            done = rows.stop
            feed.progress(done, len(prompts.ids), None)
        return answers, torch.cat(right)

    @torch.no_grad()
    def _scored(self, feed: "Rollouts", text: Text) -> Tensor:
        if not len(text.ids):
            return torch.zeros(text.mask[:, 1:].shape)
        parts = []
        for some in chunks(text, READ_ROWS, READ_TOKENS):
            ids, mask = feed.on_device(some)
            with feed.precision():  # that of the policy, which is compared with it
                parts.append(boxed(feed.reference.token_log_probs(ids, mask), mask).cpu())
        return torch.cat(parts)
