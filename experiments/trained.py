"""Trained stages, read back from a workdir."""

from pathlib import Path

from jax.sharding import Mesh

import wavlab_jax.model as models
from experiments.stage_files import StageFiles
from wavlab_jax.checkpoint import CheckpointError, restore_parameters
from wavlab_jax.encoder import Encoder
from wavlab_jax.sharding import abstract_on


def load_model(workdir: Path, stage: str, mesh: Mesh) -> models.Model:
    """The newest model of a stage, placed on `mesh`. Raises CheckpointError if it was not trained there."""
    files = StageFiles(workdir, stage)
    if not files.model.exists():
        raise CheckpointError(
            f"{files.folder} holds no trained model: run `python -m experiments train {stage} --workdir {workdir}`"
        )
    described = models.read_description(files.model)
    like = abstract_on(models.abstract_parameters(described.encoder, described.head), mesh)
    return models.assemble(restore_parameters(files.checkpoints, like), described.encoder, described.head)


def load_encoder(workdir: Path, stage: str, mesh: Mesh) -> Encoder:
    """The encoder of `load_model`."""
    return load_model(workdir, stage, mesh).encoder
