"""Where a stage keeps what, below a workdir."""

from pathlib import Path


class StageFiles:
    """Paths of one stage's files; none need exist."""

    def __init__(self, workdir: Path, stage: str):
        self.folder = Path(workdir) / "stages" / stage
        self.config = self.folder / "config.txt"
        self.inputs = self.folder / "inputs.json"
        self.data = self.folder / "data.json"
        self.model = self.folder / "model.json"
        self.checkpoints = self.folder / "checkpoints"
        self.metrics = self.folder
        self.finished = self.folder / "finished.json"
        self.evaluation = self.folder / "evaluation.json"
        self.clips = self.folder / "clips.npz"
