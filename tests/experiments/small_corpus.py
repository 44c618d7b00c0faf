"""A corpus of synthetic speech-like clips that prepares in a second: three languages, two sources."""

from pathlib import Path

import numpy as np
import soundfile


def write_corpus(folder: Path, *, clips: int = 14) -> Path:
    """Writes wav files and a table; languages and sources differ in pitch and noise."""
    folder.mkdir(parents=True)
    lines = ["path\tlanguage\tsource\tspeaker\tsplit"]
    for code, pitch in (("eng", 120.0), ("deu", 170.0), ("swa", 220.0)):
        for source, level in (("read", 0.01), ("phone", 0.05)):
            for i in range(clips):
                rng = np.random.default_rng([int(pitch), int(level * 100), i])
                time = np.arange(int(rng.integers(12_000, 28_000))) / 16_000
                vibrato = pitch * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(1, 4) * time))
                tone = np.sin(np.cumsum(2 * np.pi * vibrato / 16_000)) * (np.sin(2 * np.pi * 3 * time) > -0.3)
                name = f"{code}/{source}-{i}.wav"
                (folder / code).mkdir(exist_ok=True)
                soundfile.write(folder / name, 0.3 * tone + level * rng.normal(size=time.size), 16_000)
                split = "test" if i % 5 == 4 else "train"
                lines.append(f"{name}\t{code}\t{source}\t{source}-{code}\t{split}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_alignments(audio: Path, folder: Path) -> Path:
    """Writes a .phn file for each clip of `write_corpus`: one of four phones every tenth of a second, in turn."""
    for clip in audio.rglob("*.wav"):
        seconds = soundfile.info(clip).frames / 16_000
        path = folder / clip.relative_to(audio).with_suffix(".phn")
        path.parent.mkdir(parents=True, exist_ok=True)
        starts = np.arange(0.0, seconds, 0.1)
        phones = zip(starts, np.append(starts[1:], seconds), "abcd" * len(starts), strict=False)
        path.write_text("".join(f"{start:.4f}\t{end:.4f}\t{phone}\n" for start, end, phone in phones))
    return folder
