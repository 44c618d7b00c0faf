"""Where a stage keeps what, below a workdir."""

import json
from pathlib import Path

from data_pipelines import storage
from data_pipelines.atomic import whole_file


class StageFiles:
    """Paths of one stage's files; none need exist. Raises StorageError if the workdir is an address (gs://...)."""

    def __init__(self, workdir: Path, stage: str):
        self.folder = storage.local(workdir, what="a workdir") / "stages" / stage
        self.config = self.folder / "config.txt"
        self.inputs = self.folder / "inputs.json"
        self.data = self.folder / "data.json"
        self.model = self.folder / "model.json"
        self.checkpoints = self.folder / "checkpoints"
        self.metrics = self.folder
        self.first_probe = self.folder / "first_probe.npz"
        self.finished = self.folder / "finished.json"
        self.evaluation = self.folder / "evaluation.json"
        self.clips = self.folder / "clips.npz"


def write_json(path: Path, content) -> None:
    """`content` as indented JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
