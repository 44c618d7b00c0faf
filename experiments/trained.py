"""Trained stages, read back from a workdir, and imported models in their place."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import wavlab_jax.model as models
from data_pipelines.identity import corpus_identity, what_changed
from data_pipelines.manifest import Manifest
from experiments.stage_files import StageFiles
from wavlab_jax.checkpoint import CheckpointError, restore_parameters
from wavlab_jax.convert.checkpoint import to_encoder
from wavlab_jax.convert.layouts import read_checkpoint
from wavlab_jax.convert.names import flatten, unflatten
from wavlab_jax.encoder import Encoder, EncoderConfig
from wavlab_jax.sharding import abstract_on, parameter_shardings


class CorpusChanged(ValueError):
    """A stage of this workdir heard another corpus than the one at hand; the message names both and what to do."""


def imported_model(workdir: Path, name: str) -> Path | None:
    """The path of an imported model that stands where a stage could; None for a stage of this workdir.

    What looks like a path is one; a plain name is a stage, unless there is none in the workdir and such a path exists.
    """
    path = Path(name)
    if os.sep not in name and (StageFiles(workdir, name).folder.exists() or not path.exists()):
        return None
    return path


def is_finished(files: StageFiles) -> bool:
    """Whether a stage was trained to its last step, and what came of that is still there."""
    if not files.finished.exists():
        return False
    return (files.checkpoints / str(json.loads(files.finished.read_text())["step"])).is_dir()


def check_corpus(files: StageFiles, manifest: Manifest) -> None:
    """Raises CorpusChanged if the stage was begun on another corpus than `manifest`, naming both."""
    if not files.inputs.exists():
        return
    heard = json.loads(files.inputs.read_text())["corpus"]
    if heard != manifest.fingerprint:
        raise CorpusChanged(
            f"{files.folder} was trained on another corpus than the one that now lies in {manifest.root}: fingerprint "
            f"{heard} then, {manifest.fingerprint} now; give --corpus the one it was trained on, or another --workdir "
            "to train anew" + "".join(f"\n  {line}" for line in _differences(files, manifest))
        )


def _differences(files: StageFiles, manifest: Manifest) -> list[str]:
    """What of the corpus is not as it was, where the run says how it was."""
    if not files.data.exists():
        return []
    now = corpus_identity(manifest)
    then = json.loads(files.data.read_text())
    return what_changed({key: value for key, value in then.items() if key in now or key.startswith("hours of")}, now)


def lineage(workdir: Path, stage: str) -> str:
    """A digest of how a trained stage came about: its configuration, its inputs, and through them those before it.

    Of an imported model: of its architecture and its tensors, wherever they lie. Reads all of them.
    """
    imported = imported_model(workdir, stage)
    if imported is not None:
        return _fingerprint(imported)
    files = StageFiles(workdir, stage)
    if not is_finished(files):
        base, _, mean = stage.partition("@")
        command = f"average {base} --last N --name {mean}" if mean else f"train {stage}"
        fork = "" if mean or files.config.exists() else f"; under a name of its own: `train STAGE --name {stage} ...`"
        raise CheckpointError(
            f"{files.folder} holds no stage that was trained to its end: run `python -m experiments {command} "
            f"--workdir {workdir}` first{fork}"
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
    """The encoder of `load_model`, or of an imported model; placed on `mesh`."""
    imported = imported_model(workdir, stage)
    if imported is None:
        return load_model(workdir, stage, mesh).encoder
    encoder = to_encoder(read_checkpoint(imported))
    graph, state = nnx.split(encoder)
    params = {"encoder": models.parameters(encoder)}
    placed = jax.device_put(params, parameter_shardings(params, mesh))["encoder"]
    nnx.replace_by_pure_dict(state, unflatten(flatten(placed)))
    return nnx.merge(graph, state)


def _fingerprint(path: Path) -> str:
    checkpoint = read_checkpoint(path)
    defaults = asdict(EncoderConfig())  # left out, so that a field that is added later changes nothing
    said = sorted((name, value) for name, value in asdict(checkpoint.encoder).items() if value != defaults[name])
    digest = hashlib.sha256(repr(said).encode())
    for group in (checkpoint.tensors, checkpoint.heads):
        for name in sorted(group):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(group[name].values()).data)
    return digest.hexdigest()[:16]
