"""Documents from where they lie: Python's own manual, local files and folders, the hub."""

import importlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


def documents(source: str, column: str, limit: int | None = None) -> list[str]:
    """The texts of `source` in a fixed order, at most `limit`, without the empty ones.

    "pydoc": the topics of Python's help(), which differ a little between versions. A path: a .txt or .md
    file is a document, a row of a .jsonl or .parquet file is one (its field `column`), a folder is all such
    files in it by name. Anything else is a data set of the hub, "owner/name" or "owner/name:configuration",
    whose split "train" is read.
    """
    texts = (text for text in _texts(source, column) if text.strip())
    return list(islice(texts, limit))


def _texts(source: str, column: str) -> Iterator[str]:
    path = Path(source)
    if source == "pydoc":
        return (topics[name] for name in sorted(topics))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        return (text for file in files for text in _file(file, column))
    if path.suffix in SUFFIXES or path.is_absolute() or source.startswith("."):
        if not path.is_file() or path.suffix not in SUFFIXES:
            raise FileNotFoundError(f"no text at {source}: give a folder, or a {', '.join(SUFFIXES)} file")
        return _file(path, column)
    return _hub(source, column)


def _file(path: Path, column: str) -> Iterator[str]:
    if path.suffix == ".parquet":
        parquet = _optional("pyarrow.parquet")
        rows = parquet.ParquetFile(path).iter_batches()
        records = (record for batch in rows for record in batch.to_pylist())
    elif path.suffix == ".jsonl":
        records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)
    else:
        records = iter([{column: path.read_text(encoding="utf-8")}])
    return (_field(record, column, path.name) for record in records)


def _hub(source: str, column: str) -> Iterator[str]:
    name, _, configuration = source.partition(":")
    datasets = _optional("datasets")
    records = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
    return (_field(record, column, source) for record in records)


def _field(record: dict, column: str, where: str) -> str:
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
