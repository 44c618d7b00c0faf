"""The composition files are tables of known readers, ISO 639-3 codes and folders that occur once."""

import tomllib
from pathlib import Path

import pytest

import data_pipelines
from data_pipelines.languages import normalise

FILES = sorted((Path(data_pipelines.__file__).parent / "compositions").glob("*.toml"))
READERS = {
    *("common_voice", "mls", "voxpopuli", "fleurs", "voxlingua107", "babel", "openslr", "librispeech", "librilight"),
    *("voxforge", "folder"),
}


def test_the_three_sets_are_there():
    assert [path.stem for path in FILES] == ["common_voice", "forty_thousand_hours", "librispeech"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_entries(path):
    corpora = tomllib.loads(path.read_text(encoding="utf-8"))["corpus"]
    for corpus in corpora:
        assert set(corpus) - {"language", "options"} == {"name", "reader", "folder"}
        assert corpus["reader"] in READERS and not Path(corpus["folder"]).is_absolute()
        assert "language" not in corpus or normalise(corpus["language"]) == corpus["language"]
    folders = [corpus["folder"] for corpus in corpora]
    assert len(set(folders)) == len(folders)
