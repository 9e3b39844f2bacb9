"""The command line: compare, train, report, list."""

import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import click
import typer
from rich.console import Console
from rich.table import Table

from fdiv.catalogue import rows as catalogue_rows
from fdiv.recipe import RecipeError
from fdiv.teachers._signal import TeacherError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Recipes = Annotated[list[Path], typer.Argument(help="recipe files (YAML), a chapter of the report each")]
Out = Annotated[Path, typer.Option(help="folder for runs and report")]
Set = Annotated[list[str] | None, typer.Option("--set", help="override a key, --set train.steps=100")]

# compare and train import transformers, and the report matplotlib: seconds that `fdiv list` and a typing
# error need not wait for. These are the package's only imports inside functions.


@app.command()
def compare(
    recipes: Recipes,
    out: Out = Path("runs/compare"),
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="members trained side by side; none: 1, or all that Ray has room for"),
    ] = None,
    on: Annotated[Literal["here", "ray"], typer.Option(help="this machine, or a Ray cluster")] = "here",
    set_: Set = None,
) -> None:
    """Which divergence should I use here? Train under each, evaluate all alike, write a report."""
    from fdiv.compare import compare as run

    pool = _cluster(jobs) if on == "ray" else None
    folders, failures = run(recipes, out, jobs or 1, _overrides(set_), pool)
    _write_report(folders, out / "report.html")
    if failures:
        raise typer.Exit(1)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe file (YAML)")],
    out: Out = Path("runs/train"),
    set_: Set = None,
) -> None:
    """Train the recipe's own method, without its list of divergences; then report."""
    from fdiv.compare import compare as run

    alone = {"divergences": "[]", "baselines": "[]", "sweep": "null"}
    folders, failures = run([recipe], out, 1, alone | _overrides(set_))
    _write_report(folders, out / "report.html")
    if failures:
        raise typer.Exit(1)


@app.command()
def cache(
    recipe: Annotated[Path, typer.Argument(help="a recipe file (YAML)")],
    out: Annotated[Path, typer.Option(help="folder of the cache, for reference.source: Cached(folder)")],
    k: Annotated[int | None, typer.Option(min=1, help="keep the k likeliest tokens")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="keep this many drawn tokens")] = None,
    hidden: Annotated[bool, typer.Option("--hidden", help="keep hidden states and the head")] = False,
    half: Annotated[bool, typer.Option("--half", help="keep log-probabilities in float16")] = False,
    runs: Annotated[Path, typer.Option(help="folder of runs, where the teacher is or will be")] = Path(
        "runs/compare"
    ),
    set_: Set = None,
) -> None:
    """Keep what the teacher says about the training text; by default what the recipe's method reads of it."""
    from fdiv.teachers.of_recipe import Kept, written

    kept = Kept(k, samples, hidden, "float16" if half else "float32")
    for folder, manifest in written(recipe, out, runs, kept, _overrides(set_)):
        console.print(f"[bold]{folder}[/bold]: {manifest.summary}", highlight=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="chapter folders, or folders of chapters")],
    out: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("report.html"),
) -> None:
    """One self-contained HTML page from finished (or unfinished) runs."""
    folders = [chapter for run in runs for chapter in _chapters(run)]
    _write_report(folders, out)


@app.command("list")
def list_() -> None:
    """The divergences: formula, scale, bound and character."""
    table = Table(box=None, header_style="bold")
    table.add_column("divergence", no_wrap=True)
    table.add_column("D(p, q)", ratio=1)
    for name in ("f''(1)", "bound", "character"):
        table.add_column(name, no_wrap=True)
    for row in catalogue_rows():
        table.add_row(*row)
    console.print(table)
    console.print(
        "\np is what you want, q what you have. Weighted sums and `.reverse` work: 0.5 * KL() + TV()"
    )


def main() -> None:
    """Entry point: errors in recipes are a sentence, not a traceback; Ctrl-C leaves runs to be resumed."""
    try:
        code = app(standalone_mode=False)  # what a command returns, or the code of its typer.Exit
    except (KeyboardInterrupt, click.Abort):
        code = 130
    except (RecipeError, TeacherError, FileNotFoundError, FileExistsError, ImportError) as error:
        _fail(str(error), 2)
    except click.ClickException as error:  # a wrong option or argument
        error.show()
        sys.exit(error.exit_code)
    if code == 130:
        _fail("interrupted; the same command goes on where this one stopped", 130)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"[bold]fdiv:[/bold] {message}", highlight=False)
    sys.exit(code)


def _cluster(jobs: int | None):
    from fdiv.adapters.ray import Cluster

    return Cluster(jobs)


def _write_report(folders: list[Path], out: Path) -> None:
    from fdiv.evaluate.report import write_report
    from fdiv.evaluate.terminal import terminal_table
    from fdiv.parallel import World

    if not World.join().leads:
        return

    page = write_report(folders, out)
    console.print(terminal_table(folders))
    console.print(f"report: [bold]{page}[/bold]")


def _chapters(folder: Path) -> list[Path]:
    if (folder / "recipe.json").exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/recipe.json"))
    if not found:
        raise FileNotFoundError(f"no runs in {folder}: a chapter folder holds a recipe.json")
    return found


def _overrides(texts: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or []]
    for key, separator, _ in pairs:
        if not separator:
            raise RecipeError(f"--set takes key=value, got {key!r}")
    return {key: value for key, _, value in pairs}
