"""The composition files that are shipped name readers and options that there are, and folders that occur once."""

from pathlib import Path

import pytest

import data_pipelines
from data_pipelines.compositions import read_composition

FILES = sorted((Path(data_pipelines.__file__).parent / "compositions").glob("*.toml"))


def test_the_three_sets_are_there():
    assert [path.stem for path in FILES] == ["common_voice", "forty_thousand_hours", "librispeech"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_entries(path):
    corpora = read_composition(path)
    assert len({corpus.folder for corpus in corpora}) == len(corpora)
    assert all(corpus.folder.parent == path.parent for corpus in corpora)
