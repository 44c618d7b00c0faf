"""What is judged: an encoder by name, frozen; or nothing but log-mel features."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jax.sharding import Mesh

import wavlab_jax.model as models
from experiments.mlsuperb.protocol import ProtocolError
from experiments.stage_files import StageFiles
from experiments.stages import stage_function
from experiments.trained import imported_model, lineage, load_encoder
from wavlab_jax.convert.checkpoint import to_encoder
from wavlab_jax.convert.layouts import read_checkpoint
from wavlab_jax.encoder import EncoderConfig, make_encoder
from wavlab_jax.encoder.architectures import TABLE, architecture
from wavlab_jax.model import Parameters
from wavlab_jax.sharding import parameter_shardings

LOG_MEL, RANDOM = "log-mel", "random:"


class FrozenEncoder(NamedTuple):
    """Attributes:
    name: of its folder and its row in the table.
    kind: where it came from.
    identity: a digest of how it came about, or of its tensors.
    config: without layerdrop, as s3prl has it, and in float32; None of log-mel.
    params: nested dict on the mesh; None of log-mel.
    notes: what had to be assumed when it was read.
    """

    name: str
    kind: Literal["stage", "imported", "random", "log-mel"]
    identity: str
    config: EncoderConfig | None
    params: Parameters | None
    notes: tuple[str, ...] = ()


def read_encoder(
    model: str,
    *,
    workdir: Path,
    mesh: Mesh,
    name: str | None = None,
    architecture: EncoderConfig | None = None,
    normalize_waveform: bool | None = None,
) -> FrozenEncoder:
    """The encoder that `model` names, on `mesh`.

    Args:
        model: a stage that was trained in `workdir`; a file or folder that `import` takes, such as a Hugging Face
            folder; "random:" and what `shape_of` takes, for a freshly initialised encoder of that shape; "log-mel".
        name: in place of the one that follows from `model`.
        architecture, normalize_waveform: for files that do not say, as `read_checkpoint` takes them.

    Raises CheckpointError (a stage that was not trained there), ConvertError (no model at that path), ProtocolError (a
    name that is none of a folder), and what `shape_of` raises.
    """
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise ProtocolError(f"name is {name!r}; results go to WORKDIR/mlsuperb/NAME: give the name of one folder")
    said = {"architecture": architecture, "normalize_waveform": normalize_waveform}
    if model == LOG_MEL:
        return FrozenEncoder(name or LOG_MEL, "log-mel", LOG_MEL, None, None)
    if model.startswith(RANDOM):
        of = model.removeprefix(RANDOM)
        config = shape_of(of, workdir=workdir, **said)
        if config is None:
            raise ProtocolError(f"{model}: {LOG_MEL} has no encoder that could be random")
        identity = f"random 0 {hashlib.sha256(repr(config).encode()).hexdigest()[:16]}"
        params = _laid_out(lambda: models.parameters(make_encoder(jax.random.key(0), config)), mesh)
        return FrozenEncoder(name or f"random-{_stem(of)}", "random", identity, _quiet(config), params)
    path = imported_model(workdir, model)
    if path is None:
        encoder = load_encoder(workdir, model, mesh)
        identity = lineage(workdir, model)
        return FrozenEncoder(name or model, "stage", identity, _quiet(encoder.config), models.parameters(encoder))
    checkpoint = read_checkpoint(path, **said)
    params = {"encoder": models.parameters(to_encoder(checkpoint))}
    params = jax.device_put(params, parameter_shardings(params, mesh))["encoder"]
    identity = f"{lineage(workdir, model)} {normalize_waveform}"
    return FrozenEncoder(
        name or _stem(model), "imported", identity, _quiet(checkpoint.encoder), params, checkpoint.notes
    )


def shape_of(model: str, *, workdir: Path, **said) -> EncoderConfig | None:
    """The encoder that `superb MODEL` would judge, or an architecture of that name, or that of a stage that was not
    begun; None of log-mel. `said` as `read_checkpoint` takes it.

    Raises ConvertError (no model at that path), ProtocolError (no such name).
    """
    if model == LOG_MEL:
        return None
    of = model.removeprefix(RANDOM)
    path = imported_model(workdir, of)
    if path is not None:
        return read_checkpoint(path, **said).encoder
    files = StageFiles(workdir, of)
    if files.model.exists():
        return models.read_description(files.model).encoder
    if of in TABLE:
        return architecture(of)
    try:
        return stage_function(of)().learner.encoder
    except ValueError as error:
        raise ProtocolError(f"{error}; nor is it an architecture: `python -m experiments list` has both") from error


def draws_noise(config: EncoderConfig | None) -> bool:
    """Whether there is any dropout in it."""
    rates = ("dropout", "attention_dropout", "activation_dropout", "projection_dropout")
    return config is not None and any(getattr(config, rate) for rate in rates)


def _quiet(config: EncoderConfig) -> EncoderConfig:
    """As it is judged: every layer, in float32, whatever a stage was trained in (ESPnet judges in float32)."""
    return replace(config, layerdrop=0.0, compute_dtype="float32")


def _stem(model: str) -> str:
    """A name that follows from a path: of a file without its ending, of a folder the whole (mHuBERT-0.3B)."""
    if "/" not in model:
        return model
    path = Path(model).resolve()
    return path.name if path.is_dir() else path.stem


def _laid_out(make, mesh: Mesh) -> Parameters:
    """What `make` returns, made where it lies on the mesh."""
    places = parameter_shardings({"encoder": jax.eval_shape(make)}, mesh)["encoder"]
    return jax.jit(make, out_shardings=places)()
