"""The parity table: model x layout x (import, export, round trip): largest differences, keys left over.

    PYTHONPATH=. JAX_PLATFORMS=cpu .venv/bin/python benchmarks/parity.py [--size base] [--out docs/parity.md]

Weights are random. Import: a model of the peer's own class, saved as the peer saves it, read here. Export: another
one, born in transformers, written here and loaded by the peer's own class with every key in its place. Round trip:
that one read again here and compared value by value. Small models take some minutes; --size base takes the published
Base sizes: about ten minutes, 3 GB of memory and 2 GB of disk. Needs the test environment (`make test-venv`).
"""

import argparse
import dataclasses
import logging
import platform
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
import transformers

from benchmarks.parity_peers import DIM, UNITS, Run, applies, load_ours, save_theirs
from data_pipelines.atomic import whole_file
from wavlab_jax.convert.checkpoint import HEADS, Checkpoint, StoredTensor, to_encoder
from wavlab_jax.convert.layouts import LAYOUTS, read_checkpoint, write_checkpoint
from wavlab_jax.encoder import EncoderConfig, encode, formulation_for

LIMIT = 1e-4
SECONDS = 2.0


class Model(NamedTuple):
    """A row of the table: its name, type and architecture."""

    name: str
    model_type: str
    cfg: EncoderConfig


class Cell(NamedTuple):
    """One model in one layout; differences are the largest absolute ones, None: the layout has no such model."""

    imported: float | None
    exported: float | None
    round_trip: str
    left_over: str


SMALL = EncoderConfig(
    extractor_channels=(12,) * 7, width=24, layers=3, heads=3, feed_forward=40, position_kernel=16, position_groups=4
)
LARGE = {"extractor_norm": "layer", "pre_norm": True, "normalize_waveform": True, "feature_gradient_scale": 1.0}
BIAS = {"relative_bias": True, "bias_buckets": 32, "bias_max_distance": 64}
SMALL_MODELS = (
    Model("HuBERT, like Base", "hubert", SMALL),
    Model("HuBERT, like Large", "hubert", dataclasses.replace(SMALL, **LARGE)),
    Model("HuBERT, like mHuBERT-147", "hubert", dataclasses.replace(SMALL, normalize_waveform=True)),
    Model("WavLM, like Base+", "wavlm", dataclasses.replace(SMALL, **BIAS)),
    Model("WavLM, like Large", "wavlm", dataclasses.replace(SMALL, **BIAS, **LARGE)),
    Model("wav2vec 2.0, like Base", "wav2vec2", SMALL),
    Model("wav2vec 2.0, like XLS-R", "wav2vec2", dataclasses.replace(SMALL, extractor_bias=True, **LARGE)),
)
BASE_MODELS = (
    Model("HuBERT Base", "hubert", EncoderConfig()),
    Model("WavLM Base+", "wavlm", EncoderConfig(relative_bias=True)),
    Model("wav2vec 2.0 Base", "wav2vec2", EncoderConfig()),
)
SCALES = {"small": 0.25, "base": 0.02}  # of what is added to the initial values: larger would overflow wide models


def measure(model: Model, layout: str, folder: Path, *, scale: float) -> Cell:
    """All that one row of the table says."""
    if not applies(layout, model.model_type):
        return Cell(None, None, "-", "-")
    waveform = 0.1 * np.random.default_rng(1).standard_normal(int(SECONDS * 16_000)).astype(np.float32) + 0.01
    theirs = save_theirs(layout, model.cfg, model.model_type, folder / "theirs", scale=scale)
    read = read_checkpoint(folder / "theirs", architecture=None if layout != "torchaudio" else _torchaudio(model.cfg))
    imported = difference(read, theirs, waveform)
    left = [*read.left_over, *(name for name in read.heads if name not in HEADS)]

    if layout == "huggingface":
        born = read
    else:
        save_theirs("huggingface", model.cfg, model.model_type, folder / "born", scale=scale)
        born = read_checkpoint(folder / "born")
    ours = with_head(born)
    write_checkpoint(ours, folder / "ours", layout=layout)
    exported = difference(ours, load_ours(layout, model.cfg, folder / "ours"), waveform)
    again = read_checkpoint(folder / "ours")
    changed = [
        name
        for before, after in ((ours.tensors, again.tensors), (ours.heads, again.heads))
        for name in before
        if name not in after or not np.array_equal(before[name].values(), after[name].values())
    ]
    return Cell(imported, exported, f"{len(changed)} tensors differ" if changed else "exact", ", ".join(left) or "none")


def difference(checkpoint: Checkpoint, theirs: Run, waveform: np.ndarray) -> float:
    """The largest one of any hidden state that the peer gives."""
    hidden = _encode(to_encoder(checkpoint), waveform[None])
    cfg, normalised = checkpoint.encoder, waveform
    if cfg.normalize_waveform:
        deviation = np.sqrt(waveform.var() + cfg.waveform_epsilon)
        normalised = ((waveform - waveform.mean()) / deviation).astype(np.float32)
    states = theirs(waveform, normalised)
    assert len(states) >= len(hidden) - 1
    return max(float(np.abs(np.asarray(hidden[number][0]) - state).max()) for number, state in states.items())


def with_head(checkpoint: Checkpoint) -> Checkpoint:
    """With a random HuBERT head where there is none, so that the way of heads is measured too."""
    if checkpoint.model_type == "wav2vec2":
        return checkpoint
    rng = np.random.default_rng(0)
    shapes = {"final_proj.weight": (DIM, checkpoint.encoder.width), "final_proj.bias": (DIM,)}
    shapes["label_embeddings"] = (UNITS, DIM)
    heads = {n: StoredTensor.of(n, rng.standard_normal(shape).astype(np.float32)) for n, shape in shapes.items()}
    return dataclasses.replace(checkpoint, heads={**checkpoint.heads, **heads})


def table(rows: list[tuple[str, str, Cell]], *, size: str) -> str:
    """docs/parity.md."""
    cells = [cell for *_, cell in rows if cell.imported is not None]
    worst = max(max(cell.imported, cell.exported) for cell in cells)
    lines = [
        "# Parity with the peers",
        "",
        f"Written by `benchmarks/parity.py{'' if size == 'small' else f' --size {size}'}`; {len(cells)} combinations, "
        f"random weights, {SECONDS:g} s of audio, float32. The numbers are the largest absolute difference of any "
        f"hidden state ({worst:.1e} at most; the limit is {LIMIT:.0e}).",
        "",
        "- Import: a model of the peer's own class, saved as the peer saves it, read here.",
        "- Export: a model born in transformers, imported, written here in the layout, loaded by the peer's own class:",
        "  every key in its place.",
        "- Round trip: that one read again and compared value by value, heads too.",
        "- Waveforms are normalised outside of all peers but transformers, with the epsilon that the model came with;",
        "  what another epsilon changes in quiet audio, the card of each export says.",
        "- Left over: keys of the peer's file that have no place in an encoder or its heads.",
        "",
        f"Peers: transformers {transformers.__version__}; s3prl's copies of fairseq's and unilm's classes; "
        f"torchaudio's classes; ESPnet's HuBERT encoder around them. ESPnet's WavLM encoder is newer than its last "
        "release and was not run: torchaudio's classes stand under the names that its source gives them. "
        f"PyTorch {torch.__version__}, jax {jax.__version__}, "
        f"Python {platform.python_version()}, CPU.",
        "",
        "| model | layout | import | export | round trip | keys left over |",
        "|---|---|---:|---:|---|---|",
    ]
    for name, layout, cell in rows:
        numbers = ("-" if value is None else f"{value:.1e}" for value in (cell.imported, cell.exported))
        left = cell.left_over if cell.left_over in ("-", "none") else f"`{cell.left_over}`"
        lines.append(f"| {name} | {layout} | {' | '.join(numbers)} | {cell.round_trip} | {left} |")
    lines += [
        "",
        "unilm has WavLM only. ESPnet has no wav2vec 2.0: its encoder goes as HuBERT's there, its heads into the "
        "side file. A bare torchaudio state dict does not say everything: the architecture was given "
        "([checkpoints.md](checkpoints.md)).",
        "",
    ]
    return "\n".join(lines)


def _torchaudio(cfg: EncoderConfig) -> EncoderConfig:
    """Of a bare state dict, the shapes of published models are known; of these small ones the architecture is given."""
    return dataclasses.replace(cfg, waveform_epsilon=1e-5)


_encode = jax.jit(
    lambda encoder, waveform: encode(encoder, waveform, formulation=formulation_for("cpu")).hidden,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def main() -> None:
    """Measures, prints a line a combination, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "base"), default="small")
    parser.add_argument("--out", type=Path, help="by default docs/parity.md, or docs/parity_base.md")
    arguments = parser.parse_args()
    out = arguments.out or Path("docs") / ("parity.md" if arguments.size == "small" else "parity_base.md")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = []
    for model in SMALL_MODELS if arguments.size == "small" else BASE_MODELS:
        for layout in LAYOUTS:
            with tempfile.TemporaryDirectory() as folder:
                cell = measure(model, layout, Path(folder), scale=SCALES[arguments.size])
            rows.append((model.name, layout, cell))
            print(f"{model.name:<28}{layout:<13}{cell}", flush=True)
    with whole_file(out) as temporary:
        temporary.write_text(table(rows, size=arguments.size), encoding="utf-8")
    print(out)
    worst = max(max(cell.imported, cell.exported) for *_, cell in rows if cell.imported is not None)
    if worst > LIMIT or any(cell.round_trip not in ("exact", "-") for *_, cell in rows):
        raise SystemExit(f"parity is lost: differences up to {worst:.1e} (limit {LIMIT:.0e}), see the table")


if __name__ == "__main__":
    main()
