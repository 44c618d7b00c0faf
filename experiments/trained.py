"""Trained stages, read back from a workdir."""

import hashlib
from pathlib import Path

from jax.sharding import Mesh

import wavlab_jax.model as models
from experiments.stage_files import StageFiles
from wavlab_jax.checkpoint import CheckpointError, restore_parameters
from wavlab_jax.encoder import Encoder
from wavlab_jax.sharding import abstract_on


def lineage(workdir: Path, stage: str) -> str:
    """A digest of how a trained stage came about: its configuration, its inputs, and through them those before it."""
    files = StageFiles(workdir, stage)
    if not files.finished.exists():
        raise CheckpointError(
            f"{files.folder} holds no stage that was trained to its end: run `python -m experiments train {stage} "
            f"--workdir {workdir}` first"
        )
    made_by = files.config.read_bytes() + files.inputs.read_bytes() + files.finished.read_bytes()
    return hashlib.sha256(made_by).hexdigest()[:16]


def load_model(workdir: Path, stage: str, mesh: Mesh) -> models.Model:
    """The newest model of a stage, placed on `mesh`. Raises CheckpointError if it was not trained there."""
    files = StageFiles(workdir, stage)
    lineage(workdir, stage)
    described = models.read_description(files.model)
    like = abstract_on(models.abstract_parameters(described.encoder, described.head), mesh)
    return models.assemble(restore_parameters(files.checkpoints, like), described.encoder, described.head)


def load_encoder(workdir: Path, stage: str, mesh: Mesh) -> Encoder:
    """The encoder of `load_model`."""
    return load_model(workdir, stage, mesh).encoder
