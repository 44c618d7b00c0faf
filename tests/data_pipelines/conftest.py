"""Corpora that several files of tests only read: raw noise, the same prepared, and prepared ramps with units."""

import numpy as np
import pytest
import soundfile

from data_pipelines.batch import num_frames
from data_pipelines.manifest import Manifest
from data_pipelines.prepare import prepare
from data_pipelines.units import UnitStore, UnitWriter
from tests.data_pipelines.noise_corpus import go, make_corpus
from tests.data_pipelines.ramps import ramp


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """A corpus that was not prepared: its folder, and the rows of its table."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make_corpus(folder)


@pytest.fixture(scope="session")
def whole(raw, tmp_path_factory):
    """`raw`, prepared in one go."""
    return go(raw[0], tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Manifest:
    """A prepared corpus of 66 clips, 1 to 7 s of ramps, in three languages and two corpora; the fourth has no train."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    table = ["path\tlanguage\tcorpus\tsplit\tid"]
    for clip in range(66):
        samples = int(rng.integers(16_000, 112_000))
        soundfile.write(folder / f"{clip:02d}.wav", ramp(clip, 0, samples), 16_000, subtype="PCM_16")
        split = "train" if clip < 48 else "dev" if clip < 60 else "test"
        language = "ukr" if clip == 65 else ("deu", "fra", "eng")[clip % 3]
        table.append(f"{clip:02d}.wav\t{language}\t{'xy'[clip % 2]}\t{split}\t{clip:02d}")
    (folder / "all.tsv").write_text("\n".join(table) + "\n")
    out = folder.parent / f"{folder.name}-prepared"
    prepared = prepare(
        folder, out=out, table=folder / "all.tsv", workers=1, join_seconds=1, min_seconds=1, progress=False
    )
    assert len(prepared.manifest) == 66
    return prepared.manifest


@pytest.fixture(scope="session")
def units(corpus, tmp_path_factory) -> tuple[UnitStore]:
    """The unit of frame t of utterance i is 500 i + t: it tells where it is from. (No clip has 500 frames.)"""
    directory = tmp_path_factory.mktemp("units") / "positions"
    with UnitWriter(directory, corpus, units=500 * len(corpus), source="positions") as writer:
        for i in range(len(corpus)):
            writer.add(i, 500 * i + np.arange(num_frames(int(corpus.samples[i]))))
    return (UnitStore.load(directory, corpus),)
