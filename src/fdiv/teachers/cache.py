"""What a teacher said earlier, kept on disk sample by sample."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fdiv.estimate._estimator import Estimator
from fdiv.teachers._columns import unpack
from fdiv.teachers._format import MANIFEST, Manifest, Shard, keys_of
from fdiv.teachers._sample import Sample, samples
from fdiv.teachers._signal import TeacherError, TeacherSignal, Terms, Vocabulary, support_of

if TYPE_CHECKING:
    from fdiv.adapters.transformers import CausalLM


@dataclass(frozen=True)
class Cached:
    """A folder that `fdiv cache` wrote: answers about the very samples that it was written for.

    folder: one with a manifest, or one whose subfolders have them, of which that of the reference is taken.
    A sample is found by its content (context, tokens, and which of them are predicted), in whatever batch,
    order and padding it comes.
    """

    folder: str

    def open(self, estimator: Estimator, temperature: float, reference: "CausalLM | None") -> "CachedTeacher":
        folder, manifest = self._found(reference)
        terms = manifest.terms
        if not manifest.finished:
            raise TeacherError(
                f"the cache at {folder} was not finished ({manifest.samples} samples are complete); the "
                "command that wrote it goes on where it stopped"
            )
        terms.require_support(estimator)
        terms.require_temperature(temperature)
        if reference is not None:
            _require_teacher(terms, reference, folder)
        answered = replace(terms, support=support_of(estimator), temperature=temperature)
        return CachedTeacher(folder, manifest, answered)

    def _found(self, reference: "CausalLM | None") -> tuple[Path, Manifest]:
        """The cache of the reference, among those in the folder."""
        top = Path(self.folder)
        folders = [top] if (top / MANIFEST).exists() else sorted(p.parent for p in top.glob(f"*/{MANIFEST}"))
        found = {folder: Manifest.read(folder) for folder in folders or [top]}
        if len(found) == 1:
            return next(iter(found.items()))
        name = reference.fingerprint() if reference else None
        for folder, manifest in found.items():
            if manifest.terms.model == name:
                return folder, manifest
        raise TeacherError(
            f"{top} holds caches of {len(found)} teachers and "
            + (f"none of the reference ({name[:16]})" if name else "there is no reference to choose by")
            + f"; write Cached({str(next(iter(found)))!r}), say"
        )


class CachedTeacher:
    """Reads shards in place; each is checked against its sha256 before the first of its samples is used."""

    def __init__(self, folder: Path, manifest: Manifest, terms: Terms):
        self.folder, self.manifest, self.terms = folder, manifest, terms
        self.shards = [_OpenShard(folder, entry) for entry in manifest.shards]
        self.places = {key: (shard, n) for shard in self.shards for n, key in enumerate(shard.keys)}
        self.head: Tensor | None = None
        if not self.shards:
            raise TeacherError(f"the cache at {folder} holds no sample; `fdiv cache` writes some")
        if terms.support == "heads" and manifest.head:
            manifest.head.check(folder)
            with safe_open(folder / manifest.head.file, "pt") as file:
                self.head = file.get_tensor("p_weight")

    def __call__(self, ids: Tensor, mask: Tensor) -> TeacherSignal:
        """On the device of `ids`."""
        some = samples(ids, mask)
        places = [self.places.get(sample.key) for sample in some]
        missing = [sample for sample, place in zip(some, places, strict=True) if place is None]
        if missing:
            self._miss(missing[0], len(missing), len(some))
        parts = [shard.columns(n) for shard, n in places if shard]  # type: ignore[misc]
        parts = parts or [self.shards[0].columns(None)]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        evidence = {name: t.to(ids.device) for name, t in unpack(columns, self.terms.support).items()}
        if self.terms.support == "heads":
            self.head = self.head.to(ids.device)  # type: ignore[union-attr]
            evidence["p_weight"] = self.head
        return TeacherSignal(evidence, self.terms)

    def _miss(self, sample: Sample, count: int, among: int) -> None:
        for shard in self.shards:  # a damaged key looks like a missing sample
            shard.check()
        raise TeacherError(
            f"the cache at {self.folder} has nothing on {count} of the {among} samples of this batch; the "
            f"first has {len(sample.ids)} tokens, {sample.tokens} predicted, and begins "
            f"{sample.ids[:8].tolist()}. It holds {self.manifest.samples} samples and answers about these "
            "alone: the same task, tokenizer, seeds, number of examples and mask, and no text that a student "
            "has just written. `fdiv cache` with the same recipe adds what is missing; Local() answers about "
            "anything"
        )


class _OpenShard:
    """One shard, mapped into memory."""

    def __init__(self, folder: Path, entry: Shard):
        self.folder, self.entry, self.checked = folder, entry, False
        entry.check_size(folder)
        try:
            self.file: Any = safe_open(folder / entry.file, "pt").__enter__()
            self.keys = keys_of(self.file.get_tensor("key"))
            ends = self.file.get_tensor("rows").long().cumsum(0)
            self.starts = [0, *ends.tolist()]
        except SafetensorError:
            self.check()
            raise
        names = set(self.file.keys()) - {"key", "rows"}
        self.slices = {name: self.file.get_slice(name) for name in sorted(names)}

    def check(self) -> None:
        if not self.checked:
            self.entry.check(self.folder)
            self.checked = True

    def columns(self, n: int | None) -> dict[str, Tensor]:
        """Those of sample n; of none, without a row."""
        self.check()
        start, stop = (0, 0) if n is None else self.starts[n : n + 2]
        return {name: column[start:stop] for name, column in self.slices.items()}


def _require_teacher(terms: Terms, reference: "CausalLM", folder: Path) -> None:
    # A server's name says nothing about weights.
    if re.fullmatch("[0-9a-f]{64}", terms.model) and terms.model != reference.fingerprint():
        raise TeacherError(
            f"the cache at {folder} is of another teacher ({terms.model[:16]}) than the reference "
            f"({reference.fingerprint()[:16]}): other weights, or the same in another dtype; write it anew "
            "with `fdiv cache`, or go back to that teacher"
        )
    terms.require_vocabulary(Vocabulary.of(reference), "the reference's")
