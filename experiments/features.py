"""Hidden states of audio files: one array a file, in an .npz or in memory.

from experiments.features import load_model
model = load_model("work/demo/export")
hidden = model.features("clip.wav", layers="6,9,mean")       # float32 [3, frames, width]
"""

import contextlib
import difflib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from data_pipelines.atomic import whole_file
from data_pipelines.audio import AUDIO_SUFFIXES, AudioError
from data_pipelines.audio_blocks import announced_seconds, read_blocks
from data_pipelines.batch import HOP, RECEPTIVE_FIELD, SAMPLE_RATE
from experiments.array_archive import ArrayArchive
from experiments.stage_files import StageFiles
from experiments.stages import STAGES
from experiments.trained import imported_model, load_encoder
from wavlab_jax.convert.checkpoint import to_encoder
from wavlab_jax.convert.layouts import read_checkpoint
from wavlab_jax.encoder import Encoder, EncoderConfig
from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.streaming import Blocks, Extractor, StreamError, WindowConfig, parse_layers, too_short

_BLOCK = 1 << 18  # samples of a waveform in memory that are handed on at once


class FeaturesError(RuntimeError):
    """A model, or files, that no features come of; the message names them."""


class FeatureModel:
    """An encoder and what it takes to run it on audio of any length."""

    def __init__(self, encoder: Encoder, *, notes: tuple[str, ...] = ()):
        self.encoder = encoder
        self.notes = notes  # what had to be assumed when it was read

    def extractor(self, layers: str = "all", windows: WindowConfig | None = None) -> Extractor:
        """For the layers of `parse_layers`. Raises StreamError naming the layers there are."""
        chosen = parse_layers(layers, layers=self.encoder.config.layers)
        return Extractor(self.encoder, layers=chosen, cfg=windows)

    def features(
        self, audio: str | os.PathLike | np.ndarray, *, layers: str = "all", windows: WindowConfig | None = None
    ) -> np.ndarray:
        """float32 [layers, frames, width] of a file, or of a waveform [samples] of floats in [-1, 1] at 16 kHz.

        `layers` as in `wavlab_jax.streaming.parse_layers`, recordings longer than `windows.window` as described there.
        Raises AudioError (file), StreamError (too short, not such a waveform).
        """
        extractor = self.extractor(layers, windows)
        blocks = _blocks_of(audio) if isinstance(audio, np.ndarray) else partial(read_blocks, Path(audio))
        waveform = one_piece(blocks(), extractor.cfg.samples)
        if waveform is not None:
            return extractor.in_one_piece([waveform])[0]
        streamed = extractor.stream(blocks)
        hidden = np.empty((len(extractor.layers), streamed.frames, self.encoder.config.width), np.float32)
        done = 0
        for piece in streamed.pieces:
            hidden[:, done : done + piece.shape[1]] = piece
            done += piece.shape[1]
        return hidden


def load_model(
    model: str | os.PathLike,
    *,
    workdir: Path = Path("work"),
    architecture: EncoderConfig | None = None,
    normalize_waveform: bool | None = None,
) -> FeatureModel:
    """The encoder of a file or folder that `import` takes or `export` made, or of a stage trained in `workdir`.

    `architecture` and `normalize_waveform` as `read_checkpoint` takes them, for files that do not say. A stage's name
    means the stage; write ./NAME for a folder that is called the same. Raises FeaturesError (neither), ConvertError
    (the file or folder is no model), CheckpointError (the stage is not trained).
    """
    name = str(model)
    # a mean of checkpoints has an @; a run may have a name of its own
    begun = "@" in name or StageFiles(workdir, name).config.exists()
    if name in STAGES or (begun and imported_model(workdir, name) is None):
        if architecture is not None or normalize_waveform is not None:
            raise FeaturesError(f"{model} is a stage, which knows its architecture; write ./{model} for a folder")
        return FeatureModel(load_encoder(workdir, str(model), make_mesh(MeshConfig(), devices=jax.devices()[:1])))
    if not Path(model).exists():
        near = difflib.get_close_matches(str(model), STAGES, n=2, cutoff=0.6) or list(STAGES)
        raise FeaturesError(f"{model} is neither a file or folder nor a stage; the nearest stages: {', '.join(near)}")
    checkpoint = read_checkpoint(model, architecture=architecture, normalize_waveform=normalize_waveform)
    return FeatureModel(to_encoder(checkpoint), notes=checkpoint.notes)


def write_features(
    model: FeatureModel,
    audio: Sequence[Path],
    out: Path,
    *,
    layers: str = "all",
    dtype: str = "float32",
    windows: WindowConfig | None = None,
) -> int:
    """Writes one array [layers, frames, width] a file to `out`, an .npz that is whole or absent; returns how many.

    Arrays are called as `name_files` says. Files that cannot be used do not stop the others: the .npz is written
    without them, and FeaturesError lists them then; if there is no other, nothing is written.

    Raises also StreamError (layers, windows), CannotWrite.
    """
    extractor = model.extractor(layers, windows)
    files = name_files(audio)
    if out.exists():
        raise FeaturesError(f"{out} exists already: delete it, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(out) as temporary,
        ArrayArchive(temporary) as archive,
        _progress(sum(map(announced_seconds, files.values())) / 3600) as progress,
    ):
        failed = _encode_files(extractor, files, archive, np.dtype(dtype), progress)
        listed = "".join(f"\n  {files[name]}: {reason}" for name, reason in failed.items())
        if len(failed) == len(files):
            raise FeaturesError(f"nothing written: no file could be used:{listed}")
    if failed:
        raise FeaturesError(f"{out} lacks {len(failed)} of {len(files)} files, which could not be used:{listed}")
    return len(files)


def name_files(audio: Iterable[Path]) -> dict[str, Path]:
    """Name -> file: the path below the deepest folder that all of them share, so that no two have one name.

    Folders stand for the audio files in them, at any depth. Raises FeaturesError for a folder without any.
    """
    found, roots = [], []
    for path in map(Path, audio):
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()
            )
            if not inside:
                raise FeaturesError(f"{path} holds no audio ({', '.join(sorted(AUDIO_SUFFIXES))})")
            found += inside
            roots.append(os.path.abspath(path))
        else:
            found.append(path)
            roots.append(os.path.dirname(os.path.abspath(path)))
    if not found:
        raise FeaturesError("no audio files were named")
    common = os.path.commonpath(roots)
    below = (Path(os.path.relpath(os.path.abspath(path), common)).as_posix() for path in found)
    # bytes of a file name that are no UTF-8 cannot stand in a zip's names
    return {name.encode("utf-8", "backslashreplace").decode(): path for name, path in zip(below, found, strict=True)}


def one_piece(blocks: Iterable[np.ndarray], limit: int) -> np.ndarray | None:
    """The recording [samples] in blocks, or None if it has more samples than `limit` (0: no limit)."""
    parts, samples = [], 0
    for block in blocks:
        parts.append(block)
        samples += len(block)
        if 0 < limit < samples:
            return None
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


@contextlib.contextmanager
def _progress(hours: float) -> Iterator[Callable[[int], None]]:
    """A bar of audio-hours, advanced by samples; files may turn out longer than they announced."""
    done = 0
    with tqdm(total=round(hours, 4), desc="features", unit="audio-h", dynamic_ncols=True, mininterval=1.0) as bar:

        def advance(samples: int) -> None:
            nonlocal done
            done += samples
            bar.n = round(done / SAMPLE_RATE / 3600, 4)
            bar.total = max(bar.total, bar.n)
            bar.update(0)

        yield advance


def _blocks_of(waveform: np.ndarray) -> Blocks:
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise StreamError(
            f"a waveform is floats [samples] at 16 kHz in [-1, 1], got {waveform.dtype}{list(waveform.shape)}"
        )
    if not np.isfinite(waveform).all():
        raise StreamError("the waveform has NaN or infinite samples")
    return lambda: (waveform[i : i + _BLOCK].astype(np.float32) for i in range(0, len(waveform), _BLOCK))


def _encode_files(
    extractor: Extractor,
    files: dict[str, Path],
    archive: ArrayArchive,
    dtype: np.dtype,
    progress: Callable[[int], None],
) -> dict[str, str]:
    """Adds each file's array to the archive; name -> reason of those that could not be used."""
    failed: dict[str, str] = {}
    waiting: dict[int, list[tuple[str, np.ndarray]]] = defaultdict(list)  # by static length: they share a pass
    full: set[int] = set()  # static lengths of which there was a full pass, so that its program is compiled

    def together(rows: list[tuple[str, np.ndarray]], *, least: int = 1) -> None:
        found = extractor.in_one_piece([waveform for _, waveform in rows], rows=least)
        for (name, waveform), hidden in zip(rows, found, strict=True):
            try:
                archive.add(name, _stored(hidden, dtype))
            except StreamError as error:
                failed[name] = str(error)
            progress(len(waveform))

    for name, path in files.items():
        blocks = partial(read_blocks, path)
        try:
            waveform = one_piece(blocks(), extractor.cfg.samples)
            if waveform is None:
                _encode_long(extractor, name, blocks, archive, dtype, progress)
                continue
            if len(waveform) < RECEPTIVE_FIELD:
                raise StreamError(too_short(len(waveform)))
        except (AudioError, StreamError) as error:
            failed[name] = getattr(error, "reason", str(error))
            continue
        length = extractor.static_length(len(waveform))
        waiting[length].append((name, waveform))
        if len(waiting[length]) == extractor.rows_at_once(length):
            together(waiting.pop(length))
            full.add(length)
    for length, rows in waiting.items():  # what is left takes no more programs than there are lengths
        if length in full:
            together(rows, least=extractor.rows_at_once(length))
        else:
            for row in rows:
                together([row])
    return {name: failed[name] for name in files if name in failed}


def _encode_long(
    extractor: Extractor,
    name: str,
    blocks: Blocks,
    archive: ArrayArchive,
    dtype: np.dtype,
    progress: Callable[[int], None],
) -> None:
    streamed = extractor.stream(blocks)

    def pieces() -> Iterator[np.ndarray]:
        for piece in streamed.pieces:
            yield _stored(piece, dtype)
            progress(piece.shape[1] * HOP)

    shape = (len(extractor.layers), streamed.frames, extractor.encoder.config.width)
    archive.add_pieces(name, shape, dtype, pieces())


def _stored(hidden: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same as `dtype`. Raises StreamError where it cannot hold them."""
    with np.errstate(over="ignore"):
        stored = hidden.astype(dtype, copy=False)
    if not np.isfinite(stored).all():
        largest = float(np.abs(hidden).max())
        advice = (
            f"up to {largest:.3g}, which float16 cannot hold: use --dtype float32" if np.isfinite(largest) else "NaN"
        )
        raise StreamError(f"hidden states are {advice}")
    return stored
