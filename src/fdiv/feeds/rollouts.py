"""Groups of answers that the policy has just sampled, judged by the task."""

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import Counts, Feed, Part, boxed
from fdiv.methods._method import Out
from fdiv.methods.rl.grpo import group_advantage
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text


class Rollouts(Feed):
    """`group_size` answers to each of batch_size / group_size prompts; the advantage is within a group."""

    def prepare(self, generator: torch.Generator) -> None:
        self.require_local()
        size, group = self.spec.batch_size, self.spec.group_size
        if size % group:
            raise ValueError(f"a batch_size of {size} is no whole number of groups of group_size {group}")
        if self.spec.validate_every:
            raise ValueError(
                f"{self.method!r} has no loss on text that it did not sample; leave out validate_every"
            )

    def parts(self, model: CausalLM, step: int) -> list[Part]:
        groups, size = self.spec.batch_size // self.spec.group_size, self.spec.group_size
        generator = self.generator(step)
        prompts = self.task.prompts(groups, generator)
        draws = self.draws(groups * size, generator)
        share = self.world.share(groups)
        own = Text(*(t[share].repeat_interleave(size, 0) for t in prompts))
        draws = draws[share.start * size : share.stop * size]
        with self.whole():
            text = self.task.answer(self.hand.of(model), own, draws, Decoding())
        rewards = self.task.verify(*text).reshape(-1, size)
        more = {"advantage": group_advantage(rewards).flatten(), "reward": rewards.flatten()}
        part = Part(text, more)
        return part.split(self.spec.micro_batch or len(text.ids))

    def loss(self, model: CausalLM, part: Part, batch: Counts) -> Out:
        ids, mask = self.on_device(part.text)
        policy = model.log_softmax(ids, mask)
        chosen = model.labels(ids, mask).unsqueeze(-1)
        with torch.no_grad():
            reference = self.reference.log_softmax(ids, mask)
        log_policy = boxed(policy.gather(-1, chosen).squeeze(-1), mask)
        out = self.method(
            log_policy=log_policy,
            log_behaviour=log_policy.detach(),
            advantage=part.more["advantage"].to(self.device),
            mask=mask[:, 1:],
            count=batch.tokens,
            **self._evidence(reference, policy, chosen, mask),
        )
        entropy = -(policy.exp() * policy).sum(-1).mean().detach()
        # A mean over sequences, where the others are over tokens, and are weighted so.
        reward = part.more["reward"].sum() / (batch.sequences * self.share(part, batch) or 1.0)
        return Out(out.loss, {"reward": reward} | out.metrics | {"entropy": entropy})

    def _evidence(self, reference: Tensor, policy: Tensor, chosen: Tensor, mask: Tensor) -> dict[str, Tensor]:
        rows = (reference, policy)
        if self.method.estimator.sees != "logits":
            rows = tuple(t.gather(-1, chosen).squeeze(-1) for t in rows)
        return {name: boxed(t, mask) for name, t in zip(("log_p", "log_q"), rows, strict=True)}
