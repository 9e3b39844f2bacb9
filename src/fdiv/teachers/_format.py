"""How a signal lies on disk: a folder of shards (safetensors) and a manifest (JSON).

A shard holds whole samples: `key` [samples, 32], `rows` [samples], how many rows of each of the other columns
are a sample's, and the columns of fdiv.teachers._columns. Everything is written to a file beside and renamed,
and the manifest, which names a shard only when it lies there whole, is written last.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fdiv.teachers._columns import Precision
from fdiv.teachers._signal import TeacherError, Terms, Vocabulary, described

FORMAT, VERSION = "fdiv teacher signal", 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """A file that lies there whole."""

    file: str
    samples: int
    tokens: int
    bytes: int
    sha256: str

    def check_size(self, folder: Path) -> None:
        path = folder / self.file
        size = path.stat().st_size if path.is_file() else None
        if size != self.bytes:
            what = "is missing" if size is None else f"has {size} bytes, {self.bytes} were written"
            raise TeacherError(f"{path} {what}; the command that wrote the cache redoes that shard alone")

    def check(self, folder: Path) -> None:
        """Raise TeacherError unless the file is, to the bit, what was written."""
        self.check_size(folder)
        if sha256_of(folder / self.file) != self.sha256:
            raise TeacherError(
                f"{folder / self.file} is damaged: its sha256 is not the manifest's; the command that wrote "
                "the cache redoes that shard alone"
            )


@dataclass(frozen=True)
class Manifest:
    """What a cache holds. `finished`: whoever wrote it came to the end of the text."""

    terms: Terms
    precision: Precision
    shards: tuple[Shard, ...] = ()
    head: Shard | None = None
    finished: bool = False

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """On disk, keys and head included."""
        return sum(shard.bytes for shard in (*self.shards, *([self.head] if self.head else [])))

    @property
    def bytes_per_token(self) -> float:
        """Of the shards; a head does not grow with the text."""
        return sum(shard.bytes for shard in self.shards) / max(1, self.tokens)

    @property
    def summary(self) -> str:
        """In words, with the size a token."""
        return (
            f"{described(self.terms.support)}, {self.samples} samples, {self.tokens} tokens, "
            f"{self.bytes_per_token:.1f} bytes a token, {self.bytes / 1e6:.2f} MB in all"
        )

    def write(self, folder: Path) -> None:
        counts = {"samples": self.samples, "tokens": self.tokens, "bytes": self.bytes}
        body = {"format": FORMAT, "version": VERSION, **asdict(self), **counts}
        body["bytes_per_token"] = round(self.bytes_per_token, 2)
        store(folder / MANIFEST, json.dumps({"sha256": _digest(body)} | body, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        path = folder / MANIFEST
        if not path.is_file():
            raise TeacherError(f"no cache at {folder}: `fdiv cache RECIPE --out {folder}` writes one")
        try:
            body = json.loads(path.read_bytes())
            digest = body.pop("sha256")
            if (body.pop("format"), body.pop("version")) != (FORMAT, VERSION):
                raise TeacherError(
                    f"{path} is of another format than version {VERSION}; write the cache anew"
                )
            if digest != _digest({"format": FORMAT, "version": VERSION} | body):
                raise TeacherError(f"{path} is damaged: its sha256 is not the one it states")
            terms = body["terms"]
            return cls(
                Terms(**terms | {"vocabulary": Vocabulary(**terms["vocabulary"])}),
                body["precision"],
                tuple(Shard(**shard) for shard in body["shards"]),
                Shard(**body["head"]) if body["head"] else None,
                body["finished"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, TeacherError):
                raise
            raise TeacherError(f"{path} is damaged: {error}; write the cache anew") from None


def store(path: Path, data: bytes) -> None:
    """Whole or not at all, whatever happens in between."""
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        new.unlink(missing_ok=True)
        raise
    new.replace(path)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def keys_of(column: Tensor) -> list[bytes]:
    """The keys of a shard's samples, [samples, 32]."""
    text = column.numpy().tobytes()
    return [text[start : start + 32] for start in range(0, len(text), 32)]
