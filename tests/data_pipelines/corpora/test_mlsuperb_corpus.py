"""ML-SUPERB's folder as a corpus for `prepare`: what is listed, of which corpus, language and split."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines.__main__ import Prepare
from data_pipelines.corpora import CorpusError
from data_pipelines.corpora.readers import READERS, read
from data_pipelines.manifest import Manifest, Split


@pytest.fixture
def folder(tmp_path):
    """Two corpora in the real layout, a recording of two parts, one without text, one that is not there."""

    def make(place, **lines):
        for name in ("10min_train", "1h_train", "10min_dev", "10min_test"):
            (tmp_path / "ml" / place / "wav").mkdir(parents=True, exist_ok=True)
            ids = lines.get(f"of_{name}", ())
            text = "".join(f"{id} {id}.flac says {id[-1]}\n" for id in ids)
            (tmp_path / "ml" / place / f"transcript_{name}.txt").write_text(text, "utf-8")
            for number, id in enumerate(ids):
                sound = np.random.default_rng(number).normal(0, 0.1, 16_000)
                soundfile.write(tmp_path / "ml" / place / "wav" / f"{id}.wav", sound, 16_000)

    ids = [f"mls_eng_00000{number}" for number in range(6)]
    make("mls/eng", of_1h_train=ids[:4], of_10min_train=ids[:1], of_10min_dev=ids[4:5], of_10min_test=[ids[5], ids[3]])
    make("commonvoice/org_jpn", of_1h_train=["cv_org_jpn_000001"])
    (tmp_path / "ml" / "mls" / "eng" / "wav" / "mls_eng_000001.wav").unlink()
    soundfile.write(tmp_path / "ml" / "mls" / "eng" / "wav" / "mls_eng_000099.wav", np.ones(99), 16_000)
    (tmp_path / "ml" / "elsewhere").mkdir()
    return tmp_path / "ml"


def test_the_folder_is_listed_by_corpus_language_and_split(folder):
    listing = READERS["mlsuperb"](folder)
    found = {Path(c.path).stem: (c.corpus, c.language, c.split, c.text) for c in listing.clips}
    assert found == {
        "cv_org_jpn_000001": ("commonvoice", "jpn", Split.TRAIN, "says 1"),
        "mls_eng_000000": ("mls", "eng", Split.TRAIN, "says 0"),
        "mls_eng_000002": ("mls", "eng", Split.TRAIN, "says 2"),
        "mls_eng_000003": ("mls", "eng", Split.TEST, "says 3"),
        "mls_eng_000004": ("mls", "eng", Split.DEV, "says 4"),
        "mls_eng_000005": ("mls", "eng", Split.TEST, "says 5"),
    }
    assert {(Path(row.path).name, row.reason.split(" (")[0]) for row in listing.rejected} == {
        ("elsewhere", "none of the benchmark's corpora"),
        ("mls_eng_000001.wav", "no such file"),
        ("mls_eng_000003.wav", "transcript_1h_train.txt line 4: it is in test too, and listed there"),
        ("mls_eng_000099.wav", "no transcript names it"),
    }


def test_folders_that_are_not_the_benchmark(folder):
    with pytest.raises(CorpusError, match=r"not laid out as <corpus>/<language>/wav/.*it holds eng/"):
        read("mlsuperb", folder / "mls", {})
    (folder / "mls" / "english-ish").mkdir()
    with pytest.raises(CorpusError, match=r"mls/english-ish: .*not a language code"):
        read("mlsuperb", folder, {})


def test_prepare_takes_the_folder(folder, tmp_path, capsys):
    """python -m data_pipelines prepare DIR --reader mlsuperb --out OUT, without its process."""
    Prepare(folder, tmp_path / "out", reader="mlsuperb", workers=1, join_seconds=0, min_seconds=0).run()
    assert "6 utterances" in capsys.readouterr().out
    hours = Manifest.load(tmp_path / "out").seconds(by=("language", "corpus"))
    assert hours == {("eng", "mls"): 5.0, ("jpn", "commonvoice"): 1.0}
