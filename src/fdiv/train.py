"""Train one model under one method: read from top to bottom.

A run folder holds metrics.jsonl, checkpoint/ while it runs, then model/ (transformers format, safetensors)
and evaluation.json. Each step's batch depends on the seed and the step alone, so a run that was killed
goes on from its last checkpoint as if nothing had happened.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from fdiv._divergence import Divergence
from fdiv.adapters.transformers import CausalLM
from fdiv.feeds import FEEDS, Tokens
from fdiv.methods._method import Out
from fdiv.methods.distill.sft import SFT
from fdiv.recipe import Member, Recipe, TrainSpec, measures

Report = Callable[[int, int, float | None], None]  # steps done, of how many, loss (None: before training)


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
    if (folder / "evaluation.json").exists():
        return
    task, device = run.recipe.parse(run.recipe.task), device_of(run.recipe.train)
    model = task.load(reference.model, run.seed)
    model.model.to(device)
    started = time.perf_counter()
    if reference.data and reference.train:
        feed = Tokens(SFT(), task, None, reference.train, run.seed, device, data=reference.data)
        optimise(model, feed, reference.train, folder, run.progress)
    model.save(folder / "model")
    result = task.evaluate(model, model, measures(run.recipe), run.seed)
    finish(folder, result, run, reference.label, "reference", time.perf_counter() - started, model)


def train_member(run: Run, member: Member) -> None:
    """Train, evaluate and save one member; goes on from a checkpoint, does nothing if all is done."""
    folder, recipe, spec = run.member_folder(member), run.recipe, run.recipe.train
    if (folder / "evaluation.json").exists():
        _refuse_another(folder, member)
        return
    torch.set_num_threads(spec.threads)
    task, device = recipe.parse(recipe.task), device_of(spec)
    reference = load_reference(run, task, device)
    model = load_student(run, task, device)
    started = time.perf_counter()
    if member.method is not None:
        kind, shared = FEEDS[member.method.consumes], run.reference_folder / "signal"
        feed = kind(
            member.method, task, reference, spec, run.seed, device, cache=shared, progress=run.progress
        )
        optimise(model, feed, spec, folder, run.progress)
    model.save(folder / "model")
    result = task.evaluate(model, reference, measures(recipe), run.seed)
    finish(folder, result, run, member.label, "member", time.perf_counter() - started, model, member)


def _refuse_another(folder: Path, member: Member) -> None:
    method = json.loads((folder / "evaluation.json").read_text())["method"]
    if method != (repr(member.method) if member.method else None):
        raise FileExistsError(
            f"{folder} holds {member.label!r} trained as {method}; give another --out, or delete the folder"
        )


def load_reference(run: Run, task, device: str) -> CausalLM:
    reference = task.reopen(run.reference_folder / "model", run.recipe.reference.model, run.seed)
    reference.model.to(device).eval().requires_grad_(False)
    return reference


def load_student(run: Run, task, device: str) -> CausalLM:
    """A fresh student, one cut from the reference, or a copy of the reference."""
    spec = run.recipe.student
    if spec == "reference":
        student = task.reopen(run.reference_folder / "model", run.recipe.reference.model, run.seed)
    else:
        student = task.load(spec, 7919 + run.seed, run.reference_folder / "model")
    student.model.to(device).train()
    return student


def optimise(model: CausalLM, feed, spec: TrainSpec, folder: Path, progress: Report) -> None:
    """AdamW on the feed's losses, with a log line now and then and checkpoints to resume from."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=spec.learning_rate, betas=spec.betas, weight_decay=spec.weight_decay, fused=True
    )
    start = resume(model, optimizer, folder)
    device = parameters[0].device.type
    with (folder / "metrics.jsonl").open("a", buffering=1) as log:
        for step in range(start, spec.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spec, step)
            with torch.autocast(device, torch.bfloat16, enabled=spec.precision == "bfloat16"):
                out: Out = feed.step(model, step)
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, spec.clip)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient is {norm.item()} at step {step} of {folder}, with loss {out.loss.item()}; "
                    "nothing was updated. Lower train.learning_rate, or train under a bounded divergence"
                )
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if done % spec.log_every == 0 or done in (1, spec.steps):
                numbers = {"loss": out.loss.item(), "grad_norm": norm.item(), "lr": learning_rate(spec, step)}
                numbers |= {name: float(value) for name, value in out.metrics.items()}
                log.write(json.dumps({"step": done} | numbers) + "\n")
                progress(done, spec.steps, numbers["loss"])
            if done % spec.checkpoint_every == 0 and done < spec.steps:
                log.flush()
                checkpoint(model, optimizer, done, folder)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def learning_rate(spec: TrainSpec, step: int) -> float:
    if step < spec.warmup:
        return spec.learning_rate * (step + 1) / spec.warmup
    if spec.schedule == "constant":
        return spec.learning_rate
    way = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return spec.learning_rate * (1 + math.cos(math.pi * way)) / 2


def checkpoint(model: CausalLM, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    """Write checkpoint/ beside the old one and swap them, so that a kill leaves one of the two whole."""
    new, current = folder / "checkpoint.new", folder / "checkpoint"
    shutil.rmtree(new, ignore_errors=True)
    model.save(new / "model")
    torch.save({"optimizer": optimizer.state_dict(), "step": step}, new / "state.pt")
    shutil.rmtree(current, ignore_errors=True)
    new.rename(current)


def resume(model: CausalLM, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load the last checkpoint, if there is one, and drop the log lines after it; returns its step."""
    found = folder / "checkpoint" if (folder / "checkpoint").exists() else folder / "checkpoint.new"
    log = folder / "metrics.jsonl"
    if not (found / "state.pt").exists():
        log.unlink(missing_ok=True)
        return 0
    state = torch.load(found / "state.pt", weights_only=True)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((found / "model").glob("*.safetensors")):
        weights |= load_file(file)
    missing, unexpected = model.model.load_state_dict(weights, strict=False)
    tied = set(getattr(model.model, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise ValueError(f"{found} does not fit the model: missing {missing}, unexpected {unexpected}")
    optimizer.load_state_dict(state["optimizer"])
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= state["step"]]
    log.write_text("".join(line + "\n" for line in lines))
    return state["step"]


def finish(
    folder: Path, result: dict, run: Run, label: str, role: str, seconds: float, model: CausalLM, member=None
) -> None:
    """Write evaluation.json, the mark that a run is done."""
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


def _written(divergence: Divergence, columns: dict[Divergence, str]) -> str:
    """As the recipe writes it among its measures, so that the report can pair row and column."""
    return columns.get(divergence, repr(divergence))


def device_of(spec: TrainSpec) -> str:
    if spec.device != "auto":
        return spec.device
    return "cuda" if torch.cuda.is_available() else "cpu"
