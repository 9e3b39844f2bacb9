"""How the groups of a step are written and judged, and kept for the steps that use them again."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdiv.adapters.reading import plainly
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import Part, boxed, padded
from fdiv.feeds.branching import branched
from fdiv.methods.match.partition import Partition, prompt_keys
from fdiv.methods.rl.grpo import group_advantage
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text

if TYPE_CHECKING:
    from fdiv.feeds.rollouts import Rollouts

KEPT = "rollout."  # names in memory of what is used for several steps


class Groups:
    """`now` writes the global batch, `keep` and `kept` lay it by in the run's memory."""

    def __init__(self, feed: "Rollouts"):
        self.feed = feed
        self.target = getattr(feed.method, "target", None)
        self.branching = getattr(feed.method, "branching", None)
        self.partition = Partition(feed.memory)

    def now(self, model: CausalLM, generator: torch.Generator) -> Part:
        """The global batch, of which each process writes its share."""
        feed = self.feed
        asked = feed.rehearsed.explored if feed.rehearsed else feed.task.prompts
        prompts = asked(feed.groups, generator)
        writer = feed.proposal.model if feed.proposal else model
        text, tree = self._answers(writer, prompts, generator)
        more = self._judged(text) | self._scores(writer, text) | tree
        text = padded(feed.world.gather(text))
        found = {name: _widened(feed.world.gather(t.cpu()), text) for name, t in more.items()}
        found["group"] = torch.arange(feed.groups).repeat_interleave(feed.spec.group_size)
        if self.target:
            keys = prompt_keys(prompts.ids)[found["group"]]
            log_behaviour = found["log_behaviour"].double().sum(1)
            found["log_partition"] = self.partition.update(keys, found["log_target"], log_behaviour)
        if not self.ages:
            found.pop("log_behaviour", None)
        return Part(text, found)

    def _answers(
        self, writer: CausalLM, prompts: Text, generator: torch.Generator
    ) -> tuple[Text, dict[str, Tensor]]:
        """(this process's answers, group by group; how they branch off each other, if they do)."""
        feed, size = self.feed, self.feed.spec.group_size
        if self.branching:
            return branched(feed, writer, prompts, generator)
        share = feed.world.share(feed.groups)
        draws = feed.draws(feed.spec.batch_size, generator)[share.start * size : share.stop * size]
        own = Text(*(t[share].repeat_interleave(size, 0) for t in prompts))
        with feed.whole():
            return feed.task.answer(feed.hand.of(writer), own, draws, Decoding()), {}

    @property
    def ages(self) -> bool:
        """Whether answers are used when the policy is no longer as it was that wrote them."""
        return self.feed.spec.reuse > 1 or self.feed.proposal is not None

    def _judged(self, text: Text) -> dict[str, Tensor]:
        """Rewards, if the method asks for them or for what is made of them."""
        found: dict[str, Tensor] = {}
        if self.feed.reads & {"reward", "advantage"}:
            found["reward"] = self._reward(text)
        if "advantage" in self.feed.reads:
            advantages = getattr(self.feed.method, "advantages", group_advantage)
            found["advantage"] = advantages(found["reward"].reshape(-1, self.feed.spec.group_size)).flatten()
        if "correct" in self.feed.reads:
            found["correct"] = self.feed.task.verify(*text).bool()
        return found

    def _reward(self, text: Text) -> Tensor:
        rewards = (getattr(self.feed.task, "reward", None) or self.feed.task.verify)(*text).float()
        if not bool(rewards.isfinite().all()):
            raise ValueError(f"a reward of {self.feed.task!r} is {rewards[~rewards.isfinite()][0].item()}")
        return rewards

    @torch.no_grad()
    def _scores(self, writer: CausalLM, text: Text) -> dict[str, Tensor]:
        """What the writer thinks of its answers now [N, S - 1], and the log of the target's mass [N]."""
        found = {}
        if self.ages or self.target:
            found["log_behaviour"] = self._boxed(writer, text)
        if self.target:
            log_base = self._boxed(self.feed.reference, text).double().sum(1)
            found["log_target"] = self.target.log_score(log_base.cpu(), *text, self.feed.task)
        return found

    def _boxed(self, model: CausalLM, text: Text) -> Tensor:
        """Without dropout, as the model writes, and in the precision of the loss."""
        size = self.feed.spec.micro_batch or len(text.ids)
        texts = (self.feed.on_device(part.text) for part in Part(text).split(size))
        with plainly(model), self.feed.precision():
            return torch.cat([boxed(model.token_log_probs(*some), some[1]) for some in texts])

    def keep(self, part: Part) -> None:
        tensors = {"ids": part.text.ids, "mask": part.text.mask} | part.more
        for name in [name for name in self.feed.memory if name.startswith(KEPT)]:
            del self.feed.memory[name]
        self.feed.memory |= {KEPT + name: tensor.cpu() for name, tensor in tensors.items()}

    def kept(self) -> Part:
        found = {name.removeprefix(KEPT): t for name, t in self.feed.memory.items() if name.startswith(KEPT)}
        return Part(Text(found.pop("ids"), found.pop("mask")), found)


def _widened(parts: list[Tensor], text: Text) -> Tensor:
    """Numbers of sequences [N], or of their tokens [N, S - 1], of several processes as one tensor."""
    if parts[0].ndim == 1:
        return torch.cat(parts)
    width = text.mask.shape[1] - 1
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in parts])
