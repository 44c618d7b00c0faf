"""Faults, injected: each ends in an error that names what is wrong, or in one more try; never in a batch that lacks
something, and never in a step that is left out. (Cut shards and damaged records: test_sources.py; stores of another
corpus: test_units.py; a killed `prepare`: test_prepare_again.py.)"""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipelines import atomic, prepare
from data_pipelines.atomic import CannotWrite
from data_pipelines.corpora import CorpusError
from data_pipelines.manifest import Manifest, ManifestError
from data_pipelines.pipeline import LoadBatch, train_batches
from data_pipelines.sources import ShardSource, SourceError
from data_pipelines.stalls import StallError
from tests.data_pipelines.noise_corpus import REPOSITORY, go, tree
from tests.data_pipelines.ramps import CLEAN, assert_same

SEQUENTIAL = dataclasses.replace(CLEAN, threads=0, seconds_per_step=6.0)


class Stumbling:
    """A pool of readers whose next `failures` reads fail, as those of a network disk do."""

    def __init__(self, pool, failures):
        self.pool, self.failures, self.reads = pool, failures, 0

    def __getitem__(self, key):
        self.reads += 1
        if self.failures:
            self.failures -= 1
            raise RuntimeError("Input/output error; reading a shard")
        return self.pool[key]


def copy_of(corpus, folder):
    shutil.copytree(corpus.root, folder)
    return Manifest.load(folder)


def test_a_read_that_fails_is_tried_once_more(corpus):
    expected = ShardSource(corpus).read(5)
    source = ShardSource(corpus)
    stumbling = source._records = Stumbling(source._open(instead_of=None), failures=1)
    assert (source.read(5) == expected).all()
    assert stumbling.reads == 1 and source._records is not stumbling  # new readers, kept from then on
    assert (source.read(5) == expected).all()


def test_a_read_that_fails_twice_is_named(corpus, monkeypatch):
    source = ShardSource(corpus)
    failing = Stumbling(None, failures=9)
    source._records = failing
    monkeypatch.setattr(source, "_open", lambda *, instead_of: failing)
    with pytest.raises(SourceError, match=r"record \d+, \w+/[xy] utterance .* cannot be read .*tried twice"):
        source.read(5)
    assert failing.reads == 2


def test_a_shard_that_vanishes_ends_the_batches_where_it_is_met(whole, tmp_path):
    manifest = copy_of(whole.manifest, tmp_path / "copy")
    loader = LoadBatch(SEQUENTIAL, whole.manifest, ())
    steps = [loader.map(k) for k in range(6)]
    first = [int(manifest.shard[u]) for u in steps[0].utterance]
    later = next(k for k, batch in enumerate(steps) for u in batch.utterance if manifest.shard[u] not in first)
    lost = next(int(manifest.shard[u]) for u in steps[later].utterance if manifest.shard[u] not in first)
    (manifest.root / manifest.shard_names[lost]).unlink()
    with train_batches(SEQUENTIAL, manifest, ()) as batches:
        for k in range(later):
            assert_same(next(batches), steps[k])
        with pytest.raises(SourceError, match=manifest.shard_names[lost]):
            next(batches)
    with pytest.raises(ManifestError, match="is missing: copy it again"):
        Manifest.load(manifest.root)


def test_a_read_that_hangs_is_given_up_by_name(corpus, monkeypatch):
    released = threading.Event()

    class Hanging:
        def __getitem__(self, key):
            released.wait(30)
            raise RuntimeError("released")

    with train_batches(CLEAN, corpus, (), start=41, stall_seconds=0.3) as batches:
        monkeypatch.setattr(ShardSource, "_open", lambda self, *, instead_of=None: Hanging())
        with pytest.raises(StallError, match="no batch of step 41 after 0.3 s"):
            next(batches)
        released.set()
        with pytest.raises(StopIteration):
            next(batches)


def test_a_worker_that_is_killed_is_named_with_its_step(corpus):
    cfg = dataclasses.replace(CLEAN, workers=1, threads=0, prefetch=1)
    before = children()
    with train_batches(cfg, corpus, (), stall_seconds=60) as batches:
        next(batches)
        makers = [pid for pid in children() - before if "spawn_main" in command_of(pid)]
        assert makers
        for pid in makers:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(StallError, match=r"died before step \d+ .*exit code -9"):
            for _ in range(20):
                next(batches)


def children():
    found = set()
    for task in os.listdir(f"/proc/{os.getpid()}/task"):
        with contextlib.suppress(OSError):  # a thread that ended by now
            found |= {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{task}/children").read_text().split()}
    return found


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_corpus_that_vanishes_while_it_is_prepared_is_named_and_loses_no_clip(
    raw, whole, tmp_path, monkeypatch, left
):
    """A disk that is unmounted leaves an empty folder: all clips after that are not bad, and must not be left out."""
    folder, out = shutil.copytree(raw[0], tmp_path / "corpus"), tmp_path / "out"
    write = prepare.write_shard

    def vanishing(task, into):
        if list((out / "shards").glob("*.arrow")) and folder.exists():
            folder.rename(tmp_path / "away")
            if left == "an empty folder":
                folder.mkdir()
        return write(task, into)

    monkeypatch.setattr(prepare, "write_shard", vanishing)
    with pytest.raises(CorpusError, match=rf"cannot be read \(No such file .*tried twice.* is all of {folder} there"):
        go(folder, out)
    assert not (out / "manifest.arrow").exists() and not list(out.rglob(".partial-*"))
    monkeypatch.undo()
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "away").rename(folder)
    again = go(folder, out)
    assert again.manifest.fingerprint == whole.manifest.fingerprint and not again.rejected


@pytest.mark.parametrize(
    ("fails", "number", "ends"),
    [
        (1, errno.EIO, "whole"),
        (2, errno.EIO, "left out"),
        (2, errno.EACCES, "left out"),
        (2, errno.ESTALE, "refused"),
        (2, errno.EMFILE, "refused"),
    ],
)
def test_a_read_that_fails_while_preparing(raw, whole, tmp_path, monkeypatch, fails, number, ends):
    read, failed = Path.read_bytes, []

    def stumbling(path):
        if path.is_relative_to(raw[0]) and len(failed) < fails and path.name in (failed or [path.name]):
            failed.append(path.name)
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stumbling)
    if ends == "refused":
        with pytest.raises(CorpusError, match=f"{os.strerror(number)}.* tried twice"):
            go(raw[0], tmp_path / "out")
        return
    made = go(raw[0], tmp_path / "out")
    assert len(failed) == fails
    assert [Path(r.path).name for r in made.rejected] == ([] if ends == "whole" else failed[:1])
    assert (made.manifest.fingerprint == whole.manifest.fingerprint) == (ends == "whole")


def test_a_read_that_hangs_while_preparing_is_told(raw, whole, tmp_path, monkeypatch):
    """A pipe that nobody writes to stands for it: put in the place of a clip after that was listed."""
    folder = shutil.copytree(raw[0], tmp_path / "corpus")
    clip = next(folder / row["path"] for row in raw[1])
    sound, make_plan, release = clip.read_bytes(), prepare.make_plan, threading.Event()

    def planned(*what, **how):
        plan = make_plan(*what, **how)
        clip.unlink()
        os.mkfifo(clip)
        return plan

    def answer():
        release.wait()
        with open(clip, "wb") as pipe:
            pipe.write(sound)

    said = []
    monkeypatch.setattr(prepare, "make_plan", planned)
    monkeypatch.setattr(prepare, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(prepare.tqdm, "write", lambda line, file: (said.append(line), release.set()))
    answering = threading.Thread(target=answer)
    answering.start()
    made = go(folder, tmp_path / "out", workers=2)
    answering.join()
    assert "nothing was written for 1 s; perhaps a read hangs" in said[0] and "fra-train" in said[0]
    assert made.manifest.fingerprint == whole.manifest.fingerprint


def test_a_full_disk_while_preparing(raw, whole, tmp_path, monkeypatch):
    sync, calls = atomic._sync, []

    def full(path):
        calls.append(path)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_sync", full)
        with pytest.raises(CannotWrite, match="No space left on device.*free some space, then run the same command"):
            go(raw[0], out)
    assert not (out / "manifest.arrow").exists() and not list(out.rglob(f"{atomic.TEMPORARY_PREFIX}*"))
    go(raw[0], out)
    assert tree(out) == tree(whole.root)


@pytest.mark.soak
def test_a_disk_that_is_really_full(raw, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    subprocess.run(mount, check=True)  # needs root
    try:
        with pytest.raises(CannotWrite, match=f"{disk}.*No space left on device") as raised:
            go(raw[0], disk / "out")
        assert raised.value.errno == errno.ENOSPC
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        go(raw[0], disk / "out")
        assert tree(disk / "out") == tree(whole.root)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_worker_of_prepare_that_is_killed_is_named(raw, tmp_path):
    code = (
        "import os, signal, data_pipelines.prepare as p\n"
        "def killed(task, out): os.kill(os.getpid(), signal.SIGKILL)\n"
        "p.write_shard = killed\n"
        "if __name__ == '__main__':\n"
        f"    p.prepare({str(raw[0])!r}, out={str(tmp_path / 'out')!r}, workers=2, clips_per_shard=4, progress=False)\n"
    )
    script = tmp_path / "killed.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, env=environment)
    assert "PrepareError: a worker process died" in ran.stderr and "Run the same command again" in ran.stderr
