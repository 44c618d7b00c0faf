"""How far hidden states of a recording encoded in windows are from those of the same recording in one piece, by layer.

    PYTHONPATH=. JAX_PLATFORMS=cpu .venv/bin/python benchmarks/streaming_difference.py \
        [--trained FOLDER ...] [--seconds 75] [--out docs/features.md]

The recording is speech of the demo corpus, clip after clip. Models: HuBERT Base and WavLM Base+ with random weights,
and each FOLDER that `python -m experiments features` takes. On 2 cores a Base model takes some minutes and 3 GB. With
--out, the tables take the place of those in that file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from data_pipelines.atomic import whole_file
from data_pipelines.audio import decode
from data_pipelines.batch import SAMPLE_RATE
from experiments.features import load_model
from wavlab_jax.encoder import Encoder, EncoderConfig, make_encoder
from wavlab_jax.streaming import MEAN, Extractor, WindowConfig

CORPUS = Path(__file__).resolve().parents[1] / "demo_corpus"
WINDOW = WindowConfig().window
CONTEXTS = (0.0, 1.0, 2.0, 5.0, 10.0)
BEGIN, END = "<!-- made by benchmarks/streaming_difference.py -->\n", "<!-- end -->"


def recording(seconds: float, *, language: str = "ron") -> np.ndarray:
    """float32 [samples]: clips of one language joined in the order of their names, each at the same level."""
    parts, left = [], round(seconds * SAMPLE_RATE)
    for path in sorted((CORPUS / language).rglob("*.opus")):
        clip = decode(path, name=path.name).waveform[:left]
        parts.append(0.05 * clip / max(float(clip.std()), 1e-3))
        left -= len(clip)
        if not left:
            return np.concatenate(parts)
    raise SystemExit(f"{CORPUS / language} holds {left / SAMPLE_RATE:.0f} s less than {seconds:g} s")


def models(trained: list[Path]) -> Iterator[tuple[str, Encoder]]:
    """Title and encoder, made when its turn comes."""
    base = EncoderConfig()
    yield "HuBERT Base, random weights", make_encoder(jax.random.key(0), base)
    wavlm = EncoderConfig(relative_bias=True)
    yield "WavLM Base+, random weights", make_encoder(jax.random.key(0), wavlm)
    for folder in trained:
        encoder = load_model(folder).encoder
        kind = "WavLM" if encoder.config.relative_bias else "HuBERT"
        yield f"{kind}, {encoder.config.layers} layers of {encoder.config.width}, trained ({folder.name})", encoder


def encoded(encoder: Encoder, waveform: np.ndarray, *, window: float, context: float) -> np.ndarray:
    """[layers + 2, frames, width]: every hidden state, then their mean."""
    layers = (*range(encoder.config.layers + 1), MEAN)
    extractor = Extractor(encoder, layers=layers, cfg=WindowConfig(window=window, context=context))
    if not window:
        return extractor.in_one_piece([waveform])[0]
    return np.concatenate(list(extractor.stream(lambda: [waveform]).pieces), axis=1)


def table(title: str, encoder: Encoder, waveform: np.ndarray) -> str:
    """Markdown: by layer, the RMS of the difference over that of the layer, and the largest one."""
    one = encoded(encoder, waveform, window=0.0, context=0.0)
    level = np.sqrt(np.square(one, dtype=np.float64).mean(axis=(1, 2)))
    columns, largest = [], None
    for context in CONTEXTS:
        difference = encoded(encoder, waveform, window=WINDOW, context=context) - one
        columns.append(np.sqrt(np.square(difference, dtype=np.float64).mean(axis=(1, 2))) / level)
        if context == WindowConfig().context:
            largest = np.abs(difference).max(axis=(1, 2))
    lines = [
        f"**{title}**",
        "",
        f"| layer | {' | '.join(f'{context:g} s' for context in CONTEXTS)} | largest, 5 s | RMS of the layer |",
        f"|---|{'---|' * (len(CONTEXTS) + 2)}",
    ]
    for i, name in enumerate((*range(len(one) - 1), MEAN)):
        cells = " | ".join(f"{column[i]:.1e}" for column in columns)
        lines.append(f"| {name} | {cells} | {largest[i]:.1e} | {level[i]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the tables; with --out, puts them into a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    waveform = recording(arguments.seconds)
    tables = []
    for title, encoder in models(arguments.trained):
        tables.append(table(title, encoder, waveform))
        print(tables[-1], flush=True)
    if arguments.out:
        before, rest = arguments.out.read_text(encoding="utf-8").split(BEGIN)
        text = before + BEGIN + "\n" + "\n".join(tables) + "\n" + END + rest.split(END, 1)[1]
        with whole_file(arguments.out) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
