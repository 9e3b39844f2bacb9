"""A random grammar whose answers can all be enumerated: every divergence and every pass@k is exact.

After each pair of symbols exactly `successors` symbols are legal, with Zipf weights in a random order. A
prompt is two symbols and an answer `length` more; the answer is valid if each transition is legal (the
verifier), and its true probability is known.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.transformers import CausalLM
from fdiv.divergences.js import JS
from fdiv.divergences.tv import TV
from fdiv.evaluate.calibration import ece_null, expected_calibration_error, reliability
from fdiv.evaluate.diversity import coverage_at_k, effective_number
from fdiv.evaluate.pass_at_k import exact_pass_at_k
from fdiv.methods.match.target import Target
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Pairs, Text
from fdiv.tasks.prompting import rollouts

BOS = 0
PROMPT = 3  # BOS and two symbols
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DRAWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Grammar:
    """The task: `questions` pairs of symbols, of which the first `trained_on` are prompts of training.

    noise: the fraction of random answers in the data of kind "noisy", from which weak policies are made.
    table: the seed of the grammar itself.
    bonus: what the reward adds to the verdict for an answer of the first symbol alone, in proportion: a proxy
        that can be had for nothing. 0 is the verdict itself.
    target: what the divergences of an evaluation are from: the reference times these scorers, or itself.
    """

    symbols: int = 12
    successors: int = 4
    length: int = 3
    questions: int = 64
    trained_on: int = 64
    noise: float = 0.4
    table: int = 0
    target: Target = field(default_factory=Target)
    bonus: float = 0.0

    def __post_init__(self):
        if not 2 <= self.successors <= self.symbols <= len(LETTERS):
            raise ValueError(
                f"2 <= successors <= symbols <= {len(LETTERS)}, got {self.successors}, {self.symbols}"
            )
        if not 1 <= self.trained_on <= self.questions <= self.symbols**2:
            raise ValueError(
                f"1 <= trained_on <= questions <= symbols^2, got {self.trained_on}, {self.questions}"
            )

    # -- the truth --------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    def load(self, spec, seed: int, reference: Path | None = None) -> CausalLM:
        """A fresh model of the sizes in `spec`."""
        if not spec.hidden_size or spec.path or spec.keep_layers:
            raise ValueError(f"Grammar has a vocabulary of its own: give the model a hidden_size, got {spec}")
        return CausalLM.fresh(self.vocab_size, spec.hidden_size, spec.layers, spec.heads, seed)

    def reopen(self, path: Path, spec, seed: int) -> CausalLM:
        """A model that was saved."""
        return CausalLM.load(path)

    def transitions(self) -> Tensor:
        """P(c | a, b), [symbols, symbols, symbols]."""
        return _tables(self)[0]

    def prompt_ids(self) -> Tensor:
        """[questions, 3]"""
        return _tables(self)[1]

    def answers(self) -> Tensor:
        """All symbols^length answers as ids, in the order of every enumeration: [answers, length]."""
        return torch.tensor(list(product(range(1, self.vocab_size), repeat=self.length)))

    def log_truth(self, prompts: Tensor) -> Tensor:
        """log p(answer | prompt), [prompts, answers]."""
        answers = self.answers() - 1
        first, second = prompts[:, 1, None] - 1, prompts[:, 2, None] - 1
        log_p = torch.zeros(len(prompts), len(answers), dtype=torch.float64)
        for step in range(self.length):
            symbol = answers[None, :, step].expand(len(prompts), -1)
            log_p = log_p + self.transitions()[first, second, symbol].log()
            first, second = second.expand_as(symbol), symbol
        return log_p

    def verify(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Whether each sequence [N, 3 + length] ends in a valid answer, as float [N]."""
        symbols = ids[:, 1:] - 1
        legal = (symbols >= 0).all(1)
        symbols = symbols.clamp(min=0)
        for step in range(self.length):
            a, b, c = symbols[:, step], symbols[:, step + 1], symbols[:, step + 2]
            legal = legal & (self.transitions()[a, b, c] > 0)
        return legal.float()

    def reward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The verdict and the bonus of each sequence, as float [N]."""
        return self.verify(ids, mask) + self.bonus * (ids[:, PROMPT:] == 1).float().mean(1)

    # -- data ---------------------------------------------------------------------------------------------

    def data(self, kind: str, count: int, generator: torch.Generator) -> Text:
        """`count` prompts with answers drawn from the truth ("truth"), some of them random ("noisy")."""
        if kind not in ("truth", "noisy"):
            raise ValueError(f"Grammar has data 'truth' and 'noisy', got {kind!r}")
        prompt = torch.randint(self.questions, (count,), generator=generator)
        answer = _draw(self.log_truth(self.prompt_ids()).exp(), prompt, generator)
        if kind == "noisy":
            anything = torch.randint(len(self.answers()), (count,), generator=generator)
            noisy = torch.rand(count, generator=generator) < self.noise
            answer = torch.where(noisy, anything, answer)
        return self._text(torch.cat([self.prompt_ids()[prompt], self.answers()[answer]], 1))

    def responses(self, teacher: CausalLM, count: int, generator: torch.Generator) -> Text:
        """`count` prompts answered by `teacher`."""
        return rollouts(self, teacher, count, 1, generator)

    @property
    def answer_length(self) -> int:
        return self.length

    def prompts(self, count: int, generator: torch.Generator) -> Text:
        """`count` prompts among those of training."""
        ids = self.prompt_ids()[torch.randint(self.trained_on, (count,), generator=generator)]
        return Text(ids, torch.zeros_like(ids, dtype=torch.bool))

    def answer(self, model, prompts: Text, draws: Tensor, decoding: Decoding) -> Text:
        """An answer of `model` to each prompt."""
        return self._text(model.sample(prompts.ids, self.length, draws=draws, decoding=decoding))

    def rollouts(self, policy: CausalLM, groups: int, size: int, generator: torch.Generator) -> Text:
        """`size` answers to each of `groups` prompts seen in training."""
        return rollouts(self, policy, groups, size, generator)

    def privileged(self, text: Text) -> tuple[Text, Tensor]:
        """Each answer after its prompt, the likeliest valid answer and the prompt again; all have one."""
        prompt = text.ids[:, :PROMPT]
        best = self.answers()[self.log_truth(prompt.cpu()).argmax(1)].to(prompt)
        ids = torch.cat([prompt, best, text.ids], 1)
        mask = torch.cat([torch.zeros_like(ids[:, : PROMPT + self.length]).bool(), text.mask], 1)
        return Text(ids, mask), torch.ones(len(ids), dtype=torch.bool)

    def pairs(self, reference: CausalLM, count: int, generator: torch.Generator) -> Pairs:
        """A valid and an invalid answer of the reference to each of `count` prompts."""
        prompts = self.prompt_ids()[: self.trained_on]
        q = self.log_answers(reference, prompts).exp()
        valid = self.log_truth(prompts).isfinite()
        prompt = torch.randint(self.trained_on, (count,), generator=generator)
        draws = [_draw(torch.where(w, q, 0.0), prompt, generator) for w in (valid, ~valid)]
        return Pairs(*(self._text(torch.cat([prompts[prompt], self.answers()[d]], 1)) for d in draws))

    def _text(self, ids: Tensor) -> Text:
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, PROMPT:] = True
        return Text(ids, mask)

    # -- measurement --------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_answers(self, model: CausalLM, prompts: Tensor) -> Tensor:
        """log q(answer | prompt) of every answer, [prompts, answers], float64."""
        prefixes = torch.tensor(list(product(range(1, self.vocab_size), repeat=self.length - 1)))
        ids = torch.cat(
            [
                prompts.repeat_interleave(len(prefixes), 0),
                prefixes.repeat(len(prompts), 1),
                torch.ones(len(prompts) * len(prefixes), 1, dtype=torch.long),
            ],
            1,
        )
        rows = model.log_softmax(*self._text(ids)).cpu().double()
        rows = rows.reshape(len(prompts), *[self.symbols] * (self.length - 1), self.length, self.vocab_size)
        log_q = torch.zeros(len(prompts), *[1] * self.length, dtype=torch.float64)
        for step in range(self.length):
            # The step-th symbol depends on the prefix before it alone: take any continuation.
            seen = rows[(slice(None), *[slice(None)] * step, *[0] * (self.length - 1 - step), step)]
            log_q = log_q + seen[..., 1:].reshape(
                *seen.shape[:-1], self.symbols, *[1] * (self.length - 1 - step)
            )
        return log_q.reshape(len(prompts), -1)

    @torch.no_grad()
    def evaluate(
        self, model: CausalLM, reference: CausalLM, measures: dict[str, Divergence], seed: int
    ) -> dict:
        """Everything the report shows, by enumeration; the divergences are those to the reference."""
        log_p, log_q = (self.log_answers(m, self.prompt_ids()) for m in (reference, model))
        seen, unseen = slice(0, self.trained_on), slice(self.trained_on, None)
        result = {"exact": True, "scalars": self._scalars(log_q, seen), "curves": {}}
        result["curves"]["pass@k"] = _curve(self._valid(log_q, seen).sum(1))
        if self.trained_on < self.questions:
            held_out = self._scalars(log_q, unseen)
            result["scalars"] |= {f"held-out {name}": value for name, value in held_out.items()}
            result["curves"]["pass@k (held-out prompts)"] = _curve(self._valid(log_q, unseen).sum(1))
        log_p, log_q = self._aimed(_with_leak(log_p[seen])), _with_leak(log_q[seen])
        result["divergences"] = {name: d(log_p, log_q).mean().item() for name, d in measures.items()}
        result["scalars"] |= result["divergences"]
        result["calibration"] = self._calibration(model, seed)
        result["scalars"] |= {key: result["calibration"][key] for key in ("ece", "ece_null")}
        result["samples"] = self._samples(model, seed)
        return result

    def _aimed(self, log_p: Tensor) -> Tensor:
        """The target, from the reference at prompts of training: [prompts, answers and a leak]."""
        if self.target == Target():
            return log_p
        answers = torch.cat([self.answers(), torch.full((1, self.length), BOS)])
        prompts = self.prompt_ids()[: self.trained_on].repeat_interleave(len(answers), 0)
        text = self._text(torch.cat([prompts, answers.repeat(self.trained_on, 1)], 1))
        return self.target.log_score(log_p.flatten(), *text, self).reshape(log_p.shape).log_softmax(1)

    def _valid(self, log_q: Tensor, prompts: slice) -> Tensor:
        """The probability of each valid answer, 0 elsewhere: [prompts, answers]."""
        log_p = self.log_truth(self.prompt_ids()[prompts])
        return torch.where(log_p.isfinite(), log_q[prompts].exp(), 0.0)

    def _scalars(self, log_q: Tensor, prompts: slice) -> dict[str, float]:
        p, q = self.log_truth(self.prompt_ids()[prompts]).exp(), log_q[prompts].exp()
        valid = self._valid(log_q, prompts)
        mass = valid.sum(1)
        inside = valid / mass.clamp(min=1e-300)[:, None]
        modes = np.mean(effective_number(inside.numpy())) / self.successors**self.length
        coverage = np.divide(coverage_at_k(valid.numpy(), 64), coverage_at_k(p.numpy(), 64))
        first = (self.answers() == 1).double().mean(1)
        proxy = {"proxy reward": (mass + self.bonus * (q * first).sum(1)).mean().item()} if self.bonus else {}
        log_p, log_q = (t.clamp(min=1e-300).log() for t in (p, q))
        return proxy | {
            "pass@1": mass.mean().item(),
            "pass@8": float(exact_pass_at_k(mass.numpy(), 8)),
            "pass@64": float(exact_pass_at_k(mass.numpy(), 64)),
            "coverage@64": float(coverage.mean()),
            "modes": float(modes),
            "entropy": -torch.special.xlogy(q, q).sum(1).mean().item(),
            "TV to truth": TV()(log_p, log_q).mean().item(),
            "JS to truth": JS()(log_p, log_q).mean().item(),
        }

    def _calibration(self, model: CausalLM, seed: int, count: int = 1024) -> dict:
        """Next-symbol calibration on fresh answers of the truth: is it right as often as it claims?"""
        text = self.data("truth", count, torch.Generator().manual_seed(1_000_003 + seed))
        confidence, guess = model.log_softmax(*text).exp().max(-1)
        correct = (guess == model.labels(*text)).double().cpu().numpy()
        confidence = confidence.double().cpu().numpy()
        return {
            "ece": float(expected_calibration_error(confidence, correct)),
            "ece_null": float(ece_null(confidence, seed=seed)),
            "bins": reliability(confidence, correct),
        }

    def _samples(self, model: CausalLM, seed: int, prompts: int = 4, size: int = 6) -> list[dict]:
        generator = torch.Generator().manual_seed(seed)
        chosen = self.prompt_ids()[:prompts].repeat_interleave(size, 0)
        ids = model.sample(chosen, self.length, generator)
        valid = self.verify(ids).bool().tolist()
        words = [" ".join(LETTERS[i - 1] if i else "^" for i in row) for row in ids[:, PROMPT:].tolist()]
        return [
            {
                "prompt": " ".join(LETTERS[i - 1] for i in self.prompt_ids()[n, 1:].tolist()),
                "outputs": words[n * size : (n + 1) * size],
                "valid": valid[n * size : (n + 1) * size],
            }
            for n in range(prompts)
        ]


@lru_cache(maxsize=8)
def _tables(task: Grammar) -> tuple[Tensor, Tensor]:
    """(transitions, prompts) of a grammar, from its own generator."""
    generator = torch.Generator().manual_seed(task.table)
    zipf = 1 / torch.arange(1, task.successors + 1, dtype=torch.float64)
    transitions = torch.zeros(task.symbols, task.symbols, task.symbols, dtype=torch.float64)
    for a, b in product(range(task.symbols), repeat=2):
        legal = torch.randperm(task.symbols, generator=generator)[: task.successors]
        transitions[a, b, legal] = zipf / zipf.sum()
    chosen = torch.randperm(task.symbols**2, generator=generator)[: task.questions]
    bos = torch.full_like(chosen, BOS)
    return transitions, torch.stack([bos, chosen // task.symbols + 1, chosen % task.symbols + 1], 1)


def _with_leak(log_q: Tensor) -> Tensor:
    """Answers and, as one event more, everything that is no answer at all."""
    leak = (1 - log_q.exp().sum(1, keepdim=True)).clamp(min=1e-12)
    return torch.cat([log_q, leak.log()], 1)


def _draw(probabilities: Tensor, prompt: Tensor, generator: torch.Generator) -> Tensor:
    """An answer for each prompt (an index into the rows of `probabilities`), by inverting the CDF."""
    below = probabilities.cumsum(1)
    level = torch.rand(len(prompt), 1, dtype=below.dtype, generator=generator)
    answer = torch.empty(len(prompt), dtype=torch.long)
    for n in prompt.unique().tolist():
        rows = prompt == n
        answer[rows] = torch.searchsorted(below[n], level[rows, 0] * below[n, -1], right=True)
    return answer


def _curve(mass: Tensor) -> dict[str, list]:
    """pass@k for k = 1, 2, 4, ...: mean over prompts of 1 - (1 - valid mass)^k."""
    return {"x": list(DRAWS), "y": [float(exact_pass_at_k(mass.numpy(), k)) for k in DRAWS]}
