"""Train one model under one method: read from top to bottom.

A run folder holds metrics.jsonl, checkpoint/ while it runs, then model/ (transformers format, safetensors)
and evaluation.json. Each step's batch depends on the seed and the step alone, so a run that was killed
goes on from its last checkpoint as if nothing had happened, with another number of processes if need be.

Under torchrun every process runs this file in step with the others; the first one writes and evaluates.
"""

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fdiv._divergence import Divergence
from fdiv.adapters.lora import adapted, merged
from fdiv.adapters.trackers import open_trackers
from fdiv.adapters.transformers import CausalLM
from fdiv.averaging import Average
from fdiv.feeds import Counts, Feed, Part, feed_of
from fdiv.methods.distill.sft import SFT
from fdiv.parallel import Spread, World
from fdiv.recipe import Member, Recipe, TrainSpec, measures
from fdiv.teachers._signal import Vocabulary

Report = Callable[[int, int, float | None], None]  # steps done, of how many, loss (None: before training)
CHECKPOINTS = ("checkpoint", "checkpoint.old", "checkpoint.new")  # the two that are whole, and one to be


@dataclass(frozen=True)
class Run:
    """One member of a recipe at one seed, and where it is kept."""

    recipe: Recipe
    seed: int
    folder: Path
    progress: Report = field(default=lambda step, steps, loss: None)

    @property
    def reference_folder(self) -> Path:
        return self.folder / f"seed-{self.seed}" / slug(self.recipe.reference.label)

    def member_folder(self, member: Member) -> Path:
        return self.folder / f"seed-{self.seed}" / member.slug


def slug(label: str) -> str:
    return Member(label, SFT()).slug


def train_reference(run: Run) -> None:
    """Make the teacher or initial policy of a seed, unless it is there."""
    folder, reference = run.reference_folder, run.recipe.reference
    world = World.join((reference.train or run.recipe.train).device)
    if world.agree((folder / "evaluation.json").exists):
        return
    task = run.recipe.parse(run.recipe.task)
    model = task.load(run.recipe.opened(reference.model), run.seed)
    model.model.to(world.device)
    started = time.perf_counter()
    if reference.data and reference.train:
        method = getattr(task, "default_method", SFT())
        feed_of_reference: Any = feed_of(method, task)
        feed = feed_of_reference(method, task, None, reference.train, run.seed, world, data=reference.data)
        model = optimise(model, feed, reference.train, folder, run)
    if world.leads:
        model.save(folder / "model")
        result = task.evaluate(model, model, measures(run.recipe), run.seed)
        seconds = time.perf_counter() - started
        finish(folder, result, run, reference.label, "reference", seconds, model)
    world.wait()


def train_member(run: Run, member: Member) -> None:
    """Train, evaluate and save one member; goes on from a checkpoint, does nothing if all is done."""
    folder, recipe, spec = run.member_folder(member), run.recipe, run.recipe.train
    world = World.join(spec.device)
    if world.agree((folder / "evaluation.json").exists):
        _refuse_another(folder, member)
        return
    torch.set_num_threads(spec.threads)
    task = recipe.parse(recipe.task)
    reference = load_reference(run, task, world.device)
    model = load_student(run, task, world.device)
    started = time.perf_counter()
    if member.method is not None:
        feed = feed_of(member.method, task)(
            member.method,
            task,
            reference,
            spec,
            run.seed,
            world,
            source=recipe.parsed_source(),
            cache=run.reference_folder / "signal",
            progress=run.progress,
        )
        model = optimise(model, feed, spec, folder, run)
    if world.leads:
        model.save(folder / "model")
        # With another vocabulary than its teacher's a student is measured by itself.
        alike = Vocabulary.of(model) == Vocabulary.of(reference)
        told = (reference, measures(recipe)) if alike else (model, {})
        result = task.evaluate(model, *told, run.seed)
        seconds = time.perf_counter() - started
        finish(folder, result, run, member.label, "member", seconds, model, member)
    world.wait()


def _refuse_another(folder: Path, member: Member) -> None:
    method = json.loads((folder / "evaluation.json").read_text())["method"]
    if method != (repr(member.method) if member.method else None):
        raise FileExistsError(
            f"{folder} holds {member.label!r} trained as {method}; give another --out, or delete the folder"
        )


def load_reference(run: Run, task, device: str) -> CausalLM:
    spec = run.recipe.opened(run.recipe.reference.model)
    reference = task.reopen(run.reference_folder / "model", spec, run.seed)
    reference.model.to(device).eval().requires_grad_(False)
    return reference


def load_student(run: Run, task, device: str) -> CausalLM:
    """A fresh student, one cut from the reference, or a copy of the reference."""
    spec = run.recipe.student
    if spec == "reference":
        whole = run.recipe.opened(run.recipe.reference.model)
        student = task.reopen(run.reference_folder / "model", whole, run.seed)
    else:
        student = task.load(run.recipe.opened(spec), 7919 + run.seed, run.reference_folder / "model")
    student.model.to(device).train()
    return student


def optimise(model: CausalLM, feed: Feed, spec: TrainSpec, folder: Path, run: Run) -> CausalLM:
    """AdamW on the feed's losses, with a log line now and then and checkpoints to resume from.

    Returns the trained model, whole and in this process's memory (the first process's, if it was sharded).
    """
    world = feed.world
    folder.mkdir(parents=True, exist_ok=True)
    peft = adapted(model, spec.lora, run.seed) if spec.lora else None
    model.model.train()  # published weights are loaded for evaluation, where nothing is checkpointed
    if spec.gradient_checkpointing:
        network: Any = model.model
        enable = getattr(network, "activation_checkpointing_enable", None)  # its newer name
        (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    alternating = getattr(feed.method, "alternating", False)
    spread = Spread(model.model, spec.parallel, world, beside=feed.attend(model), alternating=alternating)
    if spec.average and spread.sharded:
        raise ValueError("train.average follows whole weights, and fsdp shards them; write parallel: ddp")
    average = Average(model.model, spec.average) if spec.average else None
    optimizer = torch.optim.AdamW(
        spread.parameters(),
        lr=spec.learning_rate,
        betas=spec.betas,
        weight_decay=spec.weight_decay,
        fused=True,
    )
    feed.whole = spread.whole
    start = resume(spread, optimizer, feed, average, folder)
    with closing(Log(folder, run, spec, start)) if world.leads else nullcontext() as log:
        for step in range(start, spec.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spec, step)
            torch.manual_seed(hash((run.seed, step, world.rank)) % 2**63)  # of dropout and of sampled atoms
            parts = spread.look(feed.parts, model, step)
            numbers = accumulate(spread, model, feed, parts)
            norm = spread.clip(spec.clip)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient is {norm.item()} at step {step} of {folder}, with loss {numbers['loss']}; "
                    "nothing was updated. Lower train.learning_rate, or train under a bounded divergence"
                )
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.follow(step)
            done = step + 1
            feed.after_step(model, numbers, done / spec.steps)
            numbers |= {"grad_norm": norm.item(), "lr": learning_rate(spec, step)}
            if spec.validate_every and done % spec.validate_every == 0:
                numbers["validation loss"] = validate(spread, model, feed)
                feed.after_validation(numbers["validation loss"])
            told = done % spec.log_every == 0 or done in (1, spec.steps) or "validation loss" in numbers
            if log and told:
                log.write(done, numbers)
            if done % spec.checkpoint_every == 0 and done < spec.steps:
                checkpoint(spread, optimizer, feed, average, done, folder)
    if average:
        average.settle()
    return whole(model, spread, peft, spec)


def accumulate(spread: Spread, model: CausalLM, feed: Feed, parts: list[Part]) -> dict[str, float]:
    """Gradients of the loss of the global batch, one micro-batch after another; returns loss and metrics."""
    world, batch = feed.world, counts(parts, feed.world)
    numbers: dict[str, float] = defaultdict(float)
    for n, part in enumerate(parts):
        with spread.accumulating(last=n == len(parts) - 1):
            with feed.precision():
                out = spread.run(feed.loss, model, part, batch)
            spread.backward(out.loss)
        numbers["loss"] += out.loss.item()
        share = feed.share(part, batch)
        for name, value in out.metrics.items():  # of nothing, a mean is nan
            numbers[name] += float(value) * share if share else 0.0
    return dict(zip(numbers, world.sum(list(numbers.values())), strict=True))


def counts(parts: list[Part], world: World) -> Counts:
    """Of the global batch, which is counted when its responses have been written."""
    return Counts(*world.sum([sum(column) for column in zip(*(p.counts for p in parts), strict=True)]))


class Log:
    """metrics.jsonl, which is the truth, and the trackers beside it."""

    def __init__(self, folder: Path, run: Run, spec: TrainSpec, start: int):
        self.run, self.steps = run, spec.steps
        self.file = (folder / "metrics.jsonl").open("a", buffering=1)
        config = run.recipe.model_dump(mode="json")
        name = f"{folder.parent.name}/{folder.name}"
        self.trackers = open_trackers(spec.report_to, folder, run.recipe.name, name, config, start_step=start)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step} | numbers) + "\n")
        for tracker in self.trackers:
            tracker.log(step, numbers)
        self.run.progress(step, self.steps, numbers["loss"])

    def close(self) -> None:
        self.file.close()
        for tracker in self.trackers:
            tracker.close()


@torch.no_grad()
def validate(spread: Spread, model: CausalLM, feed: Feed) -> float:
    """The method's loss on text that is not trained on, over all processes."""
    spread.trained.eval()
    parts = spread.look(feed.validation, model)
    batch = counts(parts, feed.world)
    with feed.precision():
        loss = sum(spread.look(feed.loss, model, part, batch).loss.item() for part in parts)
    spread.trained.train()
    return feed.world.sum([loss])[0]


def whole(model: CausalLM, spread: Spread, peft, spec: TrainSpec) -> CausalLM:
    """The trained model with its adapters merged, gathered from its shards in the first process."""
    if spread.sharded:
        weights = spread.everything()
        if not spread.world.leads:
            return model
        network = _like(model.model)
        model = CausalLM(network, model.vocabulary, model.tokenizer)
        peft = adapted(model, spec.lora, 0) if spec.lora else None
        network.load_state_dict(weights, assign=True)
        network.tie_weights()  # which were gathered one by one
        network.to(spread.world.device)
    return model if peft is None else merged(model, peft)


def _like(network: Any) -> Any:
    """A model of this one's architecture, with other weights."""
    made = type(network)(network.config)
    made.generation_config = network.generation_config  # which says where answers end
    return made


def learning_rate(spec: TrainSpec, step: int) -> float:
    if step < spec.warmup:
        return spec.learning_rate * (step + 1) / spec.warmup
    if spec.schedule == "constant":
        return spec.learning_rate
    way = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return spec.learning_rate * (1 + math.cos(math.pi * way)) / 2


def checkpoint(
    spread: Spread,
    optimizer: torch.optim.Optimizer,
    feed: Feed,
    average: Average | None,
    step: int,
    folder: Path,
) -> None:
    """Write checkpoint/ beside the old one and swap them, so that a kill leaves one of the two whole."""
    state = {
        "step": step,
        "weights": spread.weights(),
        "optimizer": spread.moments(optimizer),
        "state": feed.state,
        "memory": feed.memory,
        "average": average.weights if average else {},
    }
    if spread.world.leads:
        current, old, new = (folder / name for name in CHECKPOINTS)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        torch.save(state, new / "state.pt")
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a swap that a kill cut short
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)
    spread.world.wait()


def resume(
    spread: Spread, optimizer: torch.optim.Optimizer, feed: Feed, average: Average | None, folder: Path
) -> int:
    """Load the last checkpoint, if there is one, and drop the log lines after it; returns its step."""
    places = [folder / name / "state.pt" for name in CHECKPOINTS[:2]]
    found = spread.world.agree(lambda: next((place for place in places if place.exists()), None))
    log = folder / "metrics.jsonl"
    if found is None:
        if spread.world.leads:
            log.unlink(missing_ok=True)
        return 0
    state = torch.load(found, weights_only=True, map_location="cpu")
    spread.restore(state["weights"], optimizer, state["optimizer"])
    feed.restore(state["state"], state["memory"])
    if average:
        average.restore(state["average"])
    if spread.world.leads:
        lines = [line for line in log.read_text().splitlines() if _step_of(line) <= state["step"]]
        kept = log.with_suffix(".new")
        kept.write_text("".join(line + "\n" for line in lines))
        kept.replace(log)
    return state["step"]


def _step_of(line: str) -> float:
    """Infinite for a line that a kill has cut short."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def finish(
    folder: Path, result: dict, run: Run, label: str, role: str, seconds: float, model: CausalLM, member=None
) -> None:
    """Write evaluation.json, the mark that a run is done; only now its checkpoint is of no more use."""
    stage = run.recipe.reference.train if member is None else member.method and run.recipe.train
    columns = {divergence: text for text, divergence in measures(run.recipe).items()}
    head = {
        "label": label,
        "slug": folder.name,
        "role": role if member is None or member.divergence is not None else "reference",
        "divergence": _written(member.divergence, columns) if member and member.divergence else None,
        "method": repr(member.method) if member and member.method else None,
        "group": member.group if member else None,
        "parameter": dict([member.parameter]) if member and member.parameter else None,
        "seed": run.seed,
        "seconds": round(seconds, 2),
        "parameters": model.parameters,
        "steps": stage.steps if stage else 0,
    }
    text = json.dumps(head | result, indent=1, allow_nan=True)
    (folder / "evaluation.json.new").write_text(text)
    (folder / "evaluation.json.new").rename(folder / "evaluation.json")
    for name in CHECKPOINTS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _written(divergence: Divergence, columns: dict[Divergence, str]) -> str:
    """As the recipe writes it among its measures, so that the report can pair row and column."""
    return columns.get(divergence, repr(divergence))
