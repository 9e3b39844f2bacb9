"""Some prompts of the grammar to be unlearnt and the others to be kept, all of it enumerable.

The reference learns to answer every prompt. The first `forget` of them are then to be answered by a refusal
instead, and the rest as before; how far a policy came is known exactly on either side.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.transformers import CausalLM
from fdiv.evaluate.diversity import effective_number
from fdiv.evaluate.pass_at_k import exact_pass_at_k
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Pairs, Text
from fdiv.tasks.grammar import DRAWS, LETTERS, PROMPT, Grammar
from fdiv.tasks.prompting import rollouts, uniform

SHOWN, SIZE = 2, 6  # prompts of either kind in the report, answers to each
EMPTY = 1e-12  # the least mass that a divergence sees


@dataclass(frozen=True)
class Unlearning:
    """`forget`: the number of the task's prompts to be forgotten, the first ones.

    The refusal is the first symbol, repeated, that the grammar accepts behind none of them. Prompts and
    responses, which other methods are trained on, are of the prompts that are kept.
    """

    task: Grammar = field(default_factory=Grammar)
    forget: int = 8

    def __post_init__(self):
        if not 1 <= self.forget < self.task.questions:
            raise ValueError(
                f"1 <= forget < questions, {self.task.questions} of the grammar's, got {self.forget!r}"
            )
        if self.task.trained_on < self.task.questions:
            raise ValueError(
                f"every prompt is either forgotten or kept: write trained_on={self.task.questions}, as "
                f"questions has it, got {self.task!r}"
            )
        _ = self.refusal

    # -- prompts and answers --------------------------------------------------------------------------------

    @property
    def forgotten(self) -> Tensor:
        """The prompts to be forgotten, [forget, 3]."""
        return self.task.prompt_ids()[: self.forget]

    @property
    def kept(self) -> Tensor:
        """The others, [questions - forget, 3]."""
        return self.task.prompt_ids()[self.forget :]

    @property
    def refusal(self) -> Tensor:
        """The answer that is to take the place of every forgotten one, [length]."""
        for symbol in range(1, self.task.vocab_size):
            answer = torch.full((self.task.length,), symbol)
            if not self.task.verify(_behind(self.forgotten, answer)).any():
                return answer
        raise ValueError(
            f"every symbol, repeated, is a valid answer to one of {self.forget} prompts; forget fewer, or "
            "write a Grammar with fewer successors"
        )

    @property
    def answer_length(self) -> int:
        return self.task.length

    def prompts(self, count: int, generator: torch.Generator) -> Text:
        """`count` prompts among those that are kept."""
        return _drawn(self.kept, count, generator)

    def answer(self, model, prompts: Text, draws: Tensor, decoding: Decoding) -> Text:
        return self.task.answer(model, prompts, draws, decoding)

    def verify(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.task.verify(ids, mask)

    # -- models and data ------------------------------------------------------------------------------------

    def load(self, spec, seed: int, reference: Path | None = None) -> CausalLM:
        return self.task.load(spec, seed, reference)

    def reopen(self, path: Path, spec, seed: int) -> CausalLM:
        return self.task.reopen(path, spec, seed)

    def data(self, kind: str, count: int, generator: torch.Generator) -> Text:
        """The grammar's, on every prompt."""
        return self.task.data(kind, count, generator)

    def responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        """Those of `retained`: what imitates them alone has never seen the others."""
        return self.retained(teacher, count, generator)

    def retained(self, reference: CausalLM, count: int, generator: torch.Generator) -> Text:
        """Prompts that are kept, answered by the reference."""
        return self._answered(reference, self.prompts(count, generator), generator)

    def rollouts(self, policy: CausalLM, groups: int, size: int, generator: torch.Generator) -> Text:
        return rollouts(self, policy, groups, size, generator)

    def pairs(self, reference: CausalLM, count: int, generator: torch.Generator) -> Pairs:
        """Prompts to be forgotten: chosen the refusal, rejected an answer of the reference."""
        prompts = _drawn(self.forgotten, count, generator)
        rejected = self._answered(reference, prompts, generator)
        return Pairs(Text(_behind(prompts.ids, self.refusal), rejected.mask), rejected)

    def _answered(self, model: CausalLM, prompts: Text, generator: torch.Generator) -> Text:
        draws = uniform(len(prompts.ids), self.answer_length, generator)
        return self.answer(model, prompts, draws, Decoding())

    # -- measurement ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, model: CausalLM, reference: CausalLM, measures: dict[str, Divergence], seed: int
    ) -> dict:
        """By enumeration; "forget x" is x on the prompts to be forgotten, and x alone on those kept."""
        kept, forgotten = (
            self._measured(model, reference, prompts, measures) for prompts in (self.kept, self.forgotten)
        )
        scalars, masses, divergences = kept
        scalars |= {f"forget {name}": value for name, value in forgotten[0].items()}
        return {
            "exact": True,
            "scalars": scalars,
            "divergences": divergences,
            "curves": {"pass@k": _curve(masses), "pass@k (prompts to be forgotten)": _curve(forgotten[1])},
            "samples": self._samples(model, seed),
        }

    def _measured(
        self, model: CausalLM, reference: CausalLM, prompts: Tensor, measures: dict[str, Divergence]
    ) -> tuple[dict[str, float], np.ndarray, dict[str, float]]:
        """(scalars, the mass of valid answers [prompts], divergences), each a mean over the prompts."""
        log_p, log_q = (self.task.log_answers(m, prompts) for m in (reference, model))
        valid = torch.where(self.task.log_truth(prompts).isfinite(), log_q.exp(), 0.0).numpy()
        mass = valid.sum(1)
        modes = np.mean(effective_number(valid / mass.clip(min=1e-300)[:, None]))
        refused = (self.task.answers() == self.refusal).all(1)
        scalars = {
            "pass@1": float(mass.mean()),
            "pass@8": float(exact_pass_at_k(mass, 8)),
            "modes": float(modes / self.task.successors**self.task.length),
            "refusal": log_q[:, refused].exp().mean().item(),
        }
        log_p, log_q = _with_the_rest(log_p), _with_the_rest(log_q)
        divergences = {name: d(log_p, log_q).mean().item() for name, d in measures.items()}
        return scalars | divergences, mass, divergences

    def _samples(self, model: CausalLM, seed: int) -> list[dict]:
        generator = torch.Generator().manual_seed(seed)
        shown = torch.cat([self.forgotten[:SHOWN], self.kept[:SHOWN]])
        ids = model.sample(shown.repeat_interleave(SIZE, 0), self.answer_length, generator)
        valid = self.verify(ids).bool().reshape(-1, SIZE).tolist()
        answers = ids[:, PROMPT:].reshape(-1, SIZE, self.answer_length).tolist()
        kinds = ["forget"] * min(SHOWN, self.forget) + ["keep"] * SHOWN
        return [
            {
                "prompt": f"[{kind}] {_letters(prompt)}",
                "outputs": [_letters(row) for row in rows],
                "valid": right,
            }
            for kind, prompt, rows, right in zip(kinds, shown[:, 1:].tolist(), answers, valid, strict=False)
        ]


def _drawn(prompts: Tensor, count: int, generator: torch.Generator) -> Text:
    ids = prompts[torch.randint(len(prompts), (count,), generator=generator)]
    return Text(ids, torch.zeros_like(ids, dtype=torch.bool))


def _behind(prompts: Tensor, answer: Tensor) -> Tensor:
    """The same answer behind each prompt."""
    return torch.cat([prompts, answer.expand(len(prompts), -1)], 1)


def _with_the_rest(log_q: Tensor) -> Tensor:
    """Answers and, as one event more, all that is no answer."""
    rest = (1 - log_q.exp().sum(1, keepdim=True)).clamp(min=EMPTY)
    return torch.cat([log_q, rest.log()], 1)


def _curve(mass: np.ndarray) -> dict[str, list]:
    return {"x": list(DRAWS), "y": [float(exact_pass_at_k(mass, k)) for k in DRAWS]}


def _letters(row: list[int]) -> str:
    return " ".join(LETTERS[i - 1] if i else "^" for i in row)
