"""Instruction data: prompts and responses of different lengths, from tables, conversations and the hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.transformers import CausalLM
from fdiv.sample._sampler import Decoding
from fdiv.tasks import opening, preferences
from fdiv.tasks._task import Pairs, Text
from fdiv.tasks.conversations import richer
from fdiv.tasks.measurement import error, measured, responses, spread
from fdiv.tasks.opening import tokenizer_of
from fdiv.tasks.padding import answered, rows_of, unanswered
from fdiv.tasks.prompting import rollouts
from fdiv.tasks.rewards import rewarded
from fdiv.tasks.samples import Sample, check_ended, fill, found, ids_of, known, prefix, split, until
from fdiv.tasks.verdict import agrees

HINT = "{prompt}\n\nThis is a good answer:\n\n{response}\n\nNow give an answer of your own."


@dataclass(frozen=True)
class Instructions:
    """Records with a prompt and a response; the response, its end of text included, is what is predicted.

    source: a .jsonl, .parquet or .csv file, a folder, or a data set of the hub, see fdiv.tasks.sources.
    prompt, response: the fields that hold them, as text or as lists of turns. Or messages: the field with a
        whole conversation, whose last turn is the response.
    system: the system message of conversations that have none.
    template: "chat" is that of the tokenizer; "plain" is the prompt as it is; or a text with fields of the
        record in braces, such as "Question: {prompt}\\nAnswer: ".
    max_prompt, max_response: tokens. A sample with a longer prompt is dropped, a longer response is cut;
        either is counted and warned of. An answer has at most max_response tokens.
    held_out: the fraction of the data, by text, that is kept for evaluation, or another source to evaluate
        on. No prompt is on both sides; the choice is by a hash of the prompt.
    rejected: of preference data, the field with the response that is worse than `response` (or, beside
        `messages`, with the whole other conversation), see fdiv.tasks.preferences.
    solution: the field that answers are compared with, see fdiv.tasks.verdict.
    rewards: functions that judge answers, as "module:function" or several, see fdiv.tasks.rewards; their sum
        is the reward. Without one it is whether the answer agrees with the solution.
    hint: the prompt of a teacher that is shown more, with fields of the record in braces; {prompt} is the
        last user turn, {response} the record's own response. One of more than max_hint tokens is not shown.
    tokenizer: where it comes from; None is that of the model that was opened last.
    vocabulary: "full", or "corpus", which restricts all distributions to the ids that occur, as Corpus does.
    continuations: held-out prompts that each model answers, for the numbers on samples.
    documents: records that are read of a source, at most.
    """

    source: str
    prompt: str = "prompt"
    response: str = "response"
    messages: str | None = None
    system: str | None = None
    template: str = "chat"
    max_prompt: int = 512
    max_response: int = 512
    held_out: float | str = 0.1
    rejected: str | None = None
    solution: str | None = None
    rewards: str | tuple[str, ...] = ()
    hint: str = HINT
    max_hint: int = 2048
    tokenizer: str | None = None
    vocabulary: str = "full"
    continuations: int = 32
    documents: int | None = None

    def __post_init__(self):
        if self.template not in ("chat", "plain") and "{" not in self.template:
            raise ValueError(
                f"template is 'chat', 'plain' or a text with {{prompt}} in it, got {self.template!r}"
            )
        if self.template != "chat" and (self.system or self.messages):
            raise ValueError("system and messages need template='chat'; write the rest into the template")
        if self.messages and (self.prompt, self.response) != ("prompt", "response"):
            raise ValueError("give messages, or prompt and response, not both: a conversation holds both")
        if not isinstance(self.held_out, str) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a fraction between 0 and 1, or a source, got {self.held_out!r}")
        if self.vocabulary not in ("corpus", "full"):
            raise ValueError(f"vocabulary is 'corpus' or 'full', got {self.vocabulary!r}")
        if self.rejected and self.vocabulary == "corpus":
            raise ValueError(
                "a vocabulary of prompts and better responses lacks the worse; vocabulary='full'"
            )
        if "{" not in self.hint:
            raise ValueError(f"hint is a text with {{prompt}} and other fields in it, got {self.hint!r}")
        if min(self.max_prompt, self.max_response, self.max_hint, self.continuations) < 1:
            raise ValueError("max_prompt, max_response, max_hint and continuations are at least 1")

    # -- models -------------------------------------------------------------------------------------------

    def load(self, spec, seed: int, reference: Path | None = None) -> CausalLM:
        """The model of `spec`, with tokenizer and vocabulary; `reference` is the saved teacher."""
        return opening.load(self, spec, seed, reference)

    def reopen(self, path: str | Path, spec, seed: int) -> CausalLM:
        """A model at a hub id, in a package, or saved."""
        return opening.reopen(self, path, spec)

    def restriction(self, tokenizer) -> Tensor | None:
        return split(self, tokenizer).vocabulary if self.vocabulary == "corpus" else None

    @property
    def positions(self) -> int:
        return max(self.max_prompt, self.max_hint) + self.max_response

    # -- data ---------------------------------------------------------------------------------------------

    def data(self, kind: str, count: int, generator: torch.Generator) -> Text:
        """At most `count` training samples, in random order."""
        if kind != "train":
            raise ValueError(f"Instructions has data 'train', got {kind!r}")
        return self._some(tokenizer_of(self), count, generator)

    def responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        """At most `count` training samples: their own responses stand for the teacher's."""
        return self._some(teacher.tokenizer, count, generator)

    def held_out_responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        """At most `count` samples that are not trained on."""
        return self._some(teacher.tokenizer, count, generator, held_out=True)

    def _some(self, tokenizer, count: int, generator: torch.Generator, held_out: bool = False) -> Text:
        found = split(self, tokenizer)
        samples = found.held_out if held_out else found.train
        chosen = torch.randperm(len(samples), generator=generator)[:count].tolist()
        return _text([samples[n] for n in chosen], tokenizer)

    def pairs(self, reference: CausalLM, count: int, generator: torch.Generator) -> Pairs:
        """At most `count` training samples with both of their responses."""
        return preferences.some(self, reference.tokenizer, count, generator, held_out=False)

    def held_out_pairs(self, reference: CausalLM, count: int, generator: torch.Generator) -> Pairs:
        """At most `count` that are not trained on."""
        return preferences.some(self, reference.tokenizer, count, generator, held_out=True)

    # -- answers ------------------------------------------------------------------------------------------

    @property
    def answer_length(self) -> int:
        return self.max_response

    def prompts(self, count: int, generator: torch.Generator) -> Text:
        """Those of `count` training samples."""
        samples = split(self, tokenizer_of(self)).train
        chosen = torch.randint(len(samples), (count,), generator=generator).tolist()
        return unanswered([samples[n].prompt for n in chosen])

    def answer(self, model, prompts: Text, draws: Tensor, decoding: Decoding) -> Text:
        """Up to the end of text, of the model or of the data, or max_response tokens."""
        opening.check_writer(self, model)
        check_ended(self, model.tokenizer, rows_of(prompts))
        ends = {*model.ends, *split(self, model.tokenizer).ends}
        return model.generate(prompts, draws, decoding, ends=tuple(sorted(ends)))

    def rollouts(self, policy: CausalLM, groups: int, size: int, generator: torch.Generator) -> Text:
        """`size` answers to each of `groups` prompts of training."""
        return rollouts(self, policy, groups, size, generator)

    def verify(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Whether each answer [N, S] agrees with a solution of its prompt, as float [N].

        Without a mask the answer is what follows a prompt of the data, up to the end of text.
        """
        if self.solution is None:
            raise ValueError(
                "no answer can be verified; write Instructions(solution=...) with the field of it"
            )
        told = [self._agrees(row, None if mask is None else mask[n]) for n, row in enumerate(ids)]
        return torch.tensor(told).float()

    def reward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the reward functions say of each answer [N, S], as float [N]; the verdict without any."""
        if not self.rewards:
            return self.verify(ids, mask)
        names = (self.rewards,) if isinstance(self.rewards, str) else self.rewards
        told = [self._told(row, None if mask is None else mask[n]) for n, row in enumerate(ids)]
        prompts, texts, records = map(list, zip(*told, strict=True))
        return rewarded(names, prompts, texts, records)

    def _told(self, ids: Tensor, mask: Tensor | None) -> tuple[str, str, dict[str, Any]]:
        """(prompt, answer, record) of a sequence."""
        tokenizer = tokenizer_of(self)
        begin = None if mask is None else int(mask.int().argmax())
        samples, begin = found(self, tokenizer, ids.tolist(), begin)
        response = (ids[begin:] if mask is None else ids[mask]).tolist()
        response = until(response, split(self, tokenizer).ends)
        prompt, text = (
            tokenizer.decode(t, skip_special_tokens=True) for t in (ids[:begin].tolist(), response)
        )
        return prompt, text, samples[0].record

    def _agrees(self, ids: Tensor, mask: Tensor | None) -> bool:
        tokenizer = tokenizer_of(self)
        samples, begin = found(
            self, tokenizer, ids.tolist(), None if mask is None else int(mask.int().argmax())
        )
        response = (ids[begin:] if mask is None else ids[mask]).tolist()
        text = tokenizer.decode(until(response, split(self, tokenizer).ends), skip_special_tokens=True)
        return any(agrees(text, str(sample.record[self.solution or ""])) for sample in samples)

    def privileged(self, text: Text) -> tuple[Text, Tensor]:
        """Each response behind the prompt that `hint` makes of its record, or its own where there is none."""
        tokenizer = tokenizer_of(self)
        ids, mask = (t.cpu() for t in text)
        prompts, shown = [], []
        for row, mark in zip(ids, mask, strict=True):
            begin = int(mark.int().argmax())
            samples = known(self, tokenizer).get(tuple(row[:begin].tolist()))
            hint = self._hint(tokenizer, samples[0]) if samples else None
            shown.append(hint is not None)
            prompts.append(row[:begin] if hint is None else hint)
        answers = [row[mark] for row, mark in zip(ids, mask, strict=True)]
        return answered(prompts, answers, fill(tokenizer)), torch.tensor(shown)

    def _hint(self, tokenizer, sample: Sample) -> Tensor | None:
        told = richer(self, tokenizer, sample.record)
        if told is None:
            return None
        ids = [*prefix(self, tokenizer), *ids_of(tokenizer, [told])[0]]
        return torch.tensor(ids) if len(ids) <= self.max_hint else None

    # -- measurement --------------------------------------------------------------------------------------

    def evaluate(
        self, model: CausalLM, reference: CausalLM, measures: dict[str, Divergence], seed: int
    ) -> dict:
        """Next-token numbers on held-out responses, and how the model answers held-out prompts."""
        shared = opening.comparable(model, reference)
        tokenizer = (shared or model).tokenizer
        held = split(self, tokenizer).held_out
        prompts = list({tuple(sample.prompt.tolist()): sample.prompt for sample in held}.values())
        asked = unanswered([prompts[n] for n in spread(len(prompts), self.continuations).tolist()])
        judge = (lambda text: self.verify(*text)) if self.solution else None
        result, written = measured(self, model, shared, _text(held, tokenizer), asked, measures, seed, judge)
        ends = {*model.ends, *split(self, tokenizer).ends}
        rows = {
            "response tokens": written.mask.sum(1).double().numpy(),
            "finished": torch.tensor([row[-1] in ends for row in responses(written)]).double().numpy(),
        }
        if judge:
            rows["pass@1"] = judge(written).double().numpy()
        if self.rewards:
            rows["reward"] = self.reward(*written).double().numpy()
        if self.rejected and shared:
            rows |= preferences.judged(self, model, shared, seed)
        result["scalars"] |= {name: float(row.mean()) for name, row in rows.items()}
        result["scalar_errors"] |= {name: error(row) for name, row in rows.items()}
        return result


def _text(samples: list[Sample], tokenizer: Any) -> Text:
    return answered([s.prompt for s in samples], [s.response for s in samples], fill(tokenizer))
