"""`prepare` in a folder where it was before: killed, damaged, with another plan, beside another run, on a full disk."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile

from data_pipelines import atomic
from data_pipelines.manifest import MANIFEST_NAME, Manifest, ManifestError
from data_pipelines.prepare import PrepareError
from tests.data_pipelines.noise_corpus import (
    COLUMNS,
    REPOSITORY,
    go,
    make_corpus,
    noise,
    prepare_in_a_process,
    tree,
    write_table,
)

# After a kill


def children_of(pid):
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.once
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_prepare_goes_on_and_ends_the_same(tmp_path, workers):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    rows = make_corpus(folder, languages=("fr", "deu", "eng", "ita"), clips=16)
    process = prepare_in_a_process(folder, out, "--workers", workers, "--clips-per-shard", "2")
    deadline = time.time() + 60
    while len(list(out.glob("shards/[!.]*.arrow"))) < 5 and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    while any(map(alive, children)) and time.time() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children)), "workers outlived their parent"
    finished = {p.name: p.stat().st_ino for p in out.glob("shards/[!.]*.arrow")}
    assert len(finished) >= 5 and not (out / MANIFEST_NAME).exists()
    with pytest.raises(ManifestError, match="prepare was not finished: run it again"):
        Manifest.load(out)
    made = go(folder, out, clips_per_shard=2)
    assert {name: (out / "shards" / name).stat().st_ino for name in finished} == finished, "finished work was redone"
    assert len(finished) < len(list(out.glob("shards/[!.]*.arrow"))), "it was killed too late to show anything"
    go(folder, tmp_path / "straight", clips_per_shard=2)
    assert tree(out) == tree(tmp_path / "straight")
    assert made.tally.written == sum(row["n_samples"] for row in rows) + made.tally.repeated


def test_half_written_and_damaged_shards_are_made_again(raw, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole.root, out)
    records, tables = sorted(out.glob("shards/*.arrayrecord")), sorted(out.glob("shards/[!.]*.arrow"))
    records[0].write_bytes(records[0].read_bytes()[:-100])
    records[1].unlink()
    tables[2].write_bytes(tables[2].read_bytes()[:200])
    tables[3].unlink()
    (out / "shards" / ".partial-1-abcd-x.arrayrecord").write_bytes(b"half")
    assert go(raw[0], out).fresh
    # The records of shard 2 and 3 were whole, but nothing said so.
    assert tree(out) == tree(whole.root)


def test_without_locks_only_what_dead_writers_left_is_deleted(raw, tmp_path, monkeypatch):
    """Another run may then be in the folder unseen."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    theirs = out / "shards" / f"{atomic.TEMPORARY_PREFIX}{atomic._machine()}-{os.getpid()}-0123abcd-x.arrayrecord"
    theirs.write_bytes(b"half")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    go(raw[0], out)
    assert theirs.exists()
    monkeypatch.undo()
    go(raw[0], out, overwrite=True, join_seconds=2.0)
    assert not theirs.exists()


# Another plan for the same folder


def test_other_options_are_refused_with_what_changed_and_rebuilt_on_demand(raw, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole.root, out)
    with pytest.raises(PrepareError, match=r"join_seconds was 4.0, is 2.0.*--overwrite"):
        go(raw[0], out, join_seconds=2.0)
    assert tree(out) == tree(whole.root)
    go(raw[0], out, join_seconds=2.0, overwrite=True)
    go(raw[0], tmp_path / "straight", join_seconds=2.0)
    assert tree(out) == tree(tmp_path / "straight")


def test_a_rebuild_that_stops_half_way_does_not_look_whole(raw, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole.root, out)
    monkeypatch.setattr("data_pipelines.prepare._run", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        go(raw[0], out, join_seconds=2.0, overwrite=True)
    with pytest.raises(ManifestError, match="not finished"):
        Manifest.load(out)
    monkeypatch.undo()
    assert go(raw[0], out, join_seconds=2.0).fresh  # the folder is the new plan's now: no --overwrite needed


def test_another_table_is_refused_and_a_new_language_costs_only_itself(raw, whole, tmp_path):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(raw[0], folder)
    shutil.copytree(whole.root, out)
    (folder / "it").mkdir()
    soundfile.write(folder / "it/x.wav", noise(70000, 99), 16000)
    new = dict(zip(COLUMNS, ("it/x.wav", "it", "one", "s", "train", "si", 70000), strict=True))
    write_table(folder, [*raw[1], new])
    with pytest.raises(PrepareError, match="clips were 60, are 61; new languages: ita"):
        go(folder, out)
    before = {p.name: p.stat().st_ino for p in out.glob("shards/*")}
    assert go(folder, out, overwrite=True).manifest.languages == ("deu", "eng", "fra", "ita")
    after = {p.name: p.stat().st_ino for p in out.glob("shards/*")}
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2
    changed = [*raw[1], new | {"text": "no"}]
    write_table(folder, changed)
    with pytest.raises(PrepareError, match="was prepared from something else: clips changed in: ita"):
        go(folder, out)
    write_table(folder, raw[1])
    with pytest.raises(PrepareError, match="languages gone: ita"):
        go(folder, out)
    go(folder, out, overwrite=True)
    assert tree(out) == tree(whole.root)


def test_a_changed_file_is_noticed(raw, whole, tmp_path):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(raw[0], folder)
    shutil.copytree(whole.root, out)
    soundfile.write(folder / "fr/one/00.wav", noise(30000, 5), 16000)
    with pytest.raises(PrepareError, match="clips changed in: fra"):
        go(folder, out)


def test_a_file_of_the_same_size_in_place_of_another_is_noticed_and_costs_its_shard_alone(raw, whole, tmp_path):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(raw[0], folder)  # times are copied too
    shutil.copytree(whole.root, out)
    assert not go(folder, out).fresh
    path = folder / "fr/one/00.wav"
    size, before = path.stat().st_size, Manifest.load(out).fingerprint
    soundfile.write(path, noise(soundfile.info(path).frames, 77), 16000)
    assert path.stat().st_size == size
    with pytest.raises(PrepareError, match=r"something else: files written since \(of the same size\) in: fra\. "):
        go(folder, out)
    inodes = {p.name: p.stat().st_ino for p in out.glob("shards/*.arrayrecord")}
    made = go(folder, out, overwrite=True)
    again = {p.name: p.stat().st_ino for p in out.glob("shards/*.arrayrecord")}
    assert made.manifest.fingerprint != before and set(again) == set(inodes)
    assert sum(again[name] != inodes[name] for name in again) == 1
    assert tree(out) == tree(go(folder, tmp_path / "straight").root)
    assert not go(folder, out).fresh


def test_what_another_version_made_is_said_to_be_so(raw, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole.root, out)
    monkeypatch.setattr("data_pipelines.plan_shards.RECIPE", 1000)
    with pytest.raises(
        PrepareError, match=r"something else: it was made by another version of this code, whose .*\. Give"
    ):
        go(raw[0], out)


def test_a_run_killed_while_it_replaces_does_not_keep_the_old(raw, whole, tmp_path, monkeypatch):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(raw[0], folder)
    shutil.copytree(whole.root, out)
    path = folder / "fr/one/00.wav"
    soundfile.write(path, noise(soundfile.info(path).frames, 77), 16000)
    with monkeypatch.context() as patch:
        patch.setattr("data_pipelines.prepare._run", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            go(folder, out, overwrite=True)
    go(folder, out)
    assert tree(out) == tree(go(folder, tmp_path / "straight").root)


def test_other_audio_of_the_same_length_is_another_corpus(raw, whole, tmp_path):
    """What was made from the one (units) is then refused for the other, although ids and lengths are the same."""
    shutil.copytree(raw[0], tmp_path / "corpus")
    path = tmp_path / "corpus/fr/one/00.wav"
    soundfile.write(path, noise(soundfile.info(path).frames, 77), 16000)
    other = go(tmp_path / "corpus", tmp_path / "out").manifest
    assert other.samples.tolist() == whole.manifest.samples.tolist() and other.fingerprint != whole.manifest.fingerprint


def test_two_runs_at_once_are_refused(raw, tmp_path):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(PrepareError, match="another prepare is writing"):
            go(raw[0], tmp_path / "out")
    finally:
        os.close(descriptor)
    assert go(raw[0], tmp_path / "out").fresh


# Full disks


def limited(folder, out, workers, size):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()),) * 2);"
        "from data_pipelines.__main__ import main; sys.exit(main())"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "prepare",
        str(folder),
        "--out",
        str(out),
        "--workers",
        str(workers),
        str(size),
    ]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(raw, tmp_path):
    out = tmp_path / "out"
    result = limited(raw[0], out, 1, 200_000)
    assert result.returncode == 1 and "File too large" in result.stderr and "Traceback" not in result.stderr
    assert re.search(r"error: .*shards/.*\.arrayrecord", result.stderr)
    assert not list(out.rglob(".partial*")) and not (out / MANIFEST_NAME).exists()
    for records in out.glob("shards/*.arrayrecord"):
        assert records.with_suffix(".arrow").exists()
    go(raw[0], out, clips_per_shard=1000)
    go(raw[0], tmp_path / "straight", clips_per_shard=1000)
    assert tree(out) == tree(tmp_path / "straight")


@pytest.mark.soak
def test_a_really_full_disk_with_workers(raw, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    assert mounted.returncode == 0, f"this test needs root and a machine that lets it mount: {mounted.stderr.strip()}"
    try:
        process = prepare_in_a_process(raw[0], disk / "out", "--workers", "2", "--clips-per-shard", "8")
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1 and "No space left on device" in stderr and "Traceback" not in stderr, stderr
        assert not list(disk.rglob(".partial*")) and not (disk / "out" / MANIFEST_NAME).exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
