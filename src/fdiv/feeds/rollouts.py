"""Groups of answers that the policy has just sampled, judged by the task."""

import inspect
from typing import Any

import torch
from torch import Tensor

from fdiv.adapters.transformers import CausalLM
from fdiv.feeds._feed import Counts, Feed, Part, boxed
from fdiv.feeds.groups import Groups
from fdiv.feeds.memory import Follower
from fdiv.feeds.rehearsal import Rehearsed
from fdiv.methods._method import Adaptive, Out

OF_ANSWERS = (
    "advantage",
    "reward",
    "correct",
    "group",
    "parent",
    "branch",
    "log_target",
    "log_partition",
)


class Rollouts(Feed):
    """`group_size` answers to each of batch_size / group_size prompts, used for `reuse` steps."""

    reuses = True

    def prepare(self, generator: torch.Generator) -> None:
        self.require_local()
        method, self.now = self.method, 0.0
        self.reads = frozenset(getattr(method, "reads", ("advantage",)))
        self.estimator: Any = getattr(method, "estimator", None) if getattr(method, "beta", 1) else None
        self.state = method.initial_state() if isinstance(method, Adaptive) else {}
        rehearsal = getattr(method, "rehearsal", None)
        self.rehearsed = Rehearsed(self.memory, rehearsal) if rehearsal else None
        lagged = getattr(method, "proposal", "policy") == "lagged"
        self.proposal = Follower(self.reference, 1.0, self.memory, self.world) if lagged else None
        self.written = Groups(self)
        self.batch_value = 0.0
        self.none: dict[str, Tensor] = {}  # of no answer at all
        self._check()

    def _check(self) -> None:
        spec = self.spec
        if spec.batch_size % spec.group_size:
            raise ValueError(
                f"a batch_size of {spec.batch_size} is no whole number of groups of group_size "
                f"{spec.group_size}"
            )
        if self.whole_groups and (spec.micro_batch or 0) % spec.group_size:
            raise ValueError(
                f"{self.method!r} compares the answers of a group: micro_batch is a multiple of group_size "
                f"{spec.group_size}, got {spec.micro_batch}"
            )
        if self.groups % self.world.size:
            raise ValueError(
                f"{self.groups} groups (batch_size {spec.batch_size} / group_size {spec.group_size}) cannot "
                f"be shared evenly by {self.world.size} processes"
            )
        if branching := getattr(self.method, "branching", None):
            branching.check(spec.group_size)
        if spec.validate_every:
            raise ValueError(
                f"{self.method!r} has no loss on text that it did not sample; leave out validate_every"
            )

    @property
    def whole_groups(self) -> bool:
        return getattr(self.method, "unit", "sequence") == "group"

    @property
    def groups(self) -> int:
        return self.spec.batch_size // self.spec.group_size

    def attend(self, model: CausalLM) -> torch.nn.Module | None:
        whole = not self.spec.lora and (self.world.size == 1 or self.spec.parallel == "ddp")
        if self.proposal and not (whole and self.proposal.fits(model)):
            raise ValueError(
                "a lagged proposal follows the student's own weights, whole: student: reference, parallel: "
                "ddp, and no LoRA; or write proposal='policy'"
            )
        adapted = bool(self.spec.lora)  # under other names, but no other function at the start
        if self.rehearsed and not adapted and model.fingerprint() != self.reference.fingerprint():
            raise ValueError(
                f"{self.method!r} rehearses what the policy could do at the start, which the reference "
                "tells: write student: reference"
            )
        return super().attend(model)

    # -- batches ------------------------------------------------------------------------------------------

    def parts(self, model: CausalLM, step: int) -> list[Part]:
        self.now = self.progress_at(step)
        if self.rehearsed:
            self.rehearsed.ask(self)
        first = step - step % self.spec.reuse
        if step == first:
            part = self.written.now(model, self.generator(first))
            if self.spec.reuse > 1:
                self.written.keep(part)
        else:
            part = self.written.kept()
        parts = self.mine(part)
        self.none = {name: tensor[:0] for name, tensor in part.more.items()}
        if "batch_value" in self.reads:
            self.batch_value = self._surveyed(model, parts)
        return parts if self.rehearsed is None else [*parts, *self._stored(self.generator(step))]

    def _stored(self, generator: torch.Generator) -> list[Part]:
        """Micro-batches of the answers that are rehearsed beside the rollouts."""
        assert self.rehearsed is not None
        text, log_p = self.rehearsed.drawn(generator, self.world.size)
        return self.mine(Part(text, {"log_initial": log_p})) if len(text.ids) else []

    @torch.no_grad()
    def _surveyed(self, model: CausalLM, parts: list[Part]) -> float:
        """The mean of the method's survey over all tokens, before any of them is differentiated."""
        total = tokens = 0.0
        for part in parts:
            with self.precision():
                boxes = self._boxes(model, part)
            mask = part.text.mask[:, 1:].to(self.device)
            names = inspect.signature(self.method.survey).parameters
            values = self.method.survey(**{name: boxes[name] for name in names})
            total += float(torch.where(mask, values, 0.0).sum())
            tokens += float(mask.sum())
        total, tokens = self.world.sum([total, tokens])
        return total / max(tokens, 1.0)

    # -- what the method reads ----------------------------------------------------------------------------

    def share(self, part: Part, batch: Counts) -> float:
        """Metrics are means over tokens, of the rollouts or of what is rehearsed."""
        if "log_initial" in part.more:
            return part.counts.p_tokens / max(batch.p_tokens, 1)
        return super().share(part, batch)

    def loss(self, model: CausalLM, part: Part, batch: Counts) -> Out:
        boxes = self._boxes(model, part)
        entropy = boxes.pop("entropy")
        if self.rehearsed:
            boxes |= _apart(boxes, part) | {"stored_count": batch.p_tokens}
            part = Part(part.text.rows(slice(0, 0)), self.none) if "log_initial" in part.more else part
        menu = boxes | self._of_answers(part) | {"batch_value": self.batch_value}
        menu |= {"sequences": batch.sequences, "groups": batch.sequences / self.spec.group_size}
        menu |= {"progress": self.now, "state": self.state}
        missing = self.reads - menu.keys()
        if missing:
            raise TypeError(f"{self.method!r} reads {sorted(missing)}, which {self.task!r} cannot tell")
        always = ("log_policy", "log_behaviour", "mask")
        asked = {name: menu[name] for name in (*always, *self._evidence_names(), *self.reads)}
        out = self.method(**asked, count=batch.tokens)
        return Out(out.loss, self._rewards(part, batch) | out.metrics | entropy)

    def _evidence_names(self) -> set[str]:
        names = set(self.estimator.evidence) if self.estimator else set()
        return names - {"log_behaviour"}

    def _boxes(self, model: CausalLM, part: Part) -> dict[str, Any]:
        """Of each token, [B, T] or [B, T, V]: what the policy, and who wrote it, and the reference think."""
        ids, mask = self.on_device(part.text)
        found: dict[str, Any] = {"mask": mask[:, 1:]}
        if self.estimator and self.estimator.sees == "logits":
            policy, chosen = model.log_softmax(ids, mask), model.labels(ids, mask).unsqueeze(-1)
            with torch.no_grad():
                found["log_p"] = boxed(self.reference.log_softmax(ids, mask), mask)
            found |= {"log_q": boxed(policy, mask), "entropy": torch.special.entr(policy.exp()).sum(-1)}
            found["log_policy"] = boxed(policy.gather(-1, chosen).squeeze(-1), mask)
        else:
            log_prob, found["entropy"] = model.scored(ids, mask)
            found["log_policy"] = found["log_q"] = boxed(log_prob, mask)
            if self.estimator or "log_p" in self.reads:
                with torch.no_grad():
                    found["log_p"] = boxed(self.reference.token_log_probs(ids, mask), mask)
        found["log_behaviour"] = part.more.get("log_behaviour", found["log_policy"].detach()).to(self.device)
        # The metric is of rollouts, and there for any of them: processes add up numbers of the same names.
        told = "log_initial" not in part.more
        found["entropy"] = {"entropy": found["entropy"].detach().mean()} if told else {}
        return found

    def _of_answers(self, part: Part) -> dict[str, Tensor]:
        found = {name: part.more[name].to(self.device) for name in OF_ANSWERS if name in part.more}
        if len(found.get("group", ())):
            found["group"] = found["group"] - found["group"][0]
        return found

    def after_step(self, model: CausalLM, metrics: dict[str, float], progress: float) -> None:
        if isinstance(self.method, Adaptive):
            self.state = self.state | self.method.advance(self.state, metrics, progress)
        if self.proposal and self.state.get("adopt"):
            self.proposal.follow(model)

    def _rewards(self, part: Part, batch: Counts) -> dict[str, Tensor]:
        """A mean over sequences, where the other metrics are over tokens, and are weighted so."""
        if "reward" not in part.more:
            return {}
        return {"reward": part.more["reward"].sum() / (batch.sequences * self.share(part, batch) or 1.0)}


def _apart(boxes: dict[str, Any], part: Part) -> dict[str, Any]:
    """A micro-batch has rollouts or rehearsed answers: the other is there and empty."""
    none = {name: box[:0] for name, box in boxes.items()}
    if "log_initial" not in part.more:
        stored = {"stored_log_policy": none["log_policy"], "stored_log_initial": none["log_policy"].detach()}
        return stored | {"stored_mask": none["mask"]}
    log_initial = part.more["log_initial"].to(boxes["mask"].device)
    stored = {"stored_log_policy": boxes["log_policy"], "stored_log_initial": log_initial}
    return none | stored | {"stored_mask": boxes["mask"]}
