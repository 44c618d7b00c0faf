"""ML-SUPERB 2.0's data set, unpacked from Parquet files as `datasets` writes them, and read as ESPnet's recipe does."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from data_pipelines.mlsuperb.batches import TrackBatchesConfig, track_batches
from data_pipelines.mlsuperb.challenge import (
    SPLITS,
    matches,
    published_text,
    read_challenge,
    unpack,
    untold_recordings,
)
from data_pipelines.mlsuperb.layout import MlSuperbError

ROWS = {
    "train": [
        ("cv_eng_000001", "[eng] HELLO YOU", 1.0),
        ("fleurs_org_jpn_000002", "[org_jpn] 日本", 1.0),
        ("mls_deu_000003", "[deu] GUTEN TAG", 21.0),
        ("mls_deu_000004", "NO LANGUAGE", 1.0),
        ("mls_deu_000005", "[deu] ", 1.0),
    ],
    "dev": [("cv_eng_000010", "[eng] HELLO", 1.0), ("cv_deu_000011", "[deu] HALLO", 0.5)],
    "dev_dialect": [("ms_speech_guj_000020", "[hin] HELLO", 25.0)],
}


def flac(seconds: float) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).normal(scale=0.1, size=int(seconds * 16_000))
    soundfile.write(data, noise, 16_000, format="FLAC")
    return data.getvalue()


@pytest.fixture
def dataset(tmp_path):
    """A copy of the data set: a file a split, two rows a row group, one row without audio."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name, rows in ROWS.items():
        columns = {
            "id": [id for id, *_ in rows],
            "language": ["xyz" for _ in rows],
            "audio": [{"bytes": flac(seconds), "path": None} for *_, seconds in rows],
            "text": [text for _, text, _ in rows],
        }
        if name == "train":
            for column, value in (("id", "../cv_eng_9"), ("language", "x"), ("audio", None), ("text", "[eng] X")):
                columns[column].append(value)
        pq.write_table(
            pa.table(columns), tmp_path / "set" / "data" / f"{name}-00000-of-00001.parquet", row_group_size=2
        )
    return tmp_path / "set"


def test_the_data_set_becomes_the_recipes_folder(dataset, tmp_path):
    made = unpack(dataset, tmp_path / "asr1")
    assert made.counts == {"train": 5, "dev": 2, "dev_dialect": 1} and matches(tmp_path / "asr1")
    assert [row.reason for row in made.left_out] == ["an id that cannot be the name of a file"]
    lines = (tmp_path / "asr1" / "data" / "train" / "text").read_text().split("\n")
    assert lines[1] == "fleurs_org_jpn_000002 [jpn] 日本"
    assert (tmp_path / "asr1" / "data" / "dev_dialect" / "text").read_text() == "ms_speech_guj_000020 [guj] HELLO\n"
    written = tmp_path / "asr1" / "data" / "raw_audio" / "cv_eng_000001.wav"
    before = written.stat().st_mtime_ns
    assert soundfile.info(written).duration == 1.0
    unpack(dataset, tmp_path / "asr1")  # a stopped run goes on
    assert written.stat().st_mtime_ns == before


def test_the_track_is_the_recipes(dataset, tmp_path):
    unpack(dataset, tmp_path)
    track = read_challenge(tmp_path)
    assert (track.task, track.token_kind, track.symbols) == ("joint", "character", ["[eng]", "[jpn]"])
    assert [each.utterance.id for each in track.parts["train"]] == ["cv_eng_000001", "fleurs_org_jpn_000002"]
    assert Counter(row.reason for row in track.left_out["train"]) == {
        "not between 0.1 and 20 s": 1,
        "no language before the text": 1,
        "no text": 1,
    }
    assert track.tokens[0] == "<blank>" and track.tokens[-1] == "<sos/eos>" and "[deu]" not in track.tokens
    assert track.parts["train"][1].tokens == ["[jpn]", "<space>", "日", "本"]
    assert [each.utterance.language for each in track.parts["test"]] == ["eng", "deu"]
    dialects = read_challenge(tmp_path, judged_on="dev_dialect")
    assert [(each.utterance.language, each.utterance.source) for each in dialects.parts["test"]] == [
        ("guj", "ms_speech")
    ]
    with track_batches(track, "train", TrackBatchesConfig(size=2)) as batches:
        (batch,) = list(batches)
    assert batch.samples.tolist() == [16_000, 16_000] and (batch.units[0, :, 0] >= 0).sum() == len("HELLO YOU") + 2


def test_texts_are_scored_with_the_white_space_that_they_have(dataset, tmp_path):
    """The challenge's scorer reads data/dev/text itself; training reads what Kaldi's scripts make of it."""
    assert published_text("cv_eng_1", " [eng] A\u00a0B  C ", split="dev") == "[eng] A\u00a0B  C"
    unpack(dataset, tmp_path)
    (tmp_path / "data" / "dev" / "text").write_text("cv_eng_000010 [eng] A\u00a0B  C\n", "utf-8")
    (example,) = read_challenge(tmp_path).parts["test"]
    assert example.text == "[eng] A\u00a0B  C"
    assert example.tokens == ["[eng]", "<space>", "A", "\u00a0", "B", "<space>", "C"]


def test_lines_without_a_recording_are_named(dataset, tmp_path):
    unpack(dataset, tmp_path)
    (tmp_path / "data" / "raw_audio" / "cv_eng_000010.wav").unlink()
    (tmp_path / "data" / "raw_audio" / "cv_deu_000011.wav").write_bytes(b"no sound")
    with pytest.raises(MlSuperbError, match="data/dev has no utterance: 1 recording missing, 1 recording cannot be"):
        read_challenge(tmp_path)


def test_recordings_without_a_text_are_listed(dataset, tmp_path):
    unpack(dataset, tmp_path)
    assert untold_recordings(tmp_path, judged_on="dev_dialect") == []
    for name in ("train", "dev_dialect"):
        text = tmp_path / "data" / name / "text"
        text.write_text(text.read_text("utf-8").split("\n", 1)[1], "utf-8")
    sound = tmp_path / "data" / "raw_audio"
    assert untold_recordings(tmp_path) == [sound / "cv_eng_000001.wav"]
    both = [sound / "cv_eng_000001.wav", sound / "ms_speech_guj_000020.wav"]
    assert untold_recordings(tmp_path, judged_on="dev_dialect") == both


def test_folders_that_are_neither(tmp_path):
    with pytest.raises(MlSuperbError, match=r"data/train/text is missing.*local/download\.py"):
        read_challenge(tmp_path)
    with pytest.raises(MlSuperbError, match=r"no data/train-\*\.parquet"):
        unpack(tmp_path, tmp_path / "out")
    (tmp_path / "data").mkdir()
    for name in SPLITS:
        pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), tmp_path / "data" / f"{name}-0.parquet")
    with pytest.raises(MlSuperbError, match="no column 'audio'; it has id, text"):
        unpack(tmp_path, tmp_path / "out")


def test_hindi_stands_for_dialects_in_their_own_set_alone():
    assert published_text("ms_speech_guj_1", "[hin] X", split="train") == "[hin] X"
    assert published_text("cv_hin_1", "[hin] X", split="dev_dialect") == "[hin] X"
