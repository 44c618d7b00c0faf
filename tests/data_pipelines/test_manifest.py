import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.manifest import MANIFEST_NAME, Manifest, ManifestError, Split, write_manifest

COLUMNS = {
    "samples": [16000, 32000, 8000, 48000],
    "language": ["fra", "eng", "fra", "deu"],
    "corpus": ["b", "a", "a", "b"],
    "speaker": ["s2", "s1", "", "s2"],
    "split": [Split.TRAIN, Split.TRAIN, Split.DEV, Split.TEST],
    "id": ["u/1", "u/2", "ü/3", "u/4"],
    "clip_names": [["u/1", "x"], ["u/2"], ["ü/3"], ["u/4"]],
    "text": ["un | deux", None, "trois", "vier"],
    "licence": ["CC0", "CC0", None, "GPL"],
    "shard": [0, 0, 1, 1],
    "record": [0, 1, 0, 1],
}


def shards(root, sizes=(10, 20)):
    (root / "shards").mkdir(parents=True, exist_ok=True)
    names = [f"shards/{k}.arrayrecord" for k in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        (root / name).write_bytes(bytes(size))
    return {"shard_names": names, "shard_bytes": list(sizes)}


@pytest.fixture
def root(tmp_path):
    write_manifest(tmp_path, **COLUMNS, **shards(tmp_path), facts={"plan": "p"})
    return tmp_path


def test_what_is_written_is_read(root):
    m = Manifest.load(root)
    assert len(m) == 4 and m.root == root and m.facts == {"plan": "p"}
    assert m.languages == ("deu", "eng", "fra") and m.corpora == ("a", "b") and m.speakers == ("", "s1", "s2")
    for name, kind in {"samples": "i8", "language": "i4", "corpus": "i4", "speaker": "i4", "split": "i1"}.items():
        assert getattr(m, name).dtype == np.dtype(kind)
    for name in ("shard", "record", "clips"):
        assert getattr(m, name).dtype == np.int32
    for name in ("language", "corpus", "speaker"):
        table = {"language": m.languages, "corpus": m.corpora, "speaker": m.speakers}[name]
        assert [table[k] for k in getattr(m, name)] == COLUMNS[name]
    assert m.samples.tolist() == COLUMNS["samples"] and m.clips.tolist() == [2, 1, 1, 1]
    assert [m.id(i) for i in range(4)] == COLUMNS["id"] and [m.clip_names(i) for i in range(4)] == COLUMNS["clip_names"]
    assert [m.text(i) for i in range(4)] == COLUMNS["text"] and [m.licence(i) for i in range(4)] == COLUMNS["licence"]
    assert m.shard_records.tolist() == [2, 2] and m.shard_bytes.tolist() == [10, 20]


def test_columns_are_views_of_the_mapped_file_and_cannot_be_written(root):
    m = Manifest.load(root)
    assert not m.samples.flags.owndata
    with pytest.raises(ValueError):
        m.samples[0] = 1


def test_rows_seconds_find_and_describe(root):
    m = Manifest.load(root)
    assert m.rows(Split.TRAIN).tolist() == [0, 1] and m.rows(Split.TEST).tolist() == [3] and len(m.rows()) == 4
    assert m.rows(Split.TRAIN).dtype == np.int64
    assert m.seconds() == {"fra": 1.5, "eng": 2.0, "deu": 3.0}
    assert m.seconds(Split.TRAIN) == {"fra": 1.0, "eng": 2.0}
    assert m.seconds(by="corpus") == {"a": 2.5, "b": 4.0}
    assert m.seconds(by=("language", "corpus"))[("fra", "b")] == 1.0
    assert m.seconds(by="speaker")["s2"] == 4.0
    with pytest.raises(ManifestError, match="'channel'"):
        m.seconds(by="channel")
    assert m.find("ü/3") == 2
    with pytest.raises(ManifestError, match="no utterance 'u/9'"):
        m.find("u/9")
    assert m.describe(0) == "fra/b utterance u/1 (clips u/1, x)" and m.describe(1) == "eng/a utterance u/2"


def test_description_of_many_clips_stays_short(tmp_path):
    write_manifest(
        tmp_path, samples=[1], language=["fra"], corpus=["a"], id=["x"], clip_names=[[str(k) for k in range(99)]]
    )
    assert Manifest.load(tmp_path, check_shards=False).describe(0).endswith("(clips 0, 1, 2, 3, 4, 5 and 93 more)")


def test_empty_split_and_empty_manifest(tmp_path):
    write_manifest(tmp_path, samples=[], language=[], corpus=[], shard_names=[])
    m = Manifest.load(tmp_path)
    assert len(m) == 0 and m.seconds() == {} and m.languages == () and len(m.rows(Split.DEV)) == 0


def test_a_pickled_manifest_is_small_and_the_same(root):
    m = Manifest.load(root)
    packed = pickle.dumps(m)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert again.fingerprint == m.fingerprint and again.samples.tolist() == m.samples.tolist()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_fingerprint_changes_with_what_it_covers_and_with_nothing_else(tmp_path_factory, data):
    def fingerprint(**changes):
        root = tmp_path_factory.mktemp("m")
        write_manifest(root, **(COLUMNS | {"shard_names": ["0", "1"]} | changes))
        return Manifest.load(root, check_shards=False).fingerprint

    name = data.draw(st.sampled_from(["samples", "language", "corpus", "split", "id"]))
    i = data.draw(st.integers(0, 3))
    other = {"samples": 7, "language": "ita", "corpus": "c", "split": (COLUMNS["split"][i] + 1) % 3, "id": "new"}[name]
    changed = list(COLUMNS[name])
    changed[i] = other
    assert fingerprint(**{name: changed}) != fingerprint()
    assert fingerprint(content="other audio") != fingerprint()
    assert fingerprint(speaker=["z"] * 4, text=None, licence=None, shard=[0] * 4, record=[0, 1, 2, 3]) == fingerprint()
    order = data.draw(st.permutations(range(4)))
    moved = {key: [COLUMNS[key][k] for k in order] for key in COLUMNS}
    assert (fingerprint(**moved) == fingerprint()) == (list(order) == [0, 1, 2, 3])


def test_the_fingerprint_does_not_confuse_where_one_id_ends(tmp_path):
    prints = set()
    for k, ids in enumerate((["ab", "c"], ["a", "bc"], ["abc", ""])):
        (tmp_path / str(k)).mkdir()
        write_manifest(tmp_path / str(k), samples=[1, 1], language=["fra"] * 2, corpus=["a"] * 2, id=ids)
        prints.add(Manifest.load(tmp_path / str(k), check_shards=False).fingerprint)
    assert len(prints) == 3


def test_writing_is_deterministic_and_whole_or_not_at_all(root, monkeypatch):
    before = (root / MANIFEST_NAME).read_bytes()
    write_manifest(root, **COLUMNS, **shards(root), facts={"plan": "p"})
    assert (root / MANIFEST_NAME).read_bytes() == before
    monkeypatch.setattr(pa.RecordBatchFileWriter, "write_batch", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_manifest(root, **COLUMNS, **shards(root))
    assert (root / MANIFEST_NAME).read_bytes() == before
    assert sorted(p.name for p in root.iterdir()) == [MANIFEST_NAME, "shards"]


def test_bad_columns_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="3 values of 'language' for 4"):
        write_manifest(tmp_path, **(COLUMNS | {"language": ["fra"] * 3}))
    with pytest.raises(ManifestError, match="'u/1' is given to more than one"):
        write_manifest(tmp_path, **(COLUMNS | {"id": ["u/1", "u/2", "u/1", "u/4"]}))
    assert not list(tmp_path.iterdir())


def test_missing(tmp_path):
    with pytest.raises(ManifestError, match="does not exist .*run: python -m data_pipelines prepare"):
        Manifest.load(tmp_path / "nowhere")
    (tmp_path / "shards").mkdir()
    with pytest.raises(ManifestError, match="not finished"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_truncated_arrow_file(root, share):
    whole = (root / MANIFEST_NAME).read_bytes()
    (root / MANIFEST_NAME).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ManifestError, match="manifest.arrow is damaged"):
        Manifest.load(root)


def test_not_a_manifest(root):
    (root / MANIFEST_NAME).write_bytes(b"path\tlanguage\n" * 100)
    with pytest.raises(ManifestError, match="damaged or not an Arrow file"):
        Manifest.load(root)
    table = pa.table({"samples": [1]})
    with pa.ipc.new_file(str(root / MANIFEST_NAME), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ManifestError, match="not a manifest that"):
        Manifest.load(root)


def test_another_format_version(root, monkeypatch):
    monkeypatch.setattr("data_pipelines.manifest.FORMAT_VERSION", 99)
    write_manifest(root, **COLUMNS, **shards(root))
    monkeypatch.undo()
    with pytest.raises(ManifestError, match="format version 99"):
        Manifest.load(root)


def test_missing_and_cut_shards(root):
    (root / "shards/1.arrayrecord").write_bytes(bytes(19))
    with pytest.raises(ManifestError, match="1.arrayrecord has 19 bytes, but was written with 20"):
        Manifest.load(root)
    (root / "shards/1.arrayrecord").unlink()
    with pytest.raises(ManifestError, match="1.arrayrecord is missing"):
        Manifest.load(root)
    assert len(Manifest.load(root, check_shards=False)) == 4


def test_counts_that_contradict_each_other(tmp_path):
    for change, message in (
        ({"shard_records": [2, 3]}, "2 utterances in shards/1.arrayrecord, which is listed with 3 records"),
        ({"shard_records": [2]}, "lists 2 shards, but record counts"),
        ({"shard": [0, 0, 1, 2], "shard_records": [2, 1]}, "in a shard that it does not list"),
        ({"record": [0, 1, 0, 2]}, "past the end of their shard"),
    ):
        write_manifest(tmp_path, **(COLUMNS | shards(tmp_path) | change))
        with pytest.raises(ManifestError, match=message):
            Manifest.load(tmp_path)


def test_a_prepared_folder_can_be_moved(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("moved") / "here"
    shutil.copytree(root, elsewhere)
    assert Manifest.load(elsewhere).fingerprint == Manifest.load(root).fingerprint
