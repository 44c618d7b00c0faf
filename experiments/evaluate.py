"""Judging trained stages: masked accuracy on held-out clips, and a language probe across sources."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from data_pipelines.atomic import whole_file
from data_pipelines.batch import NO_UTTERANCE, SAMPLE_RATE, Batch
from data_pipelines.manifest import Manifest, Split
from data_pipelines.pipeline import eval_batches
from experiments.hosts import is_first
from experiments.stage import StageConfig, check_unchanged
from experiments.stage_files import StageFiles, write_json
from experiments.targets import Labels, is_online, make_labels
from experiments.trained import check_corpus, lineage, load_encoder
from experiments.units import fit_sample
from wavlab_jax.checkpoint import restore_parameters
from wavlab_jax.encoder import Encoder, encode, formulation_for, make_encoder
from wavlab_jax.evaluation import language_probe
from wavlab_jax.evaluation.masked_accuracy import ClipScores, by_language, macro, score_clips, summary
from wavlab_jax.features import log_mel
from wavlab_jax.model import Parameters
from wavlab_jax.sharding import BATCH_AXES, abstract_on, make_mesh, place_whole_batch
from wavlab_jax.step import abstract_state, make_predict_step

# Samples. Clips are padded to the smallest that holds them; longer ones are judged in windows, and probed on the first.
LENGTHS = (32_000, 64_000, 128_000)
MAJORITY_HOURS = 1.0  # of training audio, on which units without a store are counted
PROBE_LENGTHS = (32_000, 64_000, 96_000, 128_000)  # the probe hears each clip five times: less padding


def evaluate_stage(cfg: StageConfig, *, workdir: Path, corpus: Path) -> dict:
    """Masked accuracy of a trained stage on every held-out clip, overall and by language; kept beside the stage.

    Of a contrastive stage: the share of hidden frames whose positive was picked, without trivial predictors.
    """
    files = StageFiles(workdir, cfg.name)
    lineage(workdir, cfg.name)
    check_unchanged(cfg, files, advice="a stage is judged as it was trained: leave these values out")
    manifest = Manifest.load(corpus)
    check_corpus(files, manifest)
    mesh = make_mesh(cfg.mesh)
    labels = make_labels(cfg.unit_sets, workdir, manifest, mesh, stored=True)
    params = restore_parameters(files.checkpoints, abstract_on(abstract_state(cfg.learner, mesh).params, mesh))
    rows = held_out(manifest)
    if not len(rows):
        result = {"stage": cfg.name, "note": "no held-out data"}
        write_json(files.evaluation, result)
        return result
    scores = clip_judge(cfg, labels, manifest, mesh, rows, title=f"evaluate {cfg.name}")(params)
    with whole_file(files.clips) as temporary, open(temporary, "wb") as file:
        np.savez(file, **scores._asdict())
    languages = by_language(scores, manifest.languages)
    result = {
        "stage": cfg.name,
        "unit_set": cfg.units and cfg.units.name,
        "units": cfg.units and cfg.units.units,
        "total": summary(scores),
        "macro": macro(languages),
        "languages": languages,
    }
    write_json(files.evaluation, result)
    return result


def clip_judge(
    cfg: StageConfig,
    labels: Labels,
    manifest: Manifest,
    mesh: Mesh,
    rows: np.ndarray,
    *,
    title: str,
    leave: bool = True,
) -> Callable[[Parameters], ClipScores]:
    """A function from a stage's parameters, laid out on `mesh`, to the scores of the utterances `rows`.

    Compiled once, however often it is called; all processes call it alike. `title` of its bar; `leave`: which stays.
    """
    predict = make_predict_step(cfg.learner, mesh, labels.targets)
    majority = _majority(cfg, labels, manifest, mesh)
    per_batch = shared_rows(cfg.evaluation_rows, mesh)
    hours = _hours(manifest.samples[rows])

    def judge(params: Parameters) -> ClipScores:
        with eval_batches(manifest, labels.stores, rows, lengths=LENGTHS, rows_per_batch=per_batch) as batches:
            return score_clips(
                lambda batch: predict(params, place_whole_batch(batch, mesh=mesh)),
                with_progress(batches, hours=hours, title=title, leave=leave),
                majority=majority,
            )

    return judge


def shared_rows(rows: int, mesh: Mesh) -> int:
    """At least `rows`, and as many on each device."""
    return -(-rows // mesh.size) * mesh.size


def _majority(cfg: StageConfig, labels: Labels, manifest: Manifest, mesh: Mesh) -> int | None:
    """The most frequent unit of the first set in the training split; None without units.

    Counted over the whole split in a store. Units that are computed in the step are counted on a sample of it,
    `MAJORITY_HOURS` drawn by language as found; how often that misses the most frequent unit does not matter, for it
    can only be one that is nearly as frequent.
    """
    if not cfg.unit_sets:
        return None
    if not is_online(cfg.unit_sets[0]):
        return int(labels.stores[0].counts(manifest.rows(Split.TRAIN)).argmax())
    rows = fit_sample(manifest, hours=MAJORITY_HOURS, exponent=1.0, seed=0)
    place, everywhere = _placement(mesh)
    units, targets = cfg.unit_sets[0].units, labels.targets

    def counts(frozen, batch):
        first = targets.label(frozen, jax.tree.map(lambda x: x[0], batch)).units[..., 0]
        return jnp.zeros((units,), jnp.int32).at[jnp.where(first < 0, units, first)].add(1, mode="drop")

    counted = jax.jit(counts, in_shardings=(everywhere, place), out_shardings=everywhere)
    total = np.zeros(units, np.int64)
    per_batch = shared_rows(cfg.evaluation_rows, mesh)
    with eval_batches(manifest, labels.stores, rows, lengths=LENGTHS, rows_per_batch=per_batch) as batches:
        hours = _hours(manifest.samples[rows])
        for batch in with_progress(batches, hours=hours, title=f"count units of {cfg.name}"):
            total += np.asarray(counted(targets.frozen, place_whole_batch(batch, mesh=mesh)))
    return int(total.argmax())


def with_progress(batches: Iterable[Batch], *, hours: float, title: str, leave: bool = True) -> Iterator[Batch]:
    """The same batches, under a bar of the first process that counts the audio-hours of those that were worked on."""
    done, shown = 0.0, {"unit": "audio-h", "dynamic_ncols": True, "mininterval": 1.0, "leave": leave}
    with tqdm(total=round(hours, 3), desc=title, disable=not is_first(), **shown) as bar:
        for batch in batches:
            yield batch
            done += _hours(batch.samples)
            bar.n = min(round(done, 3), bar.total)
            bar.update(0)


def _hours(samples: np.ndarray) -> float:
    return float(samples.sum()) / SAMPLE_RATE / 3600


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
    labels = {
        "languages": [manifest.languages[code] for code in manifest.language],
        "sources": [manifest.corpora[code] for code in manifest.corpus],
        "train": np.asarray(manifest.split) == Split.TRAIN,
    }
    try:
        rows = np.flatnonzero(language_probe.taking_part(**labels))
    except language_probe.ProbeError as error:
        return {"note": str(error)}
    encoders: dict[str, Encoder] = {cfg.name: load_encoder(workdir, cfg.name, mesh) for cfg in stages}
    encoders["untrained encoder"] = _untrained_like(encoders[stages[-1].name], seed=seed)
    layers = {"log-mel": None} | {name: encoder.config.layers // 2 for name, encoder in encoders.items()}
    features = pool_utterances({"log-mel": _log_mel(mesh), **_hidden(encoders, mesh)}, rows, manifest, mesh)
    results = {
        name: language_probe.evaluate(_at(rows, features.pop(name), of=len(manifest)), **labels)
        for name in tqdm(layers, desc="fit probes", unit="probe", dynamic_ncols=True, mininterval=1.0)
    }
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
        "clips": found.clips,
        "difference": found.difference,
        "low": found.interval.low,
        "high": found.interval.high,
        "verdict": found.verdict,
    }


Vectors = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # placed waveform, samples, valid -> [rows, width]


def pool_utterances(
    vectors: dict[str, Vectors],
    rows: np.ndarray,
    manifest: Manifest,
    mesh: Mesh,
    *,
    lengths: tuple[int, ...] = PROBE_LENGTHS,
) -> dict[str, np.ndarray]:
    """By name, the vector of each of the utterances `rows` (ascending), [rows, width], from its first 8 s.

    The audio is read once for all of them. `lengths`, in samples: what clips are padded to, and cut after the last.
    """
    found: dict[str, np.ndarray] = {}
    for batch, placed in beginnings(rows, manifest, mesh, lengths=lengths, rows_per_batch=16 * mesh.size):
        real = batch.utterance != NO_UTTERANCE
        for name, function in vectors.items():
            values = np.asarray(function(placed.waveform, placed.samples, placed.valid))
            table = found.setdefault(name, np.full((len(rows), values.shape[1]), np.nan, np.float32))
            table[np.searchsorted(rows, batch.utterance[real])] = values[real]
    return found


def _at(rows: np.ndarray, values: np.ndarray, *, of: int) -> np.ndarray:
    """[of, width]: `values` [rows, width] in their places, NaN elsewhere."""
    whole = np.full((of, values.shape[1]), np.nan, np.float32)
    whole[rows] = values
    return whole


class Beginnings(NamedTuple):
    """A batch of the beginnings of utterances, as it was read (every process has it whole), and on the devices."""

    batch: Batch
    placed: Batch


def beginnings(
    rows: np.ndarray,
    manifest: Manifest,
    mesh: Mesh,
    *,
    lengths: tuple[int, ...] = PROBE_LENGTHS,
    rows_per_batch: int,
    title: str = "probe",
    leave: bool = True,
) -> Iterator[Beginnings]:
    """The first `lengths[-1]` samples of each of the utterances `rows`, in batches of one of the lengths."""
    heard = np.minimum(manifest.samples[rows], lengths[-1])
    with eval_batches(manifest, (), rows, lengths=lengths, rows_per_batch=rows_per_batch) as batches:
        first = _first_windows(batches, rows_per_batch=rows_per_batch)
        for batch in with_progress(first, hours=_hours(heard), title=title, leave=leave):
            yield Beginnings(batch, place_whole_batch(batch, mesh=mesh))


def _first_windows(batches: Iterable[Batch], *, rows_per_batch: int) -> Iterator[Batch]:
    """The rows that begin an utterance, in full batches of one length: later windows of long ones are dropped."""
    waiting: dict[int, list[Batch]] = {}
    for batch in batches:
        rows = waiting.setdefault(batch.waveform.shape[1], [])
        for row in np.flatnonzero((batch.utterance != NO_UTTERANCE) & (batch.start == 0)):
            rows.append(Batch(*(field[row : row + 1] for field in batch)))
            if len(rows) == rows_per_batch:
                yield Batch(*map(np.concatenate, zip(*rows, strict=True)))
                rows.clear()
    for rows in filter(None, waiting.values()):
        filler = rows[0]._replace(
            utterance=np.full(1, NO_UTTERANCE, np.int32), samples=np.zeros(1, np.int32), valid=rows[0].valid & False
        )
        rows += [filler] * (rows_per_batch - len(rows))
        yield Batch(*map(np.concatenate, zip(*rows, strict=True)))


def _log_mel(mesh: Mesh) -> Vectors:
    rows, everywhere = _placement(mesh)

    def pooled(waveform, samples, valid):
        return language_probe.pooled(log_mel(waveform[0]), valid[0])

    return jax.jit(pooled, in_shardings=(rows, rows, rows), out_shardings=everywhere)


def _hidden(encoders: dict[str, Encoder], mesh: Mesh) -> dict[str, Vectors]:
    """The middle layer of each encoder, pooled. Encoders of one shape share one compiled program."""
    compiled = layer_of(mesh, reduce=language_probe.pooled)
    return {name: partial(compiled, encoder) for name, encoder in encoders.items()}


def layer_of(mesh: Mesh, *, layer: int | None = None, reduce: Callable[[jax.Array, jax.Array], jax.Array]):
    """Jitted (encoder, placed waveform, samples, valid) -> `reduce(hidden, valid)` of a layer, on every device.

    Of the rows of one batch: hidden [rows, frames, width], valid [rows, frames]. `layer`: None is the middle one; 0 is
    the first one's input, n the output of layer n.
    """
    # Unrolled on every platform: layers above the middle one are then never computed.
    formulation = formulation_for(mesh.devices.flat[0].platform)._replace(scan_layers=False)
    rows, everywhere = _placement(mesh)

    def reduced(encoder, waveform, samples, valid):
        real = jnp.arange(waveform.shape[2])[None] < samples[0][:, None]
        place = encoder.config.layers // 2 if layer is None else layer
        return reduce(encode(encoder, waveform[0], real, formulation=formulation).hidden[place], valid[0])

    return jax.jit(reduced, in_shardings=(None, rows, rows, rows), out_shardings=everywhere)


def _untrained_like(encoder: Encoder, *, seed: int) -> Encoder:
    """Of the same shape and laid out in the same way, so that both run in one compiled program."""
    places = jax.tree.map(lambda leaf: leaf.sharding, encoder)
    return jax.jit(lambda: make_encoder(jax.random.key(seed), encoder.config), out_shardings=places)()


def _placement(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """Of a batch's fields [1, rows, ...], and of what is the same everywhere."""
    return NamedSharding(mesh, P(None, BATCH_AXES)), NamedSharding(mesh, P())


def table(result: dict) -> str:
    """What `evaluate_stage` returned, as text: a line a language, those without held-out clips last."""
    if "total" not in result:
        return f"{result['stage']}: {result['note']}"
    lines = [f"{'':<6} {'clips':>6} {'frames':>8} {'accuracy':>9} {'majority':>9} {'copy':>9}"]
    rows = {**result["languages"], "all": result["total"]}
    for name, row in sorted(rows.items(), key=lambda item: (item[0] == "all", not item[1]["frames"], item[0])):
        if row["frames"]:
            values = (row[key] for key in ("accuracy", "majority", "copy"))
            shares = " ".join(f"{'-' if value is None else format(value, '.3f'):>9}" for value in values)
            lines.append(f"{name:<6} {row['clips']:>6,} {row['frames']:>8,} {shares}")
        else:
            lines.append(f"{name:<6} no held-out data")
    return "\n".join(lines)
