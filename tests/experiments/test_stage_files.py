"""Where a stage keeps what."""

from pathlib import Path

import pytest

from data_pipelines.storage import StorageError
from experiments import recipes
from experiments.stage_files import StageFiles


def test_a_workdir_at_an_address_is_refused(tmp_path, monkeypatch):
    """As a path it would be a folder called "gs:" on this machine's disk, which a pod's machine loses."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="gs://bucket/work: a workdir must be local"):
        recipes.run_recipe("wavlablm", Path("gs://bucket/work"), corpus=tmp_path)
    with pytest.raises(StorageError, match="s3://bucket/work: a workdir must be local"):
        StageFiles(Path("s3://bucket/work"), "wavlab_mk")
    assert not list(tmp_path.iterdir())
    assert StageFiles(Path("work"), "wavlab_mk").folder == Path("work/stages/wavlab_mk")
