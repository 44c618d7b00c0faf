"""Judging trained stages: masked accuracy on held-out clips, and a language probe across sources."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.atomic import whole_file
from data_pipelines.batch import HOP, NO_UTTERANCE, RECEPTIVE_FIELD
from data_pipelines.manifest import Manifest, Split
from data_pipelines.pipeline import eval_batches
from data_pipelines.units import UnitStore
from experiments.run import write_json
from experiments.stage import StageConfig
from experiments.stage_files import StageFiles
from experiments.trained import load_encoder
from experiments.units import UnitFiles
from wavlab_jax.checkpoint import restore_parameters
from wavlab_jax.encoder import Encoder, EncoderConfig, encode, formulation_for, make_encoder
from wavlab_jax.evaluation import language_probe
from wavlab_jax.evaluation.masked_accuracy import ClipScores, by_language, macro, score_clips, summary
from wavlab_jax.features import log_mel
from wavlab_jax.sharding import BATCH_AXES, abstract_on, make_mesh, place_batch
from wavlab_jax.step import abstract_state, make_predict_step

LENGTHS = (32_000, 64_000, 128_000)  # held-out clips are padded to the smallest that holds them, longer ones windowed


def evaluate_stage(cfg: StageConfig, *, workdir: Path, corpus: Path) -> dict:
    """Masked accuracy of a trained stage on every held-out clip, overall and by language; kept beside the stage."""
    files = StageFiles(workdir, cfg.name)
    manifest = Manifest.load(corpus)
    units = UnitStore.load(UnitFiles(workdir, cfg.units.name).store, manifest)
    mesh = make_mesh(cfg.mesh)
    params = restore_parameters(files.checkpoints, abstract_on(abstract_state(cfg.learner, mesh).params, mesh))
    predict = make_predict_step(cfg.learner, mesh)
    rows = held_out(manifest)
    if not len(rows):
        result = {"stage": cfg.name, "note": "no held-out data"}
        write_json(files.evaluation, result)
        return result
    majority = int(units.counts(manifest.rows(Split.TRAIN)).argmax())
    per_batch = -(-cfg.evaluation_rows // mesh.size) * mesh.size
    with eval_batches(manifest, units, rows, lengths=LENGTHS, rows_per_batch=per_batch) as batches:
        scores = score_clips(
            lambda batch: predict(params, place_batch(batch, mesh=mesh, passes=1)), batches, majority=majority
        )
    with whole_file(files.clips) as temporary, open(temporary, "wb") as file:
        np.savez(file, **scores._asdict())
    languages = by_language(scores, manifest.languages)
    result = {
        "stage": cfg.name,
        "unit_set": cfg.units.name,
        "units": cfg.units.units,
        "total": summary(scores),
        "macro": macro(languages),
        "languages": languages,
    }
    write_json(files.evaluation, result)
    return result


def load_scores(workdir: Path, stage: str) -> ClipScores:
    """The clip scores that `evaluate_stage` kept."""
    with np.load(StageFiles(workdir, stage).clips, allow_pickle=False) as kept:
        return ClipScores(**{name: kept[name] for name in ClipScores._fields})


def held_out(manifest: Manifest) -> np.ndarray:
    """Rows of the dev and test splits together: nothing is selected on either, so both are held out."""
    return np.sort(np.concatenate([manifest.rows(Split.DEV), manifest.rows(Split.TEST)]))


def probe_stages(stages: list[StageConfig], *, workdir: Path, corpus: Path, seed: int = 0) -> dict:
    """A linear probe for language across sources, on the middle layer of each stage, an untrained encoder and log-mel.

    The layer is fixed beforehand, the middle one of each, because choosing the best on the test clips would not be honest.
    """
    manifest = Manifest.load(corpus)
    mesh = make_mesh(stages[0].mesh)
    encoders = {cfg.name: load_encoder(workdir, cfg.name, mesh) for cfg in stages}
    shape = dataclasses.replace(stages[-1].learner.encoder)
    encoders["untrained encoder"] = untrained(shape, seed=seed)
    sets = {"log-mel": (None, pooled(_log_mel(mesh), manifest, mesh))}
    for name, encoder in encoders.items():
        layer = encoder.config.layers // 2
        sets[f"{name}, layer {layer}"] = (layer, pooled(_hidden(encoder, layer, mesh), manifest, mesh))
    clips = language_probe.ProbeClips(
        language=np.asarray(manifest.language), source=np.asarray(manifest.corpus), split=np.asarray(manifest.split)
    )
    return language_probe, sets, clips


def untrained(cfg: EncoderConfig, *, seed: int) -> Encoder:
    """A randomly initialised encoder of this shape: what the architecture alone gives."""
    return make_encoder(jax.random.key(seed), cfg)


def pooled(frames: Callable, manifest: Manifest, mesh: Mesh) -> np.ndarray:
    """[utterances, 2 * width]: mean and standard deviation over each utterance's frames (of its first 8 s)."""
    every = np.arange(len(manifest))
    found: dict[int, np.ndarray] = {}
    per_batch = 16 * mesh.size
    with eval_batches(manifest, None, every, lengths=LENGTHS, rows_per_batch=per_batch) as batches:
        for batch in batches:
            placed = place_batch(batch, mesh=mesh, passes=1)
            vectors = np.asarray(frames(placed.waveform, placed.valid))
            for row, (utterance, start) in enumerate(zip(batch.utterance.tolist(), batch.start.tolist(), strict=True)):
                if utterance != NO_UTTERANCE and start == 0:
                    found[utterance] = vectors[row]
    return np.stack([found[i] for i in every.tolist()])


def _pool(values: jax.Array, valid: jax.Array) -> jax.Array:
    weight = valid[..., None] / jnp.maximum(valid.sum(axis=1), 1)[:, None, None]
    mean = jnp.sum(values * weight, axis=1)
    variance = jnp.sum(jnp.square(values - mean[:, None]) * weight, axis=1)
    return jnp.concatenate([mean, jnp.sqrt(variance)], axis=1)


def _log_mel(mesh: Mesh) -> Callable:
    return _jitted(lambda waveform, valid: _pool(log_mel(waveform[0]), valid[0]), mesh)


def _hidden(encoder: Encoder, layer: int, mesh: Mesh) -> Callable:
    formulation = formulation_for(mesh.devices.flat[0].platform)

    def frames(waveform, valid):
        samples = valid[0].sum(axis=1) * HOP + RECEPTIVE_FIELD - HOP
        real = jnp.arange(waveform.shape[2])[None] < samples[:, None]
        hidden = encode(encoder, waveform[0], real, formulation=formulation).hidden[layer]
        return _pool(hidden.astype(jnp.float32), valid[0])

    return _jitted(frames, mesh)


def _jitted(function: Callable, mesh: Mesh) -> Callable:
    rows = NamedSharding(mesh, P(None, BATCH_AXES))
    return jax.jit(function, in_shardings=(rows, rows), out_shardings=NamedSharding(mesh, P()))
