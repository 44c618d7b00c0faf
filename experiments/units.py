"""Making units: fit k-means on MFCC or on a layer of a trained stage, label the whole corpus, write the store.

The one loop of the river: a finished stage writes units that the next stage's pipeline reads back as a column.

    training utterances ─ sample, balanced by language ─ features, a piece at a time ▶ NAME.features/   (bounded)
    NAME.features/ ─ k-means, streamed over the mesh, saved after passes             ▶ NAME.centroids.npz
    every utterance ─ features ─ nearest centroid, a piece at a time                 ▶ NAME.pieces/ ─ joined ▶ NAME/

Each arrow goes on after a kill with what is missing. With several processes (`jax.distributed`) that share the workdir,
each computes its contiguous share of pieces on its own devices; k-means runs over the devices of all.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines.atomic import whole_file
from data_pipelines.balance import DrawConfig, declared_rows, leaf_shares
from data_pipelines.batch import SAMPLE_RATE, num_frames
from data_pipelines.manifest import Manifest, Split
from data_pipelines.sources import ShardSource
from data_pipelines.unit_pieces import PIECE_FRAMES, UnitPieces
from data_pipelines.units import MAX_UNITS, UnitStore
from experiments.fit_spool import FitSpool
from experiments.hosts import agree, first_process_first, is_first, wait_for_all, wait_to_see
from experiments.trained import lineage, load_encoder
from experiments.unit_features import FrameExtractor
from wavlab_jax.sharding import local_mesh
from wavlab_jax.targets import kmeans


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
        fit_languages: that the centroids are fitted on, as the manifest names them; none: all of them. WavLabLM-MK has
            units of all its languages, WavLabLM-EK of English alone: ("eng",). Every language is labelled, either way.
        fit_corpora: the same for corpora; a stage that declares its corpora (`DrawConfig.corpora`) mostly names them
            here as well.
        fit_hours: of training audio that the centroids are fitted on (HuBERT and WavLabLM: a tenth of the data).
        fit_gigabytes: of disk, 10^9 bytes: so much of that audio's features is kept while the centroids are fitted, at
            most, its frames thinned out evenly. Memory is bounded by it, too, at any size of the corpus: k-means reads
            the features in chunks. 8 are 5.2 million frames of 768 float16 values, 10,000 for each of 500 units.
        fit_dtype: of these features on disk.
        language_exponent: of the hours each language gives to the fit (and to its seeding); 1 as found, 0 equal.
        algorithm: "lloyd", full batches; or "minibatch", as HuBERT's recipe has it (`wavlab_jax.targets.kmeans`).
        batch_frames: of a mini-batch.
        iterations: passes over the features, at most.
        seed: of the sample and of k-means.
        online: only the centroids are made beforehand; labels are computed in the step, of the clean waveform, by the
            teacher as it is there. No store, but the teacher's forward pass at every step.
    """

    name: str
    units: int
    teacher: str | None = None
    layer: int = 0
    fit_languages: tuple[str, ...] = ()
    fit_corpora: tuple[str, ...] = ()
    fit_hours: float = 100.0
    fit_gigabytes: float = 8.0
    fit_dtype: Literal["float16", "float32"] = "float16"
    language_exponent: float = 1.0
    algorithm: Literal["lloyd", "minibatch"] = "lloyd"
    batch_frames: int = 10_000
    iterations: int = 100
    seed: int = 0
    online: bool = False

    def __post_init__(self):
        if not self.name or Path(self.name).name != self.name:
            raise UnitMakingError(f"units.name is {self.name!r}; it names a folder below units/ of the workdir")
        if not 1 <= self.units <= MAX_UNITS:
            raise UnitMakingError(f"units {self.name}: units.units is {self.units}; a label store has 1 to {MAX_UNITS}")
        for field in ("layer", "seed", "language_exponent"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UnitMakingError(f"units {self.name}: {field} is {getattr(self, field)}; it must be at least 0")
        for field in ("batch_frames", "iterations", "fit_hours", "fit_gigabytes"):
            if not 0 < getattr(self, field) < math.inf:
                raise UnitMakingError(f"units {self.name}: {field} is {getattr(self, field)}; it must be positive")


class UnitFiles:
    """Where a unit set lies below `workdir`."""

    def __init__(self, workdir: Path, name: str):
        folder = Path(workdir) / "units"
        self.store = folder / name
        self.centroids = folder / f"{name}.centroids.npz"
        self.features = folder / f"{name}.features"
        self.fit = folder / f"{name}.fit.npz"
        self.quality = folder / f"{name}.quality.json"


def make_units(
    cfg: UnitsConfig, workdir: Path, manifest: Manifest, mesh: Mesh, *, piece_frames: int = PIECE_FRAMES
) -> UnitStore:
    """The unit store of this configuration: loaded if it is there, else fitted and written.

    What was finished before a kill is kept: features and passes of the fit, pieces of `piece_frames` frames of labels.
    With several processes all of them call this. Raises UnitMakingError if the folder holds units that were made
    otherwise, UnitsError if they are damaged or of another corpus.
    """
    files = UnitFiles(workdir, cfg.name)
    source = made_from(cfg, workdir, manifest)
    made = files.store.exists()
    agree(f"whether {files.store} is there", str(made))
    if made:
        store = UnitStore.load(files.store, manifest)
        if store.source != source:
            raise UnitMakingError(
                f"{files.store} was made otherwise:\n  then {store.source}\n  now  {source}\ngive the units another "
                "name, or delete that folder"
            )
        return store
    extractor = _extractor(cfg, workdir, mesh)
    centers = _fitted(cfg, files, source, manifest, extractor, mesh)
    pieces = first_process_first(
        lambda: UnitPieces(files.store, manifest, units=cfg.units, source=source, piece_frames=piece_frames)
    )
    read = ShardSource(manifest).read
    todo = pieces.missing(host=jax.process_index(), hosts=jax.process_count())
    with _progress(f"label {cfg.name}", sum(pieces.frames[pieces.rows(piece)].sum() for piece in todo)) as advance:
        for piece in todo:
            rows = pieces.rows(piece)
            labels = extractor.units(rows, manifest.samples, read, centers=centers, progress=advance)
            pieces.write(piece, labels)
    wait_for_all("units labelled")
    if is_first():
        pieces.join()
    wait_for_all("units joined")
    wait_to_see(files.store)
    return UnitStore.load(files.store, manifest)


def made_from(cfg: UnitsConfig, workdir: Path, manifest: Manifest) -> str:
    """What centroids and labels of this configuration depend on, as JSON; where they are computed is no part of it."""
    said = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "online"}
    teacher = {"lineage": lineage(workdir, cfg.teacher)} if cfg.teacher else {}
    return json.dumps({"corpus": manifest.fingerprint, **said, **teacher})


def fitted_centroids(cfg: UnitsConfig, workdir: Path, manifest: Manifest, mesh: Mesh) -> np.ndarray:
    """Centroids float32 [units, width] of this configuration: those that were kept, or fitted and kept now.

    Labels nothing: for a stage that computes its units in the step (`kmeans.nearest_unit`). Raises as `make_units`.
    """
    files, source = UnitFiles(workdir, cfg.name), made_from(cfg, workdir, manifest)
    kept = _kept(files.centroids, source)
    if kept is not None:
        return kept
    return _fitted(cfg, files, source, manifest, _extractor(cfg, workdir, mesh), mesh)


def check_layer(cfg: UnitsConfig, encoder) -> None:
    """Raises UnitMakingError if the teacher has no such layer."""
    if not 0 <= cfg.layer <= encoder.config.layers:
        raise UnitMakingError(
            f"units {cfg.name}: layer {cfg.layer} of {cfg.teacher}, which has layers 0 to {encoder.config.layers}"
        )


def fit_sample(
    manifest: Manifest,
    *,
    hours: float,
    exponent: float,
    seed: int,
    languages: tuple[str, ...] = (),
    corpora: tuple[str, ...] = (),
) -> np.ndarray:
    """Training utterances that make up about `hours`, [utterances], ascending.

    Language l gets the share seconds ** exponent of the hours, at most all it has. Fitting on anything but the training
    split would let held-out audio shape the targets. Raises UnitMakingError for `languages` without training audio,
    SamplingError for `corpora` that were not prepared.
    """
    rows = declared_rows(manifest, Split.TRAIN, corpora, field="units.fit_corpora")
    if languages:
        rows = rows[np.isin(manifest.language[rows], [_language(manifest, rows, name) for name in languages])]
    language = manifest.language[rows]
    seconds = manifest.samples[rows] / SAMPLE_RATE
    by_language = {(int(code), 0): float(seconds[language == code].sum()) for code in np.unique(language)}
    shares = leaf_shares(by_language, cfg=DrawConfig(language_exponent=exponent))
    chosen = []
    for (code, _), share in shares.items():
        order = np.random.default_rng([seed, code]).permutation(np.flatnonzero(language == code))
        before = np.cumsum(seconds[order]) - seconds[order]
        chosen.append(order[before < share * hours * 3600])
    return np.sort(rows[np.concatenate(chosen)])


def _language(manifest: Manifest, rows: np.ndarray, name: str) -> int:
    present = [manifest.languages[code] for code in np.unique(manifest.language[rows])]
    if name not in present:
        near = difflib.get_close_matches(name, present, n=4, cutoff=0.5) or present
        raise UnitMakingError(
            f"fit_languages: the corpus has no training audio in {name!r}; languages are named as in the manifest: "
            f"{', '.join(near[:12])}{' ...' if len(near) > 12 else ''}"
        )
    return manifest.languages.index(name)


def _extractor(cfg: UnitsConfig, workdir: Path, mesh: Mesh) -> FrameExtractor:
    if cfg.teacher is None:
        return FrameExtractor(None, mesh=mesh)
    encoder = load_encoder(workdir, cfg.teacher, local_mesh(mesh))
    check_layer(cfg, encoder)
    return FrameExtractor(encoder, layer=cfg.layer, mesh=mesh)


def _kept(path: Path, source: str) -> np.ndarray | None:
    """Centroids [units, width] at `path`, if they were fitted for `source`."""
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["source"]) == source:
                return kept["centers"]
    return None


def _fitted(
    cfg: UnitsConfig, files: UnitFiles, source: str, manifest: Manifest, extractor: FrameExtractor, mesh: Mesh
) -> np.ndarray:
    """Centroids [units, width]: kept ones, else fitted and kept, and what they were fitted on deleted."""
    kept = _kept(files.centroids, source)
    if kept is not None:
        return kept
    rows = fit_sample(
        manifest,
        hours=cfg.fit_hours,
        exponent=cfg.language_exponent,
        seed=cfg.seed,
        languages=cfg.fit_languages,
        corpora=cfg.fit_corpora,
    )
    spool = first_process_first(
        lambda: FitSpool(
            files.features,
            frames=num_frames(manifest.samples[rows]),
            width=extractor.width,
            dtype=cfg.fit_dtype,
            most_bytes=int(cfg.fit_gigabytes * 1e9),
            seed=cfg.seed,
            source=source,
        )
    )
    read = ShardSource(manifest).read
    todo = spool.missing(host=jax.process_index(), hosts=jax.process_count())
    with _progress(f"features for {cfg.name}", sum(spool.piece(piece).frames for piece in todo)) as advance:
        for number in todo:
            piece = spool.piece(number)
            features = extractor.features(
                rows[piece.first : piece.last], manifest.samples, read, chosen=piece.chosen, progress=advance
            )
            spool.write(number, features)
    wait_for_all("features extracted")
    fitted = kmeans.fit(
        spool,
        units=cfg.units,
        seed=cfg.seed,
        algorithm=cfg.algorithm,
        iterations=cfg.iterations,
        batch=cfg.batch_frames,
        mesh=mesh,
        kept=files.fit,
        source=source,
        title=f"k-means for {cfg.name}" if is_first() else None,
    )
    wait_for_all("centroids fitted")
    if is_first():
        with whole_file(files.centroids) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                centers=fitted.centers,
                counts=fitted.counts,
                inertia=fitted.inertia,
                history=fitted.history,
                frames=len(spool),
                source=source,
            )
        files.fit.unlink(missing_ok=True)
        spool.delete()
    return fitted.centers


class _progress:
    """A bar over the audio-hours of `frames` frames; entering gives a function to call with samples that are done."""

    def __init__(self, title: str, frames: int):
        hours = round(float(frames) / 50 / 3600, 3)
        shown = {"unit": "audio-h", "dynamic_ncols": True, "mininterval": 1.0, "disable": not is_first()}
        self.bar, self.samples = tqdm(total=hours, desc=title, **shown), 0

    def __enter__(self) -> Callable[[int], None]:
        return self._advance

    def _advance(self, samples: int) -> None:
        self.samples += samples
        self.bar.n = min(round(self.samples / SAMPLE_RATE / 3600, 3), self.bar.total)
        self.bar.update(0)

    def __exit__(self, *_) -> None:
        self.bar.close()
