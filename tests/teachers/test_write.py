"""Writing a cache: once a sample, and nothing lost to a kill or a full disk."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.teachers import plain, small
from tests.teachers.small import TOP, Counting, batches, cache, local, opened

from fdiv.teachers import _format, write
from fdiv.teachers._format import Manifest
from fdiv.teachers._signal import TeacherError
from fdiv.teachers.cache import Cached
from fdiv.teachers.write import write_cache


def test_a_sample_is_asked_about_once(tmp_path):
    ids, mask = small.text(12)
    twice = (torch.cat([ids, ids.flip(0)]), torch.cat([mask, mask.flip(0)]))
    teacher = Counting(local(TOP))
    write_cache(teacher, batches(twice), tmp_path)
    write_cache(teacher, batches(twice), tmp_path)
    assert teacher.sequences == 12


def test_more_text_is_added_to_a_finished_cache(tmp_path):
    ids, mask = small.text(12)
    cache(tmp_path, TOP, (ids[:5], mask[:5]))
    teacher = Counting(local(TOP))
    write_cache(teacher, batches((ids, mask)), tmp_path)
    assert teacher.sequences == 7
    small.same(opened(tmp_path)(ids, mask).evidence, local(TOP)(ids, mask).evidence, 1e-5)


def test_an_interrupted_cache_is_refused_and_goes_on_after_its_complete_shards(tmp_path):
    text = small.text(12)
    with pytest.raises(KeyboardInterrupt):
        write_cache(Counting(local(TOP), fails_at=4), batches(text, 2), tmp_path, shard_bytes=500)
    done = Manifest.read(tmp_path).samples
    assert 0 < done < 12
    with pytest.raises(TeacherError, match=f"was not finished .{done} samples"):
        opened(tmp_path)
    teacher = Counting(local(TOP))
    write_cache(teacher, batches(text, 2), tmp_path, shard_bytes=500)
    assert teacher.sequences == 12 - done
    small.same(opened(tmp_path)(*text).evidence, local(TOP)(*text).evidence, 1e-5)


def test_a_damaged_shard_alone_is_made_again(tmp_path):
    text = small.text(12)
    manifest = cache(tmp_path, TOP, text)
    path = tmp_path / manifest.shards[1].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    teacher = Counting(local(TOP))
    write_cache(teacher, batches(text), tmp_path, shard_bytes=500)
    assert teacher.sequences == manifest.shards[1].samples
    small.same(opened(tmp_path)(*text).evidence, local(TOP)(*text).evidence, 1e-5)


def test_a_full_disk_loses_nothing_that_was_complete_and_says_how_to_go_on(tmp_path, monkeypatch):
    text, stored = small.text(12), write.store
    calls = []

    def full(path, data):
        calls.append(path.name)
        if path.name == "shard-000002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        stored(path, data)

    monkeypatch.setattr(write, "store", full)
    with pytest.raises(TeacherError, match=r"no space left.*are complete and stay.*goes on where this one"):
        cache(tmp_path, TOP, text)
    monkeypatch.undo()
    kept = Manifest.read(tmp_path)
    assert len(kept.shards) == 2 and not kept.finished
    teacher = Counting(local(TOP))
    write_cache(teacher, batches(text), tmp_path, shard_bytes=500)
    assert teacher.sequences == 12 - kept.samples
    small.same(opened(tmp_path)(*text).evidence, local(TOP)(*text).evidence, 1e-5)


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    _format.store(path, b"before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_format.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _format.store(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_was_killed_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-m", "tests.teachers.plain", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("shard*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    (tmp_path / "shard-000999.safetensors").write_bytes(b"a shard that the manifest does not name")
    (tmp_path / "shard-001000.safetensors.new").write_bytes(b"half a shard")
    done, teacher = Manifest.read(tmp_path), plain.Plain()
    assert 0 < done.samples < plain.SEQUENCES
    write_cache(teacher, plain.one_by_one(), tmp_path, shard_bytes=500)
    assert teacher.sequences == plain.SEQUENCES - done.samples
    assert Manifest.read(tmp_path).shards[: len(done.shards)] == done.shards
    assert not list(tmp_path.glob("*.new")) and not (tmp_path / "shard-000999.safetensors").exists()
    found = Cached(str(tmp_path)).open(TOP, 1.0, None)(*plain.text()).evidence
    small.same(found, plain.Plain()(*plain.text()).evidence)


def test_what_waited_for_a_shard_is_kept_when_a_teacher_fails(tmp_path):
    text = small.text(12)
    with pytest.raises(KeyboardInterrupt):
        write_cache(Counting(local(TOP), fails_at=4), batches(text, 2), tmp_path, shard_bytes=1 << 20)
    assert Manifest.read(tmp_path).samples == 6
