"""Audio-hours that one core prepares in a second, by the form of the source: decode, check, resample, encode to FLAC.

    PYTHONPATH=. python benchmarks/prepare_throughput.py

The demo corpus is written in each form first. Processor time, medians of interleaved rounds.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr

from data_pipelines.audio import decode, encode_flac
from data_pipelines.batch import SAMPLE_RATE

SECONDS = 8.0  # of a clip
FORMS = {  # name: (container, subtype, Hz)
    "FLAC 16 kHz (LibriSpeech, MLS)": ("FLAC", "PCM_16", 16_000),
    "WAV 16 kHz (FLEURS, VoxLingua107)": ("WAV", "PCM_16", 16_000),
    "WAV 48 kHz (OpenSLR)": ("WAV", "PCM_16", 48_000),
    "Ogg Opus 16 kHz": ("OGG", "OPUS", 16_000),
    "Ogg Vorbis 16 kHz (VoxPopuli)": ("OGG", "VORBIS", 16_000),
    "MP3 48 kHz (Common Voice)": ("MP3", "MPEG_LAYER_III", 48_000),
}


def clips(count: int) -> list[np.ndarray]:
    """float32 [samples] each, of the demo corpus' speech put end to end."""
    folder, found, left = Path(__file__).parents[1] / "demo_corpus", [], count * SECONDS * SAMPLE_RATE
    for path in sorted(folder.rglob("*.opus")) + sorted(folder.rglob("*.ogg")):
        waveform = soundfile.read(path, dtype="float32")[0]
        found.append(waveform)
        left -= len(waveform)
        if left <= 0:
            break
    return np.array_split(np.concatenate(found), count)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    sound, forms = clips(given.clips), {}
    for name, (container, subtype, rate) in FORMS.items():
        forms[name] = []
        for waveform in sound:
            data = io.BytesIO()
            soundfile.write(data, soxr.resample(waveform, SAMPLE_RATE, rate), rate, format=container, subtype=subtype)
            forms[name].append(data.getvalue())
    hours = sum(map(len, sound)) / SAMPLE_RATE / 3600
    taken: dict[str, list[float]] = {name: [] for name in forms}
    sizes = {}
    for _ in range(given.rounds):
        for name, files in forms.items():
            started = time.process_time()
            sizes[name] = sum(len(encode_flac(decode(data, name=name).waveform)) for data in files)
            taken[name].append(hours / (time.process_time() - started))
    print("| source | hours per core-second | core-hours for 1,000 h | GB before, 1,000 h | GB after |")
    print("|---|---:|---:|---:|---:|")
    for name, values in taken.items():
        rate = float(np.median(values))
        before = sum(map(len, forms[name])) / hours / 1e6
        print(f"| {name} | {rate:.3f} | {1000 / rate / 3600:.1f} | {before:.0f} | {sizes[name] / hours / 1e6:.0f} |")


if __name__ == "__main__":
    main()
