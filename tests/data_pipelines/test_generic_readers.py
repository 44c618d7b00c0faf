"""Readers of generic layouts, each on a miniature made from clips of the demo corpus, prepared sample for sample."""

import gzip
import importlib.resources.abc
import io
import json
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from data_pipelines.audio import AudioError, decode
from data_pipelines.containers import Containers
from data_pipelines.corpora import Clip, CorpusError
from data_pipelines.corpora.readers import read
from data_pipelines.manifest import Split
from data_pipelines.prepare import PrepareError
from data_pipelines.sources import ShardSource
from data_pipelines.tfds_examples import _tfds
from tests.data_pipelines.noise_corpus import REPOSITORY, go

DEMO = REPOSITORY / "demo_corpus"


@pytest.fixture(scope="module")
def spoken():
    """Two Arabic clips and a French one as int16 [samples] at 16 kHz, by "ara-0", "ara-1", "fra-0"."""
    sounds = {}
    for language in ("ara", "fra"):
        for k, path in enumerate(sorted((DEMO / language).rglob("*.opus"))[: 2 if language == "ara" else 1]):
            waveform = decode(path, name=path.name).waveform
            sounds[f"{language}-{k}"] = np.clip(np.rint(waveform * 32768), -32768, 32767).astype(np.int16)
    return sounds


def file_bytes(waveform, format="FLAC", rate=16000):
    with io.BytesIO() as sink:
        soundfile.write(sink, waveform, rate, format=format)
        return sink.getvalue()


def prepared(folder, tmp_path, reader, **options):
    """Id -> (samples, language, split, speaker, text) of what `prepare` makes of it, unjoined; and what it rejected."""
    made = go(folder, tmp_path / "out", reader=reader, options=options, join_seconds=0, min_seconds=0)
    manifest, source = made.manifest, ShardSource(made.manifest)
    rows = {}
    for i in range(len(manifest)):
        facts = (manifest.languages[manifest.language[i]], Split(manifest.split[i]).name.lower())
        facts += (manifest.speakers[manifest.speaker[i]], manifest.text(i))
        rows[manifest.id(i)] = (np.rint(source.read(i) * 32768).astype(np.int16), *facts)
    return rows, {entry.path: entry.reason for entry in made.rejected}


def check(rows, expected):
    assert set(rows) == set(expected)
    for name, (waveform, *facts) in expected.items():
        np.testing.assert_array_equal(rows[name][0], waveform, err_msg=name)
        assert list(rows[name][1:]) == facts, name


def test_fairseq(spoken, tmp_path):
    folder = tmp_path / "corpus"
    (folder / "audio").mkdir(parents=True)
    for name, waveform in spoken.items():
        soundfile.write(folder / f"audio/{name}.flac", waveform, 16000)
    train = [f"{name}.flac\t{len(spoken[name])}" for name in ("ara-0", "fra-0")]
    (folder / "train.tsv").write_text("\n".join([str(folder / "audio"), *train, "ara-1.flac"]) + "\n")
    (folder / "train.lang").write_text("ar\nfr\nar\n")
    (folder / "valid.tsv").write_text(f"{folder}/audio\nara-1.flac\t{len(spoken['ara-1'])}\n")
    (folder / "valid.lang").write_text("ara\n")
    (folder / "valid.wrd").write_text("a letter\n")
    rows, rejected = prepared(folder, tmp_path, "fairseq")
    expected = {f"audio/{n}.flac": (spoken[n], n[:3], "train", "", None) for n in ("ara-0", "fra-0")}
    check(rows, expected | {"audio/ara-1.flac": (spoken["ara-1"], "ara", "dev", "", "a letter")})
    assert rejected == {"ara-1.flac": "no number of frames in train.tsv: 'ara-1.flac'"}
    with pytest.raises(CorpusError, match="outside of .*valid.*|outside of .*ignore_root=true"):
        (folder / "x").mkdir()
        read("fairseq", folder / "x", {"manifests": str(folder), "language": "ara"})
    (folder / "valid.lang").write_text("ara\nara\n")
    with pytest.raises(CorpusError, match="2 lines for 1 clips"):
        read("fairseq", folder, {})


def test_kaldi(spoken, tmp_path):
    folder = tmp_path / "corpus"
    data = folder / "data" / "train"
    data.mkdir(parents=True)
    soundfile.write(folder / "long.wav", np.concatenate([spoken["ara-0"], spoken["ara-1"]]), 16000)
    soundfile.write(folder / "fra.flac", spoken["fra-0"], 16000)
    middle = len(spoken["ara-0"]) / 16000
    (data / "wav.scp").write_text(
        f"long {folder}/long.wav\nfra fra.flac\npiped touch {tmp_path}/ran |\npacked wav.ark:42\n"
    )
    (data / "segments").write_text(
        f"u1 long 0 {middle}\nu2 long {middle} -1\nu3 fra 0 -1\nu4 piped 0 1\nu5 gone 0 1\nu6 packed 0 1\n"
    )
    (data / "utt2spk").write_text("u1 s1\nu2 s1\nu3 s2\n")
    (data / "utt2lang").write_text("u1 ar\nu2 ar\nu3 fr\nu4 fr\nu5 fr\nu6 fr\n")
    (data / "text").write_text("u1 alif\nu3\n")
    rows, rejected = prepared(folder, tmp_path, "kaldi", data="data")
    expected = {
        "u1": (spoken["ara-0"], "ara", "train", "s1", "alif"),
        "u2": (spoken["ara-1"], "ara", "train", "s1", None),
    }
    check(rows, expected | {"u3": (spoken["fra-0"], "fra", "train", "s2", None)})
    assert "never run" in next(reason for path, reason in rejected.items() if path.startswith("touch"))
    assert "in an archive, which is not read" in rejected["wav.ark:42"]
    assert len(rejected) == 3 and not (tmp_path / "ran").exists()


def test_webdataset(spoken, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        for name, waveform in spoken.items():
            info = json.dumps({"language": name[:3], "speaker": 7, "text": f"of {name}"}).encode()
            for suffix, data in (("flac", file_bytes(waveform)), ("json", info)):
                member = tarfile.TarInfo(f"./{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "more.tar.gz").write_bytes(gzip.compress(b""))
    rows, rejected = prepared(folder, tmp_path, "webdataset")
    check(rows, {f"train-000/./{n}": (spoken[n], n[:3], "train", "7", f"of {n}") for n in spoken})
    assert "decompress it first" in rejected["more.tar.gz"]
    whole = (folder / "train-000.tar").read_bytes()
    clip = read("webdataset", folder, {}).clips[2]
    (folder / "train-000.tar").write_bytes(whole[: len(whole) // 2])
    listing = read("webdataset", folder, {})
    assert len(listing.clips) < 3 and any("damaged tar" in r.reason for r in listing.rejected)
    with Containers({"": str(folder)}) as containers, pytest.raises(AudioError, match="truncated: the tar ends"):
        containers.decode(clip)


def tar_of(members):
    """Bytes of a tar of (name, bytes)."""
    with io.BytesIO() as sink:
        with tarfile.open(fileobj=sink, mode="w") as tar:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return sink.getvalue()


def test_a_tar_that_does_not_end_as_it_should_is_told(spoken, tmp_path):
    sounds = {f"{name}.flac": file_bytes(waveform) for name, waveform in spoken.items()}
    whole, last = tar_of(sounds.items()), tar_of(list(sounds.items())[:2]).rstrip(b"\0")
    begin = -(-len(last) // 512) * 512  # of the third member
    damaged = bytearray(whole)
    damaged[begin : begin + 8] = b"\xff" * 8
    cases = {
        "between members": (whole[:begin], 2, f"no end of the archive at byte {begin}"),
        "in a header": (whole[: begin + 100], 2, f"no end of the archive at byte {begin}"),
        "bad header": (bytes(damaged), 2, f"no end of the archive at byte {begin}"),
        "two in a row": (whole + tar_of([("more.flac", sounds["ara-0.flac"])]), 3, "something follows the end"),
        "as it should": (whole, 3, None),
    }
    for name, (content, clips, said) in cases.items():
        (tmp_path / "a.tar").write_bytes(content)
        listing = read("webdataset", tmp_path, {"language": "ara"})
        assert len(listing.clips) == clips, name
        assert [said in entry.reason for entry in listing.rejected] == ([True] if said else []), name


def test_members_of_a_tar_that_cannot_be_used_are_told(spoken, tmp_path):
    sound = file_bytes(spoken["ara-0"])
    members = [("a.flac", b"older"), ("a.flac", sound), ("b.m4a", sound), ("c.flac", sound), ("c.json", b'{"text": "x')]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    listing = read("webdataset", tmp_path, {"language": "ara"})
    assert [(clip.id, clip.size) for clip in listing.clips] == [("a/a", len(sound))]
    said = {entry.path: entry.reason for entry in listing.rejected}
    assert said.keys() == {"a.tar/b", "a.tar/c", "a.tar"} and "a.flac is there twice" in said["a.tar"]
    assert "not decoded here" in said["a.tar/b"] and ".json is damaged" in said["a.tar/c"]


def test_parquet_as_hugging_face_writes_it(spoken, tmp_path):
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    features = {"lang_id": {"names": ["ar_eg", "fr_fr"], "_type": "ClassLabel"}}
    names = list(spoken)
    table = pa.table(
        {
            "audio": [{"bytes": file_bytes(spoken[n], "WAV"), "path": f"{n}.wav"} for n in names]
            + [{"bytes": None, "path": "x"}],
            "lang_id": [int(n.startswith("fra")) for n in names] + [0],
            "sentence": [*names, "gone"],
            "client": [*"abc", "d"],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / "data/validation-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(table.slice(0, 1), folder / "data/train-00000-of-00001.parquet")
    options = {"language_column": "lang_id", "text_column": "sentence", "speaker_column": "client"}
    rows, rejected = prepared(folder, tmp_path, "parquet", **options)
    places = [f"data/validation-00000-of-00001/{k // 2}/{k % 2}" for k in range(3)]
    expected = {p: (spoken[n], n[:3], "dev", "abc"[k], n) for k, (p, n) in enumerate(zip(places, names, strict=True))}
    check(rows, expected | {"data/train-00000-of-00001/0/0": (spoken[names[0]], "ara", "train", "a", names[0])})
    assert list(rejected.values()) == ["the row holds no bytes: embed the audio (Hugging Face: embed_table_storage)"]
    with pytest.raises(CorpusError, match="no column 'langid'; it has: audio, lang_id"):
        read("parquet", folder, {"language_column": "langid"})
    with pytest.raises(CorpusError, match="give language or language_column"):
        read("parquet", folder, {})


def test_lhotse(spoken, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    both = np.concatenate([spoken["ara-0"], spoken["ara-1"]])
    soundfile.write(folder / "long.flac", both, 16000)
    middle, end = len(spoken["ara-0"]) / 16000, len(both) / 16000

    def recording(name, **other):
        source = {"type": "file", "channels": [0], "source": str(folder / f"{name}.flac")}
        return {
            "id": name,
            "sources": [source],
            "sampling_rate": 16000,
            "num_samples": len(both),
            "duration": end,
        } | other

    def write(name, entries):
        with gzip.open(folder / name, "wt") as sink:
            sink.writelines(json.dumps(entry) + "\n" for entry in entries)

    write("c_recordings_train.jsonl.gz", [recording("long")])
    spoken_in = {"recording_id": "long", "channel": 0, "language": "Arabic", "speaker": "s"}
    first = {"id": "u1", "start": 0.0, "duration": middle, "text": "alif", **spoken_in}
    second = {"id": "u2", "start": middle, "duration": end - middle, **spoken_in}
    write("c_supervisions_train.jsonl.gz", [first, second, {**first, "id": "u3", "recording_id": "gone"}])
    rows, rejected = prepared(folder, tmp_path, "lhotse")
    check(
        rows, {"u1": (spoken["ara-0"], "ara", "train", "s", "alif"), "u2": (spoken["ara-1"], "ara", "train", "s", None)}
    )
    assert rejected == {"u3": "no recording of that id"}
    cut = {"id": "c1", "start": 0, "duration": end, "channel": 0, "supervisions": [first, second], "type": "MonoCut"}
    cuts = [
        {**cut, "recording": recording("long")},
        {**cut, "id": "c2", "type": "MixedCut"},
        {**cut, "id": "c3", "recording": recording("long", transforms=[{"name": "Speed"}])},
    ]
    write("cuts_train.jsonl.gz", cuts)
    listing = read("lhotse", folder, {})
    assert [(c.id, c.end, c.samples, c.text) for c in listing.clips] == [("c1", None, len(both), "alif")]
    assert [r.path for r in listing.rejected] == ["c2", "c3"]


@pytest.mark.parametrize(
    ("suffix", "counted", "beyond", "taken"),
    [("opus", 48_000, 0, True), ("mp3", 44_100, 2547, True), ("wav", 44_100, 0, True), ("wav", 44_100, 2547, False)],
)
def test_lhotse_counts_compressed_audio_otherwise(tmp_path, suffix, counted, beyond, taken):
    """Opus at 48 kHz, whatever its header says; of MP3 what the encoder put before and after too."""
    rate, folder = 16_000 if suffix == "opus" else 44_100, tmp_path / "corpus"
    folder.mkdir()
    sound = np.random.default_rng(0).normal(size=3 * rate) * 0.1
    kinds = {"opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III"), "wav": ("WAV", "PCM_16")}
    soundfile.write(folder / f"a.{suffix}", sound, rate, format=kinds[suffix][0], subtype=kinds[suffix][1])
    facts = {"sampling_rate": counted, "num_samples": 3 * counted + beyond, "duration": 3 + beyond / counted}
    source = {"type": "file", "channels": [0], "source": f"a.{suffix}"}
    (folder / "recordings_train.jsonl").write_text(json.dumps({"id": "a", "sources": [source]} | facts) + "\n")
    if taken:
        rows, rejected = prepared(folder, tmp_path, "lhotse", language="fra")
        assert set(rows) == {"a"} and len(rows["a"][0]) == 48_000 and not rejected
    else:
        with pytest.raises(PrepareError, match="n_samples is .* in the table"):
            prepared(folder, tmp_path, "lhotse", language="fra")


def test_tfds_without_tensorflow(spoken, tmp_path, monkeypatch):
    tfds = _tfds()

    class Letters(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "speech": tfds.features.Audio(sample_rate=16000, dtype=np.int64),
                "lang": tfds.features.ClassLabel(names=["ara", "fra"]),
                "id": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train_clean": self._generate_examples()}

        def _generate_examples(self):
            for name, waveform in spoken.items():
                yield name, {"speech": waveform.astype(np.int64), "lang": name[:3], "id": name}

    builder = Letters(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    with monkeypatch.context() as patch:  # only writing needs the backport, and a dtype of TensorFlow
        patch.setitem(sys.modules, "importlib_resources", importlib.resources)
        patch.setitem(sys.modules, "importlib_resources.abc", importlib.resources.abc)
        patch.setattr(tfds.features.Audio, "dtype", property(lambda feature: feature.np_dtype))
        builder.download_and_prepare()
    assert "tensorflow" not in sys.modules
    options = {"audio": "speech", "language_feature": "lang", "id_feature": "id"}
    rows, _ = prepared(builder.data_dir, tmp_path, "tfds", **options)
    check(rows, {name: (spoken[name], name[:3], "train", "", None) for name in spoken})
    with pytest.raises(CorpusError, match="no feature 'audio'; it has"):
        read("tfds", builder.data_dir, {"language": "ara"})


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OPUS"])
def test_stretches_of_one_recording(tmp_path, kind, monkeypatch):
    """What is cut from a decoded whole; where libsndfile seeks, only what is asked for is decoded, else once in all."""
    rng = np.random.default_rng(3)
    long = (rng.normal(size=16000 * 12) * 3000).astype(np.int16)
    path = tmp_path / "long.ext"
    soundfile.write(
        path, long, 16000, format="OGG" if kind == "OPUS" else kind, subtype="OPUS" if kind == "OPUS" else None
    )
    whole = decode(path, name="long").waveform
    decodes = []
    monkeypatch.setattr("data_pipelines.containers.decode", lambda *a, **k: decodes.append(1) or decode(*a, **k))
    plain = Clip("x", "long.ext", "fra", "c", "", Split.TRAIN, "", "", None, 1, 1)
    with Containers({"": str(tmp_path)}) as containers:
        for start, end in [(0.0, 0.5), (3.25, 5.0), (1.1, 1.7), (11.0, None), (11.5, 12.4)]:
            got = containers.decode(plain._replace(start=start, end=end)).waveform
            np.testing.assert_array_equal(got, whole[round(start * 16000) : round((end or 12) * 16000)])
        for start, end in ((11.5, 12.6), (12.0, None), (13.0, 14.0)):
            with pytest.raises(AudioError, match="ends after 12.000 s"):
                containers.decode(plain._replace(start=start, end=end))
    assert len(decodes) == (kind == "OPUS")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("kind", "rate"), [("OPUS", 48_000), ("VORBIS", 16_000), ("MPEG_LAYER_III", 44_100)])
def test_stretches_of_a_recording_that_is_too_long_to_be_kept(tmp_path, kind, rate, known, monkeypatch):
    """Podcasts of hours as Ogg or MP3: read from front to back, whatever the order, and never in memory as a whole."""
    long = np.random.default_rng(3).normal(size=rate * 12) * 0.1
    path = tmp_path / "long.ext"
    soundfile.write(path, long, rate, format="MP3" if kind.startswith("MPEG") else "OGG", subtype=kind)
    whole = decode(path, name="long").waveform
    monkeypatch.setattr("data_pipelines.containers.MAX_SECONDS", 5.0)
    if known:
        monkeypatch.setattr("data_pipelines.containers.decode", None)
    else:  # the header does not say so
        monkeypatch.setattr("data_pipelines.containers.announced_seconds", lambda path: 0.0)
        monkeypatch.setattr("data_pipelines.audio.MAX_SECONDS", 5.0)
    monkeypatch.setattr("data_pipelines.audio_blocks._VALUES", 10_000)
    plain = Clip("x", "long.ext", "fra", "c", "", Split.TRAIN, "", "", None, 1, 1)
    with Containers({"": str(tmp_path)}) as containers:
        for start, end in [(0.0, 0.5), (3.25, 5.0), (4.5, 9.5), (9.4, None), (1.1, 1.7), (11.5, 12.4), (0.3, 0.4)]:
            got = containers.decode(plain._replace(start=start, end=end))
            np.testing.assert_array_equal(got.waveform, whole[round(start * 16000) : round((end or 13) * 16000)])
            assert (got.source_rate, got.source_channels) == (rate, 1)
        for start, end in ((11.5, 12.6), (12.0, None), (13.0, 14.0)):
            with pytest.raises(AudioError, match="ends after 12.000 s"):
                containers.decode(plain._replace(start=start, end=end))
        for start, end in ((1.0, 6.1), (6.0, None)):
            with pytest.raises(AudioError, match="longer than 5 s"):
                containers.decode(plain._replace(start=start, end=end))


@pytest.mark.parametrize("reader", ["fairseq", "kaldi", "lhotse", "webdataset", "voxpopuli"])
def test_all_of_a_corpus_without_splits_is_trained_on_where_that_is_said(tmp_path, reader):
    """Else a fifth of it is held out, of VoxPopuli's unlabelled speech as well."""
    names = [f"{number:02d}.wav" for number in range(40)]
    folder = tmp_path / "speech"
    audio = folder / "unlabelled_data/fr/2018" if reader == "voxpopuli" else folder
    audio.mkdir(parents=True)
    for name in names:
        event = "20180113-0900-PLENARY-" if reader == "voxpopuli" else ""
        (audio / f"{event}{name}").write_bytes(b"not decoded")
    if reader == "fairseq":
        (folder / "all.tsv").write_text("\n".join([str(folder), *(f"{name}\t1" for name in names)]) + "\n")
    elif reader == "kaldi":
        (folder / "wav.scp").write_text("".join(f"{name} {name}\n" for name in names))
    elif reader == "lhotse":
        source = {"type": "file", "channels": [0]}
        facts = {"sampling_rate": 16000, "num_samples": 1, "duration": 1.0}
        lines = ({"id": n, "sources": [source | {"source": n}]} | facts for n in names)
        (folder / "recordings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif reader == "webdataset":
        (folder / "a.tar").write_bytes(tar_of((name, b"x") for name in names))
    options = {} if reader == "voxpopuli" else {"language": "fr"}
    assert len({clip.split for clip in read(reader, folder, options).clips}) == 3
    clips = read(reader, folder, options | {"split": "train"}).clips
    assert len(clips) == 40 and {clip.split for clip in clips} == {Split.TRAIN}


def test_unknown_readers_and_options_are_answered_with_the_nearest():
    with pytest.raises(CorpusError, match="no reader is called 'kaldy'; did you mean kaldi"):
        read("kaldy", DEMO, {})
    with pytest.raises(CorpusError, match="has no option 'langauge'; did you mean language"):
        read("kaldi", DEMO, {"langauge": "fra"})
    with pytest.raises(CorpusError, match="option 'language_folder'.*is 'one', not of the kind int"):
        read("fairseq", DEMO, {"language_folder": "one"})
