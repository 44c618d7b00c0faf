"""Judging trained stages: masked accuracy on held-out clips, and a language probe across sources."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.atomic import whole_file
from data_pipelines.batch import NO_UTTERANCE
from data_pipelines.manifest import Manifest, Split
from data_pipelines.pipeline import eval_batches
from data_pipelines.units import UnitStore
from experiments.run import write_json
from experiments.stage import StageConfig, check_unchanged
from experiments.stage_files import StageFiles
from experiments.trained import lineage, load_encoder
from experiments.units import UnitFiles
from wavlab_jax.checkpoint import restore_parameters
from wavlab_jax.encoder import Encoder, encode, formulation_for, make_encoder
from wavlab_jax.evaluation import language_probe
from wavlab_jax.evaluation.masked_accuracy import ClipScores, by_language, macro, score_clips, summary
from wavlab_jax.features import log_mel
from wavlab_jax.sharding import BATCH_AXES, abstract_on, make_mesh, place_batch
from wavlab_jax.step import abstract_state, make_predict_step

LENGTHS = (32_000, 64_000, 128_000)  # held-out clips are padded to the smallest that holds them, longer ones windowed


def evaluate_stage(cfg: StageConfig, *, workdir: Path, corpus: Path) -> dict:
    """Masked accuracy of a trained stage on every held-out clip, overall and by language; kept beside the stage."""
    files = StageFiles(workdir, cfg.name)
    lineage(workdir, cfg.name)
    check_unchanged(cfg, files)
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

    Every encoder is probed at its middle layer, fixed beforehand: choosing the best one on the test clips would not be
    honest. The last stage is compared with all others.
    """
    manifest = Manifest.load(corpus)
    mesh = make_mesh(stages[0].mesh)
    encoders: dict[str, Encoder] = {cfg.name: load_encoder(workdir, cfg.name, mesh) for cfg in stages}
    encoders["untrained encoder"] = make_encoder(jax.random.key(seed), stages[-1].learner.encoder)
    labels = {
        "languages": [manifest.languages[code] for code in manifest.language],
        "sources": [manifest.corpora[code] for code in manifest.corpus],
        "train": np.asarray(manifest.split) == Split.TRAIN,
    }
    results, layers = {}, {}
    for name, frames in [("log-mel", _log_mel(mesh)), *((n, _hidden(e, mesh)) for n, e in encoders.items())]:
        try:
            results[name] = language_probe.evaluate(pool_utterances(frames, manifest, mesh), **labels)
        except language_probe.ProbeError as error:
            return {"note": str(error)}
        layers[name] = encoders[name].config.layers // 2 if name in encoders else None
    last = stages[-1].name
    return {
        "protocol": PROTOCOL,
        "rows": [_probe_row(name, layers[name], result) for name, result in results.items()],
        "differences": [
            _probe_difference(last, name, language_probe.compare(results[last], result))
            for name, result in results.items()
            if name != last
        ],
        "languages": {
            name: {line.language: {"clips": line.clips, "accuracy": line.accuracy} for line in result.languages}
            for name, result in results.items()
        },
        "details": {name: result.to_json() for name, result in results.items()},
    }


PROTOCOL = (
    "Each source (corpus) is held out once: a linear classifier learns languages from the training clips of all other "
    "sources and is tested on the held-out clips of this one, among the languages on both sides. Features are the mean "
    "and standard deviation over time (of the first 8 s) of a frozen layer, the middle one of each encoder, fixed "
    "beforehand. Accuracy is the mean over languages. Intervals are 95 % bootstrap intervals that redraw whole "
    "(language, source) cells, or clips if there are fewer than five cells. " + language_probe.CAVEAT
)


def _probe_row(name: str, layer: int | None, result: language_probe.ProbeResult) -> dict:
    return {
        "name": name,
        "layer": layer,
        "accuracy": result.accuracy,
        "low": result.interval.low,
        "high": result.interval.high,
        "chance": result.chance,
        "clips": result.clips,
        "languages": len(result.languages),
        "folds": len(result.folds),
        "verdict_against_chance": result.against_chance.verdict,
    }


def _probe_difference(of: str, against: str, found: language_probe.Comparison) -> dict:
    return {
        "of": of,
        "against": against,
        "difference": found.difference,
        "low": found.interval.low,
        "high": found.interval.high,
        "verdict": found.verdict,
    }


def pool_utterances(frames: Callable, manifest: Manifest, mesh: Mesh) -> np.ndarray:
    """[utterances, 2 * width]: mean and standard deviation over each utterance's frames (of its first 8 s)."""
    every = np.arange(len(manifest))
    found: dict[int, np.ndarray] = {}
    per_batch = 16 * mesh.size
    with eval_batches(manifest, None, every, lengths=LENGTHS, rows_per_batch=per_batch) as batches:
        for batch in batches:
            placed = place_batch(batch, mesh=mesh, passes=1)
            vectors = np.asarray(frames(placed.waveform, placed.samples, placed.valid))
            for row, (utterance, start) in enumerate(zip(batch.utterance.tolist(), batch.start.tolist(), strict=True)):
                if utterance != NO_UTTERANCE and start == 0:
                    found[utterance] = vectors[row]
    return np.stack([found[i] for i in every.tolist()])


def _log_mel(mesh: Mesh) -> Callable:
    return _jitted(lambda waveform, samples, valid: language_probe.pooled(log_mel(waveform[0]), valid[0]), mesh)


def _hidden(encoder: Encoder, mesh: Mesh) -> Callable:
    """The middle layer, pooled."""
    formulation = formulation_for(mesh.devices.flat[0].platform)

    def frames(waveform, samples, valid):
        real = jnp.arange(waveform.shape[2])[None] < samples[0][:, None]
        hidden = encode(encoder, waveform[0], real, formulation=formulation).hidden[encoder.config.layers // 2]
        return language_probe.pooled(hidden, valid[0])

    return _jitted(frames, mesh)


def _jitted(function: Callable, mesh: Mesh) -> Callable:
    rows = NamedSharding(mesh, P(None, BATCH_AXES))
    return jax.jit(function, in_shardings=(rows, rows, rows), out_shardings=NamedSharding(mesh, P()))


def table(result: dict) -> str:
    """What `evaluate_stage` returned, as text: a line a language, those without held-out clips last."""
    if "total" not in result:
        return f"{result['stage']}: {result['note']}"
    lines = [f"{'':<6} {'clips':>6} {'frames':>8} {'accuracy':>9} {'majority':>9} {'copy':>9}"]
    rows = {**result["languages"], "all": result["total"]}
    for name, row in sorted(rows.items(), key=lambda item: (item[0] == "all", not item[1]["frames"], item[0])):
        if row["frames"]:
            shares = " ".join(f"{row[key]:>9.3f}" for key in ("accuracy", "majority", "copy"))
            lines.append(f"{name:<6} {row['clips']:>6,} {row['frames']:>8,} {shares}")
        else:
            lines.append(f"{name:<6} no held-out data")
    return "\n".join(lines)
