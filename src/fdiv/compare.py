"""Run every member and seed of one or more recipes, side by side, and write the report."""

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import fdiv
from fdiv.parallel import World
from fdiv.pools import Pool, Processes
from fdiv.recipe import Member, Recipe, RecipeError, load, members
from fdiv.train import Run, train_member, train_reference

News = tuple[str, int, int, float | None]  # run, step, steps, loss (None: before training)
Tell = Callable[[News], None]


@dataclass(frozen=True)
class Job:
    """What a worker process is sent: all plain data."""

    recipe: Path
    overrides: tuple[tuple[str, str], ...]
    folder: Path
    seed: int
    member: str | None  # None: the reference of the seed

    @property
    def name(self) -> str:
        return f"{self.folder.name}, seed {self.seed}: {self.member or 'reference'}"


def compare(
    recipes: list[Path],
    out: Path,
    jobs: int = 1,
    overrides: dict[str, str] | None = None,
    pool: Pool | None = None,
) -> tuple[list[Path], list[str]]:
    """Train what is not trained yet, at most `jobs` at a time; returns chapter folders and failures.

    pool: what works on them in place of `jobs` processes of this machine, a Ray cluster say.

    Finished members are kept and unfinished ones resumed, so a run that was interrupted is started again
    with the same command.
    """
    loaded = [load(path, overrides) for path in recipes]
    folders = [out / recipe.name for recipe in loaded]
    if len(set(folders)) < len(folders):
        raise ValueError(f"two recipes have the same name: {[r.name for r in loaded]}")
    world = World.join(loaded[0].train.device)
    if world.size > 1 and (jobs > 1 or pool):
        raise RecipeError(
            "the processes of torchrun train one member after another: leave out --jobs and --on"
        )
    if world.leads:
        for recipe, folder in zip(loaded, folders, strict=True):
            describe(recipe, folder)
    world.wait()
    options = tuple((overrides or {}).items())
    plan = [
        Job(path.resolve(), options, folder, seed, None)
        for path, recipe, folder in zip(recipes, loaded, folders, strict=True)
        for seed in recipe.seeds
    ]
    waiting = {job: [_member_job(job, m) for m in members(r)] for job, r in _with_recipes(plan, loaded)}
    failures = execute(plan, waiting, jobs, pool)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return folders, failures


def execute(plan: list[Job], waiting: dict[Job, list[Job]], jobs: int, pool: Pool | None = None) -> list[str]:
    """References first; as each is done, the members of its seed. Returns what failed, and why."""
    total = len(plan) + sum(len(rows) for rows in waiting.values())
    with Board(total) as board:
        if jobs == 1 and pool is None:
            return in_turn(plan, waiting, board)
        return side_by_side(plan, waiting, pool or Processes(jobs), board)


def in_turn(plan: list[Job], waiting: dict[Job, list[Job]], board: "Board") -> list[str]:
    """One after another, in this process."""
    failures = []
    for reference in plan:
        for job in [reference, *waiting[reference]]:
            try:
                work(job, board.show)
                board.done(job)
            except Exception as error:  # one member's failure must not lose the others
                if World.join().size > 1:  # but other processes may be waiting for this one
                    raise
                failures.append(f"{job.name}: {error}")
                board.done(job, 1 + len(waiting[reference]) if job == reference else 1)
                if job == reference:
                    break
    return failures


def side_by_side(plan: list[Job], waiting: dict[Job, list[Job]], pool: Pool, board: "Board") -> list[str]:
    """As many at a time as the pool has room for."""
    failures, left = [], set(plan)
    with pool:
        for reference in plan:
            pool.start(work, reference)
        while left:
            ended = pool.done()
            for news in pool.news():
                board.show(news)
            for job, error in ended:
                left.remove(job)
                rest = waiting.get(job, [])
                if error:
                    failures.append(f"{job.name}: {error}")
                    board.done(job, 1 + len(rest))
                    continue
                board.done(job)
                for member in rest:
                    pool.start(work, member)
                left |= set(rest)
    return failures


def work(job: Job, tell: Tell) -> None:
    """Train one member, or the reference of a seed."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # ours says more
    transformers.utils.logging.set_verbosity_error()
    recipe = load(job.recipe, dict(job.overrides))
    run = Run(recipe, job.seed, job.folder, lambda *numbers: tell((job.name, *numbers)))
    if job.member is None:
        torch.set_num_threads((recipe.reference.train or recipe.train).threads)
        train_reference(run)
    else:
        train_member(run, next(m for m in members(recipe) if m.label == job.member))


def describe(recipe: Recipe, folder: Path) -> None:
    """Write what is going to be run; refuse a folder that holds a different recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    kept = folder / "recipe.yaml"
    if kept.exists() and _trained(kept.read_text()) != _trained(resolved):
        raise FileExistsError(
            f"{folder} holds runs of another version of this recipe; give another --out, or delete it"
        )
    kept.write_text(resolved)
    report = recipe.report.model_dump(mode="json")
    baselines = [b.label for b in recipe.baselines]
    head = {"name": recipe.name, "kind": recipe.parse(recipe.method).consumes}
    head |= {"references": [recipe.reference.label, *baselines]}
    head |= {"order": [m.label for m in members(recipe)]}
    (folder / "recipe.json").write_text(json.dumps(head | report, indent=1))
    (folder / "environment.json").write_text(json.dumps(environment(recipe), indent=1))


def environment(recipe: Recipe) -> dict:
    return {
        "fdiv": fdiv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "seeds": recipe.seeds,
        "threads": recipe.train.threads,
        "command": " ".join(["fdiv", *sys.argv[1:]]),
    }


def _trained(text: str) -> dict:
    """The part of a resolved recipe that every member depends on: members and seeds may be added."""
    free = ("report", "seeds", "divergences", "baselines", "sweep")
    found = {k: v for k, v in yaml.safe_load(text).items() if k not in free}
    found.get("train", {}).pop("report_to", None)
    found.get("reference", {}).pop("source", None)
    return found


def _with_recipes(plan: list[Job], loaded: list[Recipe]) -> list[tuple[Job, Recipe]]:
    named = {recipe.name: recipe for recipe in loaded}
    return [(job, named[job.folder.name]) for job in plan]


def _member_job(job: Job, member: Member) -> Job:
    return Job(job.recipe, job.overrides, job.folder, job.seed, member.label)


class Board:
    """The progress bars: all runs, and a line for each that is at work."""

    def __init__(self, total: int):
        columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        silent = not World.join().leads
        self.bars = Progress(TextColumn("{task.description}"), *columns, disable=silent)
        self.all = self.bars.add_task("runs", total=total)
        self.lines: dict[str, TaskID] = {}

    def __enter__(self) -> "Board":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def show(self, news: News) -> None:
        name, step, steps, loss = news
        if name not in self.lines:
            self.lines[name] = self.bars.add_task(name, total=steps)
        doing = "asking the reference" if loss is None else f"loss {loss:.3g}"
        self.bars.update(self.lines[name], completed=step, total=steps, description=f"{name} ({doing})")

    def done(self, job: Job, runs: int = 1) -> None:
        self.bars.advance(self.all, runs)
        if job.name in self.lines:
            self.bars.remove_task(self.lines.pop(job.name))
