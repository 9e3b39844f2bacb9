"""Writes docs/api.md, the reference, from the names that fdiv exports."""

from itertools import groupby
from pathlib import Path
from types import ModuleType

import fdiv

PAGE = Path(__file__).with_name("api.md")
HEAD = "# Reference\n\nEverything here is imported from `fdiv` itself: `fdiv.KL`.\n"


def main() -> None:
    public = {k: v for k, v in vars(fdiv).items() if not k.startswith("_")}
    objects = {k: v for k, v in public.items() if getattr(v, "__module__", "").startswith("fdiv.")}
    modules = [
        k
        for k, v in public.items()
        if isinstance(v, ModuleType) and is_exported(k) and v.__name__ == f"fdiv.{k}"
    ]

    page = HEAD
    names = sorted(objects, key=lambda name: (chapter(objects[name]), name))
    for title, members in groupby(names, key=lambda name: chapter(objects[name])):
        page += f"\n## {title}\n"
        page += "".join(f"\n::: {objects[name].__module__}.{name}\n" for name in members)
    for name in sorted(modules):
        page += f"\n## fdiv.{name}\n\n::: fdiv.{name}\n"

    PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE.name}: {len(objects)} names and {len(modules)} modules")


def chapter(member: object) -> str:
    """The folder a member lives in; what lives in none is the core."""
    parts = member.__module__.split(".")
    return parts[1].capitalize() if len(parts) > 2 else "Core"


def is_exported(name: str) -> bool:
    """Whether fdiv says `import name as name`: vars() also holds folders merely imported."""
    source = Path(fdiv.__file__).read_text(encoding="utf-8")
    return f" import {name} as {name}\n" in source


if __name__ == "__main__":
    main()
