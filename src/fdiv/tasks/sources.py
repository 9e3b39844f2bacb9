"""Documents and records from where they lie: Python's own manual, local files and folders, the hub."""

import csv
import hashlib
import importlib
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

TABLES = (".jsonl", ".parquet", ".csv")  # a row is a record
SUFFIXES = (".txt", ".md", *TABLES)


def documents(source: str, column: str, limit: int | None = None) -> list[str]:
    """The texts of `source` in a fixed order, at most `limit`, without the empty ones.

    "pydoc": the topics of Python's help(), which differ a little between versions. A .txt or .md file is a
    document; anything else is records, see `records`, whose field `column` is one.
    """
    rows = ({column: topics[name]} for name in sorted(topics)) if source == "pydoc" else _rows(source, column)
    texts = (_text(row, column, source) for row in rows)
    return list(islice((text for text in texts if text.strip()), limit))


def records(source: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The records of `source` in a fixed order, at most `limit`.

    A .jsonl, .parquet or .csv file; a folder of them, by name; a folder that `datasets` saved; or a data set
    of the hub, "owner/name", "owner/name:configuration" or "owner/name:configuration:split" (default: train);
    or puzzles, "reasoning_gym:NAME?option=value", see fdiv.tasks.reasoning.
    """
    return list(islice(_rows(source, None), limit))


def separate(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """(training, held-out) documents, both in the order given; equal documents stay on one side."""
    unique = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(unique) == 1:
        cut = round(len(unique[0]) * (1 - fraction))
        return [unique[0][:cut]], [unique[0][cut:]]
    wanted, taken, held = fraction * sum(map(len, unique)), 0, set()
    for text in unique[:-1]:
        if taken + len(text) / 2 < wanted or not held:
            held.add(text)
            taken += len(text)
    return [t for t in texts if t not in held], [t for t in texts if t in held]


def _rows(source: str, column: str | None) -> Iterator[dict[str, Any]]:
    """column: the field that a document is told as; None where a document is no record."""
    if source.startswith("reasoning_gym:"):
        return iter(importlib.import_module("fdiv.tasks.reasoning").puzzles(source))
    path, suffixes = Path(source), SUFFIXES if column else TABLES
    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return iter(_saved(path))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes)
        return (row for file in files for row in _file(file, column))
    if path.suffix in (*SUFFIXES, ".json") or path.is_absolute() or source.startswith("."):
        if not path.is_file() or path.suffix not in suffixes:
            raise FileNotFoundError(f"no text at {source}: give a folder, or a {', '.join(suffixes)} file")
        return _file(path, column)
    return _hub(source)


def _file(path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        batches = _optional("pyarrow.parquet").ParquetFile(path).iter_batches()
        return (row for batch in batches for row in batch.to_pylist())
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return (json.loads(line) for line in text.split("\n") if line.strip())
    if path.suffix == ".csv":
        return iter(csv.DictReader(io.StringIO(text, newline="")))
    return iter([{column or "": text}])


def _saved(path: Path) -> Any:
    found = _optional("datasets").load_from_disk(str(path))
    if not isinstance(found, dict):
        return found
    if "train" not in found:
        raise ValueError(f"{path} has no split train; give the folder of one of {sorted(found)}")
    return found["train"]


def _hub(source: str) -> Iterator[dict[str, Any]]:
    name, configuration, split = (*source.split(":"), "", "")[:3]
    return iter(
        _optional("datasets").load_dataset(
            name, configuration or None, split=split or "train", streaming=True
        )
    )


def _text(record: dict, column: str, where: str) -> str:
    if not isinstance(record.get(column), str):
        texts = [name for name, value in record.items() if isinstance(value, str)]
        raise ValueError(
            f"{where} has no text field {column!r}; write Corpus(column=...) with one of {texts}"
        )
    return record[column]


def _optional(module: str) -> ModuleType:
    """Imported when it is needed: it takes a second, and most corpora do without."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f'{module} is not installed: pip install "fdiv[data]"') from None
