"""Writes docs/gallery.md: runs every examples/plot_*.py and shows its picture with what its head says.

A picture that is newer than its example is kept. `python docs/generate_gallery.py NAME` makes it alone.
"""

import ast
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
EXAMPLES, PICTURES, PAGE = DOCS.parent / "examples", DOCS / "gallery", DOCS / "gallery.md"

HEAD = """\
# Gallery

This page is written by `docs/generate_gallery.py` from `examples/plot_*.py`; do not edit it. Each example
is one file, takes the folder of its picture as its argument, and prints the numbers behind it.
"""
ENTRY = """
## {title}

{about}

![{title}](gallery/{name}.png)

`python examples/plot_{name}.py`
"""


def picture_of(example: Path) -> Path:
    return PICTURES / f"{example.stem.removeprefix('plot_')}.png"


def draw(example: Path) -> None:
    """The example's picture, unless there is one that is newer than the example."""
    picture = picture_of(example)
    if not picture.exists() or picture.stat().st_mtime < example.stat().st_mtime:
        print(f"drawing {picture.name}", flush=True)
        subprocess.run([sys.executable, str(example), str(PICTURES)], check=True, stdout=subprocess.DEVNULL)
    if not picture.exists():
        raise FileNotFoundError(f"{example} writes {picture.name} into the folder it is given, and did not")


def entry(example: Path) -> str:
    """The section of an example: its docstring is a title, a line under it, and text."""
    title, _, about = (ast.get_docstring(ast.parse(example.read_text())) or "").partition("\n")
    about = about.lstrip("=-\n").strip()
    return ENTRY.format(title=title.strip(), about=about, name=picture_of(example).stem)


def main(*names: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    examples = sorted(EXAMPLES.glob("plot_*.py"))
    for example in examples:
        if not names or picture_of(example).stem in names:
            draw(example)
    PAGE.write_text(HEAD + "".join(entry(example) for example in examples if picture_of(example).exists()))


if __name__ == "__main__":
    main(*sys.argv[1:])
