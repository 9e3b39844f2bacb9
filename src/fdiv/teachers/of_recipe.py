"""What `fdiv cache` does: the text that a recipe trains on, read by its teacher, into a cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fdiv.compare import Job, describe, work
from fdiv.estimate._estimator import Estimator
from fdiv.estimate.fused_atoms import FusedAtoms
from fdiv.estimate.fused_linear import FusedLinear
from fdiv.estimate.sampled_logits import SampledLogits
from fdiv.estimate.top_k import TopK
from fdiv.parallel import World
from fdiv.recipe import RecipeError, load
from fdiv.sample._sampler import Steered
from fdiv.sample.fixed import Mix
from fdiv.tasks._task import Text
from fdiv.tasks.prompting import unseen
from fdiv.teachers._columns import Precision
from fdiv.teachers._format import Manifest
from fdiv.teachers._signal import described
from fdiv.teachers.local import Local
from fdiv.teachers.write import write_cache
from fdiv.train import Run, load_reference

READ_TOKENS = 16384  # that the teacher is asked about at once


@dataclass(frozen=True)
class Kept:
    """What of a teacher is kept: at most one; none of them: what the recipe's own estimator reads."""

    k: int | None = None
    samples: int | None = None
    hidden: bool = False
    precision: Precision = "float32"

    def estimator(self, method: Any) -> Estimator:
        chosen = [self.k is not None, self.samples is not None, self.hidden]
        if sum(chosen) > 1:
            raise RecipeError("give one of --k, --samples and --hidden")
        if self.k is not None:
            return FusedAtoms(TopK(self.k))
        if self.samples is not None:
            return FusedAtoms(SampledLogits(self.samples, "teacher"))
        if self.hidden:
            return FusedLinear()
        found = getattr(method, "estimator", None)
        if isinstance(found, FusedAtoms | FusedLinear):
            return found
        raise RecipeError(
            f"the recipe's estimator {found!r} reads every log-probability of a token, which is too much to "
            "keep; write estimator=FusedAtoms(TopK(64)) in its method, or give --k 64, --samples 50 or "
            "--hidden"
        )


def written(
    path: Path, out: Path, runs: Path, kept: Kept, overrides: dict[str, str] | None = None
) -> list[tuple[Path, Manifest]]:
    """The cache of each teacher of the recipe, in a subfolder of its own; seeds may share a teacher."""
    recipe = load(path, overrides)
    method = recipe.parse(recipe.method)
    _require_fixed(method)
    estimator, temperature = kept.estimator(method), getattr(method, "temperature", 1.0)
    describe(recipe, runs / recipe.name)
    done: dict[Path, Manifest] = {}
    for seed in recipe.seeds:
        folder = runs / recipe.name
        work(Job(path.resolve(), tuple((overrides or {}).items()), folder, seed, None), lambda news: None)
        reference, texts = reference_and_texts(Run(recipe, seed, folder), method)
        teacher = Local().open(estimator, temperature, reference)
        folder = out / f"teacher-{teacher.terms.model[:12]}"
        with _bar(f"seed {seed}: {described(teacher.terms.support)}", texts) as progress:
            batches = (part for text in texts for part in _parts(text))
            done[folder] = write_cache(teacher, batches, folder, precision=kept.precision, progress=progress)
    return list(done.items())


def reference_and_texts(run: Run, method: Any) -> tuple[Any, list[Text]]:
    """The teacher of a run, which is trained, and the fixed text that training asks it about."""
    task, spec, seed = run.recipe.parsed_task(), run.recipe.train, run.seed
    reference = load_reference(run, task, World.join(spec.device).device)

    def drawn(step: int, count: int) -> Text:  # as feeds.Feed.generator does
        draw = task.responses if step == -1 else partial(unseen, task)
        return draw(reference, count, torch.Generator().manual_seed(1_000_003 * (seed + 1) + step))

    texts = [drawn(-1, spec.examples)]
    return reference, texts + ([drawn(-2, spec.validate_on)] if spec.validate_every else [])


def _require_fixed(method: Any) -> None:
    """Raise RecipeError unless the teacher is asked about the task's own text alone, and stays what it is."""
    if getattr(method, "consumes", None) != "responses":
        raise RecipeError(f"{method!r} asks no teacher about text; write GKD(), say")
    sampler: Any = getattr(method, "sampler", None) or Mix(getattr(method, "lmbda", 0.0))
    steered = isinstance(sampler, Steered)  # its writer changes as it trains
    if steered or {sampler.writer(u, 0.0, {}) for u in (0.0, 1 - 1e-9)} != {"data"}:
        raise RecipeError(
            f"{sampler!r} has text written while it trains, of which nothing can be kept before; write "
            "lmbda=0 or sampler=Offline(), or ask the teacher itself: source: Local()"
        )
    if getattr(method, "ema", 0.0) or getattr(method, "context", "same") != "same":
        raise RecipeError(
            f"the teacher of {method!r} follows the student, or reads more than it; ask it itself: "
            "source: Local()"
        )


@contextmanager
def _bar(label: str, texts: list[Text]) -> Iterator[Callable[[int, Manifest], None]]:
    """A progress bar over sequences that also says how large a token is."""
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.fields[size]}"))
    with Progress(TextColumn("{task.description}"), *columns, TimeElapsedColumn()) as bars:
        line = bars.add_task(label, total=sum(len(text.ids) for text in texts), size="")

        def show(done: int, manifest: Manifest) -> None:
            size = f"{manifest.bytes_per_token:.0f} B a token" if manifest.tokens else ""
            bars.update(line, completed=done, size=size)

        yield show


def _parts(text: Text) -> Iterator[Text]:
    size = max(1, READ_TOKENS // text.ids.shape[1])
    for ids, mask in zip(text.ids.split(size), text.mask.split(size), strict=True):
        yield Text(ids, mask)
