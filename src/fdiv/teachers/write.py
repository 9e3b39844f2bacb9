"""Write what a teacher says about text into a cache, so that it need not be asked again.

A cache grows a shard at a time and may be killed at any moment: shards that are complete are kept, and the
same call goes on with the first sample that is in none of them.
"""

import errno
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fdiv.teachers._columns import Precision, pack
from fdiv.teachers._format import MANIFEST, Manifest, Shard, keys_of, store
from fdiv.teachers._sample import Sample, batch_of, samples
from fdiv.teachers._signal import Teacher, TeacherError

SHARD_BYTES = 64 << 20  # what a kill loses at most
HEAD = "head.safetensors"


def write_cache(
    teacher: Teacher,
    batches: Iterable[tuple[Tensor, Tensor]],
    folder: str | Path,
    *,
    precision: Precision = "float32",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, Manifest], None] = lambda sequences, manifest: None,
) -> Manifest:
    """Ask `teacher` about each (ids, mask) of `batches` and keep its answers in `folder`.

    A sample that is there already, or twice in the text, is asked about once. `progress` is told how many
    sequences were passed in all. One process writes at a time. Raises TeacherError if the folder holds
    another signal, and if the disk is full; what was complete is kept then too.
    """
    _refuse(teacher, precision)
    book = _Book(Path(folder), teacher, precision, shard_bytes)
    passed = 0
    try:
        for ids, mask in batches:
            book.add(ids, mask)
            passed += len(ids)
            progress(passed, book.manifest)
        book.close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TeacherError(_full(book)) from error
    except BaseException:  # Ctrl-C, or a server that is gone: what it said so far was not cheap
        book.flush()
        raise
    return book.manifest


def _refuse(teacher: Teacher, precision: Precision) -> None:
    support = teacher.terms.support
    if precision not in ("float32", "float16"):
        raise TeacherError(f"precision is 'float32' or 'float16', got {precision!r}")
    if support == "logits":
        raise TeacherError(
            "rows of the whole vocabulary are too large to keep; write FusedAtoms(TopK(k)), "
            "FusedAtoms(SampledLogits(n, 'teacher')), or FusedLinear() for hidden states"
        )
    if support == "heads" and precision != "float32":
        raise TeacherError(
            "hidden states are kept as the model makes them, so leave out precision='float16'; a teacher "
            "loaded in bfloat16 gives states of half the size"
        )


def _full(book: "_Book") -> str:
    kept = book.manifest
    return (
        f"no space left for {book.folder}: {kept.samples} samples ({kept.tokens} tokens, "
        f"{kept.bytes / 1e6:.1f} MB) are complete and stay, {len(book.waiting)} more were not written. Free "
        "some space, or write float16 or fewer atoms into another folder; the same command goes on where "
        "this one stopped"
    )


class _Book:
    """The folder, and the samples that wait for the next shard."""

    def __init__(self, folder: Path, teacher: Teacher, precision: Precision, shard_bytes: int):
        self.folder, self.teacher = folder, teacher
        self.precision: Precision = precision
        self.shard_bytes = shard_bytes
        self.known: set[bytes] = set()
        self.manifest = self._resumed()
        self.waiting: list[dict[str, Tensor]] = []
        self.waiting_tokens = self.waiting_bytes = 0

    def _resumed(self) -> Manifest:
        """What an earlier call left, without what is not whole."""
        fresh = Manifest(self.teacher.terms, self.precision)
        self.folder.mkdir(parents=True, exist_ok=True)
        found = Manifest.read(self.folder) if (self.folder / MANIFEST).exists() else fresh
        if differing := _differing(found, fresh):
            raise TeacherError(
                f"{self.folder} holds another signal than the one to be written, by {'; '.join(differing)}; "
                "give another folder, or delete this one"
            )
        whole = tuple(shard for shard in found.shards if self._is_whole(shard))
        head = found.head if found.head and self._is_whole(found.head) else None
        named = {shard.file for shard in (*whole, *([head] if head else []))}
        for file in [*self.folder.glob("*.new"), *self.folder.glob("*.safetensors")]:
            if file.name not in named:  # what a kill left
                file.unlink()
        for shard in whole:
            with safe_open(self.folder / shard.file, "pt") as file:
                self.known.update(keys_of(file.get_tensor("key")))
        return replace(found, shards=whole, head=head, finished=False)

    def _is_whole(self, shard: Shard) -> bool:
        try:
            shard.check(self.folder)
        except TeacherError:
            return False
        return True

    def add(self, ids: Tensor, mask: Tensor) -> None:
        """Ask about those of a batch that are new."""
        new: list[Sample] = []
        for sample in samples(ids, mask):
            if (key := sample.key) not in self.known:
                self.known.add(key)
                new.append(sample)
        if not new:
            return
        evidence = dict(self.teacher(*batch_of(new, ids.device)).evidence)
        head = evidence.pop("p_weight", None)
        if head is not None and self.manifest.head is None:
            entry = self._store(HEAD, {"p_weight": head.cpu()}, 0, 0)
            self._write(replace(self.manifest, head=entry))
        start = 0
        for sample in new:
            rows = {name: t[start : start + sample.tokens] for name, t in evidence.items()}
            self._queue(sample, pack(rows, self.teacher.terms, self.precision))
            start += sample.tokens

    def _queue(self, sample: Sample, columns: dict[str, Tensor]) -> None:
        # A copy: a slice would keep the whole batch, and be stored with it.
        columns = {name: t.clone(memory_format=torch.contiguous_format) for name, t in columns.items()}
        columns["rows"] = torch.tensor([len(next(iter(columns.values())))], dtype=torch.int32)
        columns["key"] = torch.tensor(list(sample.key), dtype=torch.uint8).unsqueeze(0)
        self.waiting.append(columns)
        self.waiting_tokens += sample.tokens
        self.waiting_bytes += sum(t.nbytes for t in columns.values())
        if self.waiting_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        columns = {name: torch.cat([some[name] for some in self.waiting]) for name in self.waiting[0]}
        numbers = [int(shard.file[6:12]) for shard in self.manifest.shards]
        name = f"shard-{max(numbers, default=-1) + 1:06}.safetensors"
        entry = self._store(name, columns, len(columns["key"]), self.waiting_tokens)
        self._write(replace(self.manifest, shards=(*self.manifest.shards, entry)))
        self.waiting, self.waiting_tokens, self.waiting_bytes = [], 0, 0

    def close(self) -> None:
        self.flush()
        self._write(replace(self.manifest, finished=True))

    def _store(self, name: str, tensors: dict[str, Tensor], count: int, tokens: int) -> Shard:
        data = save({key: t.contiguous() for key, t in tensors.items()})
        store(self.folder / name, data)
        return Shard(name, count, tokens, len(data), hashlib.sha256(data).hexdigest())

    def _write(self, manifest: Manifest) -> None:
        manifest.write(self.folder)
        self.manifest = manifest


def _differing(found: Manifest, wanted: Manifest) -> list[str]:
    """By what the signals of two manifests differ, in words."""
    first, second = ({**vars(m.terms), "precision": m.precision} for m in (found, wanted))
    return [
        f"its {name} ({first[name]}, not {second[name]})" for name in first if first[name] != second[name]
    ]
