"""What a method is fed at a step: one class for each thing that methods consume.

A feed draws its data once, from the seed, and each step's batch from (seed, step): a run that is resumed
sees the batches it would have seen. What a frozen model says about fixed data is computed once.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.methods._method import Out
from fdiv.recipe import TrainSpec
from fdiv.tasks._task import Text

CACHE_ROWS = 256  # sequences a frozen model reads at once
CACHE_TOKENS = 16384  # and tokens


class Feed:
    """`step(model, n)` runs the method on the n-th batch.

    `cache`: a folder where hidden states of the reference are kept for the other members.
    """

    def __init__(
        self,
        method,
        task,
        reference: CausalLM | None,
        spec: TrainSpec,
        seed: int,
        device: str,
        cache: Path | None = None,
        progress: Callable[[int, int, None], None] = lambda done, total, loss: None,
    ):
        self.method, self.task = method, task
        self.reference: Any = reference
        self.spec, self.seed, self.device = spec, seed, device
        self.cache, self.progress = cache, progress
        self.prepare(self.generator(-1))

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + step)

    def prepare(self, generator: torch.Generator) -> None:
        """Draw what is drawn once."""

    def step(self, model: CausalLM, step: int) -> Out:
        raise NotImplementedError

    def batch(self, step: int, among: int) -> Tensor:
        """Indices of the step's examples, of `among` that there are."""
        return torch.randint(among, (self.spec.batch_size,), generator=self.generator(step))

    def frozen(
        self, text: Text, function: Callable[[Tensor, Tensor], Tensor], cache: Path | None = None
    ) -> Tensor:
        """`function(ids, mask)` of the frozen reference on every sequence, stacked as [N, tokens, ...].

        With a `cache` folder each part is a file there, so that work that was interrupted goes on.
        """
        size = max(1, min(CACHE_ROWS, CACHE_TOKENS // text.ids.shape[1]))
        parts = []
        for ids, mask in zip(text.ids.split(size), text.mask.split(size), strict=True):
            file = cache / f"{self._key(ids, mask)}.safetensors" if cache else None
            rows = kept(file, lambda i=ids, m=mask: function(i.to(self.device), m.to(self.device)))
            parts.append(rows.to(self.device).unflatten(0, (len(ids), -1)))
            if cache:
                self.progress(len(parts), -(-len(text.ids) // size), None)
        return torch.cat(parts)

    def _key(self, ids: Tensor, mask: Tensor) -> str:
        digest = hashlib.sha256(self.reference.fingerprint().encode())
        for tensor in (ids, mask):
            digest.update(f"{tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:32]


@torch.no_grad()
def kept(file: Path | None, compute: Callable[[], Tensor]) -> Tensor:
    """What is in `file`, or else `compute()`, which then is: written whole or not at all."""
    if file and file.exists():
        try:
            return load_file(file)["rows"]
        except SafetensorError:  # damaged
            pass
    rows = compute()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}.new")
        save_file({"rows": rows.contiguous()}, new)
        new.replace(file)
    return rows


class Tokens(Feed):
    """Text and its labels, drawn from the task, or from the reference if there is one."""

    def __init__(self, *args, data: str | None = None, **options):
        self.data = data
        super().__init__(*args, **options)

    def prepare(self, generator):
        count = self.spec.examples
        if self.data:
            self.text = self.task.data(self.data, count, generator)
        else:
            self.text = self.task.responses(self.reference, count, generator)

    def step(self, model, step):
        ids, mask = (t.to(self.device) for t in self.text.rows(self.batch(step, len(self.text.ids))))
        return self.method(log_q=model.token_log_probs(ids, mask))


class Responses(Feed):
    """Responses and what the teacher says about each of their tokens; some written by the student."""

    def prepare(self, generator):
        self.text = self.task.responses(self.reference, self.spec.examples, generator)
        # Rows of logits are too large to keep on disk, and quick to make for models whose rows are not.
        cache = self.cache if self.method.estimator.sees == "heads" else None
        self.signal = self.frozen(self.text, self._teacher, cache)

    def step(self, model, step):
        generator = self.generator(step)
        index = self.batch(step, len(self.text.ids))
        if torch.rand((), generator=generator).item() < self.method.lmbda:
            text = self.task.rollouts(model, self.spec.batch_size, 1, generator)
            with torch.no_grad():
                signal = self._teacher(text.ids.to(self.device), text.mask.to(self.device))
        else:
            text, signal = self.text.rows(index), self.signal[index].flatten(0, 1)
        ids, mask = text.ids.to(self.device), text.mask.to(self.device)
        if self.method.estimator.sees == "heads":
            t = self.method.temperature
            hidden, head = model.hidden(ids, mask) / t, model.head
            out = self.method(
                p_hidden=signal / t, p_weight=self.reference.head, q_hidden=hidden, q_weight=head
            )
            with torch.no_grad():  # a few rows tell the entropy well enough
                log_q = (hidden[:: 1 + len(hidden) // 64] @ head.T).float().log_softmax(-1)
        else:
            log_q = self._tempered(model.log_softmax(ids, mask))
            out = self.method(log_p=self._tempered(signal), log_q=log_q)
        with torch.no_grad():
            entropy = -(log_q.exp() * log_q.clamp(min=-1e4)).sum(-1).mean()
        return Out(out.loss, out.metrics | {"entropy": entropy})

    def _teacher(self, ids, mask):
        heads = self.method.estimator.sees == "heads"
        return self.reference.hidden(ids, mask) if heads else self.reference.log_softmax(ids, mask)

    def _tempered(self, log_probs: Tensor) -> Tensor:
        t = self.method.temperature
        return log_probs if t == 1 else (log_probs / t).log_softmax(-1)


class Pairs(Feed):
    """Preferred and other responses, with the reference's log-probability of each."""

    def prepare(self, generator):
        self.pairs = self.task.pairs(self.reference, self.spec.examples, generator)
        self.log_p = [self.frozen(side, self.reference.token_log_probs).sum(1) for side in self.pairs]

    def step(self, model, step):
        index = self.batch(step, len(self.pairs.chosen.ids))
        sides = [side.rows(index) for side in self.pairs]
        both = Text(torch.cat([s.ids for s in sides]), torch.cat([s.mask for s in sides]))
        log_q = model.token_log_probs(both.ids.to(self.device), both.mask.to(self.device))
        chosen, rejected = log_q.unflatten(0, (2, len(index), -1)).sum(-1)
        return self.method(
            log_p_chosen=self.log_p[0][index],
            log_p_rejected=self.log_p[1][index],
            log_q_chosen=chosen,
            log_q_rejected=rejected,
        )


class Rollouts(Feed):
    """Groups of answers that the policy has just sampled, judged by the task."""

    def step(self, model, step):
        groups, size = self.spec.batch_size // self.spec.group_size, self.spec.group_size
        text = self.task.rollouts(model, groups, size, self.generator(step))
        rewards = self.task.verify(text.ids).reshape(groups, size).to(self.device)
        ids, mask = text.ids.to(self.device), text.mask.to(self.device)
        policy = model.log_softmax(ids, mask)
        chosen = model.labels(ids, mask).unsqueeze(-1)
        with torch.no_grad():
            reference = self.reference.log_softmax(ids, mask)
        log_policy = policy.gather(-1, chosen).squeeze(-1)
        if self.method.estimator.sees == "logits":
            evidence = {"log_p": reference, "log_q": policy}
        else:
            evidence = {"log_p": reference.gather(-1, chosen).squeeze(-1), "log_q": log_policy}
        rows = {name: t.unflatten(0, (groups * size, -1)) for name, t in evidence.items()}
        log_policy = log_policy.unflatten(0, (groups * size, -1))
        out = self.method(
            log_policy=log_policy,
            log_behaviour=log_policy.detach(),
            rewards=rewards,
            mask=torch.ones_like(log_policy, dtype=torch.bool),
            **rows,
        )
        entropy = -(policy.exp() * policy).sum(-1).mean().detach()
        return Out(out.loss, out.metrics | {"entropy": entropy})


FEEDS: dict[str, type[Feed]] = {
    "tokens": Tokens,
    "responses": Responses,
    "pairs": Pairs,
    "rollouts": Rollouts,
}
