"""Raw corpora of noise for the tests of `prepare`, and short ways to run it."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

from data_pipelines.prepare import prepare

REPOSITORY = Path(__file__).resolve().parents[2]
COLUMNS = ["path", "language", "source", "speaker", "split", "text", "n_samples"]


def noise(samples, seed):
    return (np.random.default_rng(seed).normal(size=samples) * 3000).astype(np.int16)


def write_table(folder, rows, columns=COLUMNS, name="manifest.tsv"):
    lines = ["\t".join(columns), *("\t".join(str(row[c]) for c in columns) for row in rows)]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_corpus(folder, languages=("fr", "deu", "eng"), clips=10):
    """Short clips of noise, two corpora and speakers a language; returns the table's rows."""
    rows = []
    for language, corpus in itertools.product(languages, ("one", "two")):
        (folder / language / corpus).mkdir(parents=True)
        for k in range(clips):
            seed = len(rows)
            samples = int(np.random.default_rng(1000 + seed).integers(3000, 24000))
            path = f"{language}/{corpus}/{k:02d}.wav"
            soundfile.write(folder / path, noise(samples, seed), 16000)
            split = "dev" if k == clips - 1 else "test" if k == clips - 2 else "train"
            row = (path, language, corpus, f"{corpus}-{k % 2}", split, f'it "is" {k}', samples)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    write_table(folder, rows)
    return rows


def go(folder, out, **options):
    return prepare(folder, out=out, **({"workers": 1, "progress": False, "clips_per_shard": 4} | options))


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def prepare_in_a_process(folder, out, *options, **popen):
    command = [sys.executable, "-m", "data_pipelines", "prepare", str(folder), "--out", str(out), *options]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen)
