"""Files and folders that are whole or absent: on full disks, after kills, and in which order they reach the disk."""

import errno
import os
import pickle
import subprocess
import sys

import pytest

from data_pipelines import atomic
from data_pipelines.atomic import (
    TEMPORARY_PREFIX,
    CannotWrite,
    cannot_write,
    delete_leftovers,
    whole_file,
    whole_folder,
)


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def left_by(pid, name, machine=None):
    return f"{TEMPORARY_PREFIX}{machine or atomic._machine()}-{pid}-0123abcd-{name}"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("two")
        raise KeyboardInterrupt
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with whole_folder(tmp_path / "above" / "folder") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("one")
    assert (tmp_path / "above/folder/inner/file").read_text() == "one"
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other") as temporary:
        (temporary / "file").write_text("two")
        raise KeyboardInterrupt
    with pytest.raises(FileExistsError, match="exists by now"), whole_folder(tmp_path / "above") as temporary:
        (temporary / "file").write_text("two")
    assert os.listdir(tmp_path) == ["above"] and os.listdir(tmp_path / "above") == ["folder"]


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events = []

    def recording(name, function):
        def recorded(what, *rest):
            where = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            events.append((name, "temporary" if TEMPORARY_PREFIX in where else os.path.relpath(where, tmp_path)))
            return function(what, *rest)

        return recorded

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, recording(name, getattr(os, name)))
    with whole_file(tmp_path / "file") as temporary:
        temporary.write_text("one")
    assert events == [("fsync", "temporary"), ("replace", "temporary"), ("fsync", ".")]
    events.clear()
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("one")
    assert events == [("fsync", "temporary")] * 2 + [("rename", "temporary"), ("fsync", ".")]


def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path):
    """/dev/full takes nothing, and says so in the kernel's own words; the next attempt finds space."""
    path = tmp_path / "file"
    path.write_text("one")
    for _ in range(2):
        with pytest.raises(CannotWrite) as raised, whole_file(path) as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("two")
        assert str(raised.value) == (
            f"{path} cannot be written (No space left on device): free some space, then run the same command again"
        )
        assert raised.value.errno == errno.ENOSPC
        assert path.read_text() == "one" and os.listdir(tmp_path) == ["file"]
    with whole_file(path) as temporary:
        temporary.write_text("two")
    assert path.read_text() == "two"


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), whole_file(tmp_path / "file"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(CannotWrite, match=r"nowhere/file cannot be written \(No such file"):
        with whole_file(tmp_path / "nowhere" / "file") as temporary:
            temporary.write_text("one")


def test_reasons_are_found_in_the_words_of_libraries_and_survive_a_worker(tmp_path):
    error = cannot_write(RuntimeError("IO failed: No space left on device [long story]"), tmp_path)
    assert error.errno == errno.ENOSPC and "long story" not in str(error)
    assert cannot_write(error, "elsewhere") is error
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    unknown = cannot_write(RuntimeError("out\nof luck"), tmp_path)
    assert unknown.errno == errno.EIO and "(out of luck): mend that" in str(unknown)


def test_what_dead_writers_left_is_deleted_by_the_next_one(tmp_path, dead):
    (tmp_path / left_by(dead, "file")).write_text("half")
    (tmp_path / left_by(dead, "folder")).mkdir()
    (tmp_path / left_by(dead, "folder") / "file").write_text("half")
    (tmp_path / left_by(dead, "link")).symlink_to(tmp_path)
    stays = {
        left_by(os.getpid(), "file"): "this process is at it",
        left_by(1, "file"): "so is another one, of another user perhaps",
        left_by(dead, "file", machine="00000000"): "nobody here knows whether its writer lives",
        f"{TEMPORARY_PREFIX}file": "nobody knows who wrote it",
    }
    for name in stays:
        (tmp_path / name).write_text("half")
    with whole_file(tmp_path / "another") as temporary:
        temporary.write_text("whole")
    assert set(os.listdir(tmp_path)) == {*stays, "another"}
    (tmp_path / left_by(dead, "file")).write_text("half")
    with whole_folder(tmp_path / "folder"):
        pass
    assert set(os.listdir(tmp_path)) == {*stays, "another", "folder"}
    assert delete_leftovers(tmp_path, everyones=True) == 4
    assert set(os.listdir(tmp_path)) == {"another", "folder"}


def test_what_a_killed_process_left_is_known_by_its_name(tmp_path):
    code = (
        "import os, signal, sys; from data_pipelines.atomic import whole_file, whole_folder\n"
        "with whole_file(sys.argv[1]) as file, whole_folder(sys.argv[2]):\n"
        "    file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file"), str(tmp_path / "folder")]
    for _ in range(2):
        assert subprocess.run(command, timeout=60).returncode == -9
        assert len(leftovers(tmp_path)) == 2
    assert delete_leftovers(tmp_path) == 2 and os.listdir(tmp_path) == []
