"""What lies below a folder: nothing is passed over because it lies behind a link, or cannot be listed."""

import errno
import os
import shutil
import tarfile

import pytest
import soundfile

from data_pipelines.corpora import CorpusError, babel
from data_pipelines.corpora.readers import read
from data_pipelines.folders import CannotList, files_below, matches, walk
from data_pipelines.recordings import NoiseFolder
from tests.data_pipelines.ramps import ramp


@pytest.fixture
def linked(tmp_path):
    """deu/x/a.wav here, fra/x/b.wav on "another disk" and linked, fra/x/up leads back up; hidden files beside."""
    here, elsewhere = tmp_path / "corpus", tmp_path / "disk" / "fra"
    for folder, name in ((here / "deu", "a.wav"), (elsewhere, "b.wav")):
        (folder / "x").mkdir(parents=True)
        soundfile.write(folder / "x" / name, ramp(1, 0, 32_000), 16_000)
    (here / "fra").symlink_to(elsewhere)
    (elsewhere / "x" / "up").symlink_to(elsewhere)
    (here / "deu" / "x" / "._a.wav").write_bytes(b"not audio")
    return here


def test_links_are_followed_once_and_what_is_hidden_is_not_seen(linked):
    assert [path.relative_to(linked).as_posix() for path in files_below(linked)] == ["deu/x/a.wav", "fra/x/b.wav"]
    assert not list(walk(linked / "nowhere"))
    assert len(NoiseFolder(linked)) == 2
    assert {clip.path for clip in read("folder", linked, {}).clips} == {"deu/x/a.wav", "fra/x/b.wav"}


def test_tars_and_language_packs_behind_links_are_found(linked, tmp_path):
    for language in ("deu", "fra"):
        with tarfile.open(linked / language / "x" / "000.tar", "w") as tar:
            tar.add(linked / "deu" / "x" / "a.wav", "a.wav")
    listed = read("webdataset", linked, {"language_folder": 0}).clips
    assert {(clip.id, clip.language) for clip in listed} == {("deu/x/000/a", "deu"), ("fra/x/000/a", "fra")}
    name = "BABEL_BP_{}_10033_20111024_205740_inLine.wav"
    for number, pack in (("101", linked / "101"), ("102", tmp_path / "disk" / "102")):
        audio = pack / "conversational" / "training" / "audio"
        audio.mkdir(parents=True)
        shutil.copy(linked / "deu" / "x" / "a.wav", audio / name.format(number))
    (linked / "102").symlink_to(tmp_path / "disk" / "102")
    assert {clip.language for clip in babel.read(linked).clips} == {"yue", "asm"}


@pytest.mark.parametrize(("reader", "options"), [("folder", {}), ("webdataset", {"language": "fra"})])
def test_a_folder_that_cannot_be_listed_is_an_error(linked, monkeypatch, reader, options):
    scandir = os.scandir

    def refused(path="."):
        if str(path).endswith("fra"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(CannotList, match=r"corpus/fra cannot be listed \(Permission denied\)"):
        read(reader, linked, options)


def test_a_disk_that_does_not_answer_is_an_error_and_a_file_that_is_gone_is_not(linked, monkeypatch):
    (linked / "table.tsv").write_text("path\tlanguage\ndeu/x/a.wav\tdeu\nfra/x/b.wav\tfra\nfra/x/c.wav\tfra\n")
    assert [r.path for r in read("folder", linked, {"table": "table.tsv"}).rejected] == ["fra/x/c.wav"]
    stat = os.stat

    def stale(path, *given, **named):
        if str(path).endswith("b.wav"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(CorpusError, match=r"corpus/fra/x/b.wav cannot be looked at \(Stale file handle\)"):
        read("folder", linked, {"table": "table.tsv"})


@pytest.mark.parametrize(
    ("path", "pattern", "found"),
    [
        ("a.tar", "**/*.tar", True),
        ("x/y/a.tar", "**/*.tar", True),
        ("x/y/a.tar", "x/**/*.tar*", True),
        ("x/y/a.tar", "y/**/*.tar", False),
        ("x/y/a.tar", "**/y/*", True),
        ("x/a.tar", "**", True),
        ("x/a.tar", "*.tar", False),
        ("x/A.TAR", "**/*.tar", False),
    ],
)
def test_patterns(path, pattern, found):
    assert matches(path.split("/"), pattern.split("/")) is found
