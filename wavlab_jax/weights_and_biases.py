"""Metrics in Weights & Biases as well, where it is installed: `--loop.wandb PROJECT`."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.atomic import whole_file


class TrackerError(RuntimeError):
    """Weights & Biases was asked for and cannot be used; the message says what to do."""


class WandbTracker:
    """A `metrics.Tracker`: one run there for one folder here, however often it is continued.

    The run's id lies in FOLDER/wandb.json. A run that was killed goes back to its last checkpoint and makes the lines
    after it again, the same ones; W&B keeps those that it has (it takes no step that is not after the last one).
    WANDB_MODE=offline writes to FOLDER/wandb, for `wandb sync`.
    """

    def __init__(self, folder: Path, *, project: str, name: str, config: Mapping[str, Any]):
        """`config` is shown beside the run. Raises TrackerError if wandb is not installed or refuses to begin."""
        try:
            import wandb
        except ImportError as error:
            raise TrackerError(
                f"loop.wandb is {project!r}, but Weights & Biases is not installed: pip install wandb, or leave it "
                "out; metrics.jsonl and TensorBoard have the same numbers"
            ) from error
        path = folder / "wandb.json"
        if path.exists():
            identity = json.loads(path.read_text())["id"]
        else:
            identity = secrets.token_hex(4)
            with whole_file(path) as temporary:
                temporary.write_text(json.dumps({"id": identity}) + "\n")
        try:
            self._run = wandb.init(
                project=project, name=name, id=identity, resume="allow", dir=str(folder), config=dict(config)
            )
        except Exception as error:  # of its own classes: no key, no network
            raise TrackerError(
                f"loop.wandb is {project!r}, but Weights & Biases did not begin ({error}): `wandb login`, or "
                "WANDB_MODE=offline and `wandb sync` later, or leave it out"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until everything is sent, or written if offline."""
        self._run.finish()
