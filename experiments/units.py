"""Making units: fit k-means on MFCC or on a layer of a trained stage, label the whole corpus, write the store.

The one loop of the river: a finished stage writes units that the next stage's pipeline reads back as a column.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from data_pipelines.atomic import whole_file
from data_pipelines.batch import HOP, RECEPTIVE_FIELD, Batch
from data_pipelines.manifest import Manifest, Split
from data_pipelines.pipeline import eval_batches
from data_pipelines.sampling import DrawConfig, leaf_shares
from data_pipelines.units import UnitStore, UnitWriter
from experiments.trained import lineage, load_encoder
from wavlab_jax.encoder import encode, formulation_for
from wavlab_jax.features import mfcc
from wavlab_jax.sharding import BATCH_AXES, place_batch
from wavlab_jax.targets import kmeans

# Utterances are labelled padded to the smallest of these; longer ones in windows of the last. Samples.
WINDOWS = tuple(seconds * 16_000 for seconds in (2, 4, 8, 16, 32))
PASS_SECONDS = 64  # audio a device labels at once
UTTERANCES_AT_ONCE = 512  # read, labelled and written together, so that memory does not grow with the corpus


class UnitMakingError(ValueError):
    """Units that cannot be made, or that were made otherwise; the message names them and says what to do."""


@dataclass(frozen=True)
class UnitsConfig:
    """What the targets are.

    Attributes:
        name: of the store in the workdir; stages that train on the same units share it.
        units: number of clusters.
        teacher: stage whose hidden states are clustered; None: 39-d MFCC, every second frame of 100 Hz.
        layer: of the teacher: 0 is the input of its first Transformer layer, n the output of layer n.
        fit_hours: of training audio that the centroids are fitted on (HuBERT and WavLabLM: a tenth of the data).
        fit_frames: at most so many of its frames, evenly drawn, so that memory and disk stay bounded.
        language_exponent: of the hours each language gives to the fit; 1 as found, 0 equal.
        iterations: of Lloyd's algorithm, at most.
        seed: of the sample and of k-means++.
        online: only the centroids are made beforehand; labels are computed in the step, of the clean waveform, by the
            teacher as it is there. No store, but the teacher's forward pass at every step.
    """

    name: str
    units: int
    teacher: str | None = None
    layer: int = 0
    fit_hours: float = 100.0
    fit_frames: int = 2_000_000
    language_exponent: float = 1.0
    iterations: int = 100
    seed: int = 0
    online: bool = False


class UnitFiles:
    """Where a unit set lies below `workdir`."""

    def __init__(self, workdir: Path, name: str):
        self.store = Path(workdir) / "units" / name
        self.centroids = Path(workdir) / "units" / f"{name}.centroids.npz"


def make_units(cfg: UnitsConfig, workdir: Path, manifest: Manifest, mesh: Mesh) -> UnitStore:
    """The unit store of this configuration: loaded if it is there, else fitted and written.

    A fit that was finished before a kill is kept; labels are written whole or not at all. Raises UnitMakingError if the
    folder holds units that were made otherwise, UnitsError if they are damaged or of another corpus.
    """
    files = UnitFiles(workdir, cfg.name)
    source = made_from(cfg, workdir, manifest)
    if files.store.exists():
        store = UnitStore.load(files.store, manifest)
        if store.source != source:
            raise UnitMakingError(
                f"{files.store} was made otherwise:\n  then {store.source}\n  now  {source}\ngive the units another "
                "name, or delete that folder"
            )
        return store
    extract = _extractor(cfg, workdir, mesh)
    centers = _fitted(cfg, files.centroids, source, manifest, extract, mesh)
    with UnitWriter(files.store, manifest, units=cfg.units, source=source) as writer:
        every = np.arange(len(manifest))
        for i, features in _features(extract, every, manifest, mesh, title=f"label {cfg.name}", centers=centers):
            writer.add(i, features)
    return UnitStore.load(files.store, manifest)


def made_from(cfg: UnitsConfig, workdir: Path, manifest: Manifest) -> str:
    """What centroids and labels of this configuration depend on, as JSON; where they are computed is no part of it."""
    said = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "online"}
    teacher = {"lineage": lineage(workdir, cfg.teacher)} if cfg.teacher else {}
    return json.dumps({"corpus": manifest.fingerprint, **said, **teacher})


def fitted_centroids(cfg: UnitsConfig, workdir: Path, manifest: Manifest, mesh: Mesh) -> np.ndarray:
    """Centroids [units, width] of this configuration: loaded if they were fitted for it, else fitted and kept."""
    extract, path = _extractor(cfg, workdir, mesh), UnitFiles(workdir, cfg.name).centroids
    return _fitted(cfg, path, made_from(cfg, workdir, manifest), manifest, extract, mesh)


def check_layer(cfg: UnitsConfig, encoder) -> None:
    """Raises UnitMakingError if the teacher has no such layer."""
    if not 0 <= cfg.layer <= encoder.config.layers:
        raise UnitMakingError(
            f"units {cfg.name}: layer {cfg.layer} of {cfg.teacher}, which has layers 0 to {encoder.config.layers}"
        )


def _fitted(cfg: UnitsConfig, path: Path, source: str, manifest: Manifest, extract, mesh: Mesh) -> np.ndarray:
    """Centroids [units, width]: from `path` if they were fitted for `source`, else fitted and kept there."""
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["source"]) == source:
                return kept["centers"]
    rows = fit_sample(manifest, hours=cfg.fit_hours, exponent=cfg.language_exponent, seed=cfg.seed)
    frames = int(sum(_frames_of(manifest, rows)))
    keep = min(1.0, cfg.fit_frames / max(frames, 1))
    rng = np.random.default_rng([cfg.seed, 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for _, features in _features(extract, rows, manifest, mesh, title=f"features for {cfg.name}"):
        parts.append(features if keep == 1.0 else features[rng.random(len(features)) < keep])
    fitted = kmeans.fit(np.concatenate(parts), units=cfg.units, seed=cfg.seed, iterations=cfg.iterations)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, centers=fitted.centers, inertia=fitted.inertia, history=fitted.history, source=source)
    return fitted.centers


def fit_sample(manifest: Manifest, *, hours: float, exponent: float, seed: int) -> np.ndarray:
    """Training utterances that make up about `hours`, [utterances], ascending.

    Language l gets the share seconds ** exponent of the hours, at most all it has. Fitting on anything but the training
    split would let held-out audio shape the targets.
    """
    rows = manifest.rows(Split.TRAIN)
    language = manifest.language[rows]
    seconds = manifest.samples[rows] / 16_000
    by_language = {(int(code), 0): float(seconds[language == code].sum()) for code in np.unique(language)}
    shares = leaf_shares(by_language, cfg=DrawConfig(language_exponent=exponent))
    chosen = []
    for (code, _), share in shares.items():
        order = np.random.default_rng([seed, code]).permutation(np.flatnonzero(language == code))
        before = np.cumsum(seconds[order]) - seconds[order]
        chosen.append(order[before < share * hours * 3600])
    return np.sort(rows[np.concatenate(chosen)])


class _Extractor(NamedTuple):
    """`run`: placed waveform and real samples of rows -> features [rows, frames, width]."""

    run: Callable[[jax.Array, jax.Array], jax.Array]


def _extractor(cfg: UnitsConfig, workdir: Path, mesh: Mesh) -> _Extractor:
    rows, everywhere = NamedSharding(mesh, P(None, BATCH_AXES)), NamedSharding(mesh, P())
    if cfg.teacher is None:

        def features(waveform, samples):
            return mfcc(waveform[0], samples[0])[:, ::2]

        return _Extractor(jax.jit(features, in_shardings=(rows, rows), out_shardings=everywhere))
    encoder = load_encoder(workdir, cfg.teacher, mesh)
    check_layer(cfg, encoder)
    formulation = formulation_for(mesh.devices.flat[0].platform)

    def hidden(encoder, waveform, samples):
        valid = jnp.arange(waveform.shape[2])[None] < samples[0][:, None]
        return encode(encoder, waveform[0], valid, formulation=formulation).hidden[cfg.layer].astype(jnp.float32)

    compiled = jax.jit(hidden, in_shardings=(None, rows, rows), out_shardings=everywhere)
    return _Extractor(lambda waveform, samples: compiled(encoder, waveform, samples))


def _features(
    extract: _Extractor,
    rows: np.ndarray,
    manifest: Manifest,
    mesh: Mesh,
    *,
    title: str,
    centers: np.ndarray | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(utterance, its features [frames, width]) in the order of `rows`; with `centers`, its units [frames] instead."""
    total = float(manifest.samples[rows].sum()) / 16_000 / 3600
    with tqdm(total=round(total, 3), desc=title, unit="audio-h", dynamic_ncols=True, mininterval=1.0) as bar:
        done = 0.0
        for first in range(0, len(rows), UTTERANCES_AT_ONCE):
            piece = rows[first : first + UTTERANCES_AT_ONCE]
            found = _features_of(extract, piece, manifest, mesh)
            if centers is not None:
                joined = kmeans.assign(centers, np.concatenate(list(found.values())))
                ends = np.cumsum([len(features) for features in found.values()])[:-1]
                found = dict(zip(found, np.split(joined, ends), strict=True))
            for i in piece.tolist():
                yield i, found[i]
            done += float(manifest.samples[piece].sum()) / 16_000 / 3600
            bar.n = min(round(done, 3), bar.total)
            bar.update(0)


def _features_of(extract: _Extractor, rows: np.ndarray, manifest: Manifest, mesh: Mesh) -> dict[int, np.ndarray]:
    windows: dict[int, list[tuple[int, np.ndarray]]] = {int(i): [] for i in rows}
    for length in WINDOWS:
        fitting = [int(i) for i in rows if _window_of(int(manifest.samples[i])) == length]
        if not fitting:
            continue
        per_batch = max(PASS_SECONDS * 16_000 // length, 1) * mesh.size
        with eval_batches(manifest, (), fitting, lengths=(length,), rows_per_batch=per_batch) as batches:
            for batch in batches:
                for i, start, features in _run(extract, batch, mesh):
                    windows[i].append((start, features))
    return {i: np.concatenate([f for _, f in sorted(parts, key=lambda part: part[0])]) for i, parts in windows.items()}


def _window_of(samples: int) -> int:
    return next((length for length in WINDOWS if samples <= length), WINDOWS[-1])


def _run(extract: _Extractor, batch: Batch, mesh: Mesh) -> Iterator[tuple[int, int, np.ndarray]]:
    frames = batch.valid.sum(axis=1)
    placed = place_batch(batch, mesh=mesh, passes=1)
    found = np.asarray(extract.run(placed.waveform, placed.samples))
    for row, (utterance, start) in enumerate(zip(batch.utterance.tolist(), batch.start.tolist(), strict=True)):
        if frames[row]:
            yield utterance, start, found[row, : frames[row]]


def _frames_of(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    return (manifest.samples[rows] - RECEPTIVE_FIELD) // HOP + 1
