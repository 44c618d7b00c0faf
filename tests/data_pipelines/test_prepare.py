import csv
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.corpora import CorpusError
from data_pipelines.corpora import folder as folder_corpus
from data_pipelines.manifest import MANIFEST_NAME, Manifest, ManifestError, Split
from data_pipelines.prepare import PrepareError, prepare
from data_pipelines.shards import Joining, join_neighbours
from data_pipelines.sources import ShardSource, check_records

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "demo_corpus"
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make_corpus(folder)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    return go(corpus[0], tmp_path_factory.mktemp("whole") / "out")


# What comes out


def test_every_sample_goes_in_and_comes_out_once(corpus, whole):
    folder, rows = corpus
    manifest, source = whole.manifest, ShardSource(whole.manifest)
    heard = {}
    for i in range(len(manifest)):
        names = manifest.clip_names(i)
        parts = [soundfile.read(folder / name, dtype="int16")[0] for name in names]
        np.testing.assert_array_equal(source.read(i) * 32768, np.concatenate(parts))
        assert manifest.id(i) == names[0] and manifest.clips[i] == len(names)
        by_path = {row["path"]: row for row in rows}
        origin = {(r["language"], r["source"], r["speaker"], r["split"]) for r in map(by_path.get, names)}
        assert len(origin) == 1, "clips of different origin were joined"
        language, name, speaker, split = origin.pop()
        assert manifest.languages[manifest.language[i]] == {"fr": "fra"}.get(language, language)
        assert manifest.corpora[manifest.corpus[i]] == name and manifest.speakers[manifest.speaker[i]] == speaker
        assert Split(manifest.split[i]).name.lower() == split
        assert manifest.text(i) == " | ".join(by_path[n]["text"] for n in names)
        for clip in names:
            assert clip not in heard
            heard[clip] = i
    assert set(heard) == {row["path"] for row in rows}
    assert manifest.samples.sum() == sum(row["n_samples"] for row in rows)
    assert manifest.languages == ("deu", "eng", "fra")
    check_records(manifest)


def test_training_clips_are_joined_and_held_out_ones_are_not(whole):
    manifest = whole.manifest
    held_out = manifest.split != Split.TRAIN
    assert (manifest.clips[held_out] == 1).all() and held_out.sum() == 12
    groups = Counter(zip(*(getattr(manifest, n)[~held_out] for n in ("language", "corpus", "speaker")), strict=True))
    for i in manifest.rows(Split.TRAIN):
        alone = groups[manifest.language[i], manifest.corpus[i], manifest.speaker[i]] == 1
        assert manifest.samples[i] >= 4 * 16000 or alone
    assert (manifest.clips[~held_out] > 1).all()


def test_rows_follow_split_language_corpus_speaker_path(whole):
    manifest = whole.manifest
    columns = (manifest.split, manifest.language, manifest.corpus, manifest.speaker)
    keys = [(*(c[i] for c in columns), manifest.id(i)) for i in range(len(manifest))]
    assert keys == sorted(keys)
    assert manifest.shard.tolist() == sorted(manifest.shard)
    assert whole.tally.clips == 60 and whole.tally.utterances == len(manifest)


def test_a_speaker_with_too_little_is_repeated_up_to_the_minimum(tmp_path):
    (tmp_path / "c" / "fra").mkdir(parents=True)
    rows = []
    for k, (samples, speaker) in enumerate([(5000, "a"), (6000, "a"), (9000, "b"), (40000, "c")]):
        soundfile.write(tmp_path / "c" / f"fra/{k}.wav", noise(samples, k), 16000)
        rows.append({"path": f"fra/{k}.wav", "language": "fra", "source": "s", "speaker": speaker, "split": "train"})
    write_table(tmp_path / "c", rows, ["path", "language", "source", "speaker", "split"])
    made = go(tmp_path / "c", tmp_path / "out", join_seconds=4, min_seconds=2)
    names = [made.manifest.clip_names(i) for i in range(3)]
    zero, one, two = "fra/0.wav", "fra/1.wav", "fra/2.wav"
    assert names == [[zero, one] * 3, [two] * 4, ["fra/3.wav"]]
    assert made.manifest.samples.tolist() == [33000, 36000, 40000]
    np.testing.assert_array_equal(
        ShardSource(made.manifest).read(0) * 32768, np.concatenate([noise(5000, 0), noise(6000, 1)] * 3)
    )
    tally = made.tally
    assert (tally.read, tally.repeated, tally.written, tally.left_out) == (60000, 22000 + 27000, 109000, 0)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(0, 40), st.integers(0, 60))
def test_joining_against_its_definition(lengths, join, minimum):
    items = list(enumerate(lengths))
    joined = list(join_neighbours(iter(items), Joining(join, minimum), samples=lambda item: item[1]))
    flat = [item for utterance in joined for item in utterance]
    assert flat[: len(items)] == items, "order or a clip was lost"
    sums = [sum(n for _, n in utterance) for utterance in joined]
    repeated = flat[len(items) :]
    assert repeated == [items[k % len(items)] for k in range(len(items), len(flat))]
    if repeated:
        assert sum(lengths) < join and sum(lengths) < minimum
        assert len(joined) == 1 and minimum <= sums[0] < minimum + repeated[-1][1]
    if minimum <= join:
        assert all(total >= minimum for total in sums), "an utterance is shorter than the minimum"
    if items and not repeated:
        assert all(total >= join for total in sums) or (len(joined) == 1 and minimum <= sums[0] < join)
        for utterance in joined[:-1]:
            assert sum(n for _, n in utterance[:-1]) < max(join, 1), "went on after it was long enough"


def test_nothing_is_joined_with_zero_seconds(corpus, tmp_path):
    made = go(corpus[0], tmp_path / "out", join_seconds=0, min_seconds=0)
    assert (made.manifest.clips == 1).all() and len(made.manifest) == 60


# The same bytes, however it was made


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(corpus, whole, tmp_path, workers):
    assert len(whole.manifest.shard_names) > 12
    go(corpus[0], tmp_path / "out", workers=workers)
    assert tree(tmp_path / "out") == tree(whole.root)


def test_the_place_of_the_corpus_does_not_matter(corpus, whole, tmp_path):
    shutil.copytree(corpus[0], tmp_path / "else" / "where")
    go(tmp_path / "else" / "where", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(whole.root)


def test_a_finished_prepare_is_left_alone(corpus, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.root.rglob("*")}
    again = go(corpus[0], whole.root)
    assert not again.fresh and whole.fresh
    assert {p: p.stat().st_mtime_ns for p in whole.root.rglob("*")} == before
    assert again.tally == whole.tally and again.manifest.fingerprint == whole.manifest.fingerprint


def prepare_in_a_process(folder, out, *options, **popen):
    command = [sys.executable, "-m", "data_pipelines", "prepare", str(folder), "--out", str(out), *options]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen)


def children_of(pid):
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_prepare_goes_on_and_ends_the_same(tmp_path, workers):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    rows = make_corpus(folder, languages=("fr", "deu", "eng", "ita"), clips=16)
    process = prepare_in_a_process(folder, out, "--workers", workers, "--clips-per-shard", "2")
    deadline = time.time() + 60
    while len(list(out.glob("shards/[!.]*.arrow"))) < 5 and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    while any(map(alive, children)) and time.time() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children)), "workers outlived their parent"
    finished = {p.name: p.stat().st_ino for p in out.glob("shards/[!.]*.arrow")}
    assert len(finished) >= 5 and not (out / MANIFEST_NAME).exists()
    with pytest.raises(ManifestError, match="prepare was not finished: run it again"):
        Manifest.load(out)
    made = go(folder, out, clips_per_shard=2)
    assert {name: (out / "shards" / name).stat().st_ino for name in finished} == finished, "finished work was redone"
    assert len(finished) < len(list(out.glob("shards/[!.]*.arrow"))), "it was killed too late to show anything"
    go(folder, tmp_path / "straight", clips_per_shard=2)
    assert tree(out) == tree(tmp_path / "straight")
    assert made.tally.written == sum(row["n_samples"] for row in rows) + made.tally.repeated


def test_half_written_and_damaged_shards_are_made_again(corpus, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole.root, out)
    records, tables = sorted(out.glob("shards/*.arrayrecord")), sorted(out.glob("shards/[!.]*.arrow"))
    records[0].write_bytes(records[0].read_bytes()[:-100])
    records[1].unlink()
    tables[2].write_bytes(tables[2].read_bytes()[:200])
    tables[3].unlink()
    (out / "shards" / ".partial-1-abcd-x.arrayrecord").write_bytes(b"half")
    assert go(corpus[0], out).fresh
    # The records of shard 2 and 3 were whole, but nothing said so.
    assert tree(out) == tree(whole.root)


# Another plan for the same folder


def test_other_options_are_refused_with_what_changed_and_rebuilt_on_demand(corpus, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole.root, out)
    with pytest.raises(PrepareError, match=r"join_seconds was 4.0, is 2.0.*--overwrite"):
        go(corpus[0], out, join_seconds=2.0)
    assert tree(out) == tree(whole.root)
    go(corpus[0], out, join_seconds=2.0, overwrite=True)
    go(corpus[0], tmp_path / "straight", join_seconds=2.0)
    assert tree(out) == tree(tmp_path / "straight")


def test_a_rebuild_that_stops_half_way_does_not_look_whole(corpus, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole.root, out)
    monkeypatch.setattr("data_pipelines.prepare._run", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        go(corpus[0], out, join_seconds=2.0, overwrite=True)
    with pytest.raises(ManifestError, match="not finished"):
        Manifest.load(out)
    monkeypatch.undo()
    assert go(corpus[0], out, join_seconds=2.0).fresh  # the folder is the new plan's now: no --overwrite needed


def test_another_table_is_refused_and_a_new_language_costs_only_itself(corpus, whole, tmp_path):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(corpus[0], folder)
    shutil.copytree(whole.root, out)
    (folder / "it").mkdir()
    soundfile.write(folder / "it/x.wav", noise(70000, 99), 16000)
    new = dict(zip(COLUMNS, ("it/x.wav", "it", "one", "s", "train", "si", 70000), strict=True))
    write_table(folder, [*corpus[1], new])
    with pytest.raises(PrepareError, match="clips were 60, are 61; new languages: ita"):
        go(folder, out)
    before = {p.name: p.stat().st_ino for p in out.glob("shards/*")}
    assert go(folder, out, overwrite=True).manifest.languages == ("deu", "eng", "fra", "ita")
    after = {p.name: p.stat().st_ino for p in out.glob("shards/*")}
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2
    changed = [*corpus[1], new | {"text": "no"}]
    write_table(folder, changed)
    with pytest.raises(PrepareError, match="was prepared from something else: clips changed in: ita"):
        go(folder, out)
    write_table(folder, corpus[1])
    with pytest.raises(PrepareError, match="languages gone: ita"):
        go(folder, out)
    go(folder, out, overwrite=True)
    assert tree(out) == tree(whole.root)


def test_a_changed_file_is_noticed(corpus, whole, tmp_path):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(corpus[0], folder)
    shutil.copytree(whole.root, out)
    soundfile.write(folder / "fr/one/00.wav", noise(30000, 5), 16000)
    with pytest.raises(PrepareError, match="clips changed in: fra"):
        go(folder, out)


def test_two_runs_at_once_are_refused(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(PrepareError, match="another prepare is writing"):
            go(corpus[0], tmp_path / "out")
    finally:
        os.close(descriptor)
    assert go(corpus[0], tmp_path / "out").fresh


# Bad clips


@pytest.fixture
def spoilt(tmp_path):
    """A corpus with one good French and one good German speaker, and every kind of bad clip between them."""
    folder = tmp_path / "spoilt"
    (folder / "a").mkdir(parents=True)
    good = noise(40000, 1)
    soundfile.write(folder / "a/good.wav", good, 16000)
    soundfile.write(folder / "a/good2.wav", good[:20000], 16000)
    (folder / "a/garbage.wav").write_bytes(os.urandom(5000))
    (folder / "a/empty.wav").write_bytes(b"")
    for kind, container, subtype in (("wav", "WAV", "PCM_16"), ("flac", "FLAC", "PCM_16"), ("opus", "OGG", "OPUS")):
        path = folder / f"a/cut.{kind}"
        soundfile.write(path, good, 16000, format=container, subtype=subtype)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    soundfile.write(folder / "a/zero.wav", good[:0], 16000)
    soundfile.write(folder / "a/silent.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "a/nan.wav", np.where(np.arange(16000) == 5, np.nan, 0.1), 16000, subtype="FLOAT")
    soundfile.write(folder / "a/short.wav", good[:399], 16000)
    soundfile.write(folder / "a/exact.wav", good[:400], 16000)
    soundfile.write(folder / "a/wrong-length.wav", good[:16000], 16000)
    (folder / "a/folder.wav").mkdir()
    soundfile.write(tmp_path / "outside.wav", good, 16000)
    bad = {
        "a/garbage.wav": "unreadable",
        "a/empty.wav": "empty file",
        "a/cut.wav": "truncated",
        "a/cut.flac": "unreadable|truncated",
        "a/cut.opus": "truncated",
        "a/zero.wav": "zero length",
        "a/silent.wav": "silent",
        "a/nan.wav": "not finite",
        "a/short.wav": "too short: 399 samples, one frame needs 400",
        "a/wrong-length.wav": "n_samples is 12345 in the table, 16000 in the file",
        "a/missing.wav": "no such file",
        "a/folder.wav": "not a file",
        "../outside.wav": "leads out of the corpus folder",
        "a/../../outside.wav": "leads out of the corpus folder",
        str(tmp_path / "outside.wav"): "leads out of the corpus folder",
        "./a/good.wav": r"id 'a/good.wav' was already given in row 2",
        "": "no path",
    }
    rows = []
    for path in ["a/good.wav", "a/good2.wav", "a/exact.wav", *bad]:
        length = {"a/good.wav": 40000, "a/wrong-length.wav": 12345}.get(path, "")
        rows.append(dict(zip(COLUMNS, (path, "fra", "s", "x", "train", "", length), strict=True)))
    write_table(folder, rows)
    return folder, rows, bad


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_clips_are_left_out_and_listed(spoilt, tmp_path, workers):
    folder, rows, bad = spoilt
    made = go(folder, tmp_path / "out", workers=workers)
    with open(tmp_path / "out/quarantine.tsv", newline="") as lines:
        listed = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert {entry["path"] for entry in listed} == set(bad) and len(listed) == len(bad)
    for entry in listed:
        assert re.search(bad[entry["path"]], entry["reason"]), entry
        assert rows[int(entry["row"]) - 2]["path"] == entry["path"]
    kept = {name for i in range(len(made.manifest)) for name in made.manifest.clip_names(i)}
    assert kept == {"a/good.wav", "a/good2.wav", "a/exact.wav"}
    tally = made.tally
    assert (
        tally.read == 40000 + 20000 + 400 + 16000 + 16000 + 399 + 16000
    )  # all that decodes, silent, nan and short too
    assert tally.read + tally.repeated == tally.written + tally.left_out
    assert tally.rejected == len(bad) == len(made.rejected) and tally.clips == len(rows)
    assert not go(folder, tmp_path / "out").fresh
    assert {(r.path, r.row) for r in go(folder, tmp_path / "out").rejected} == {(r.path, r.row) for r in made.rejected}


def test_a_language_that_is_all_bad_leaves_an_empty_shard_out(corpus, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus[0], folder)
    for path in (folder / "eng").rglob("*.wav"):
        path.write_bytes(b"garbage" * 20)
    made = go(folder, tmp_path / "out")
    assert made.manifest.languages == ("deu", "fra") and made.tally.rejected == 20
    assert not list((tmp_path / "out/shards").glob("eng-*.arrayrecord"))
    assert not go(folder, tmp_path / "out").fresh


def test_a_resampled_clip_may_state_either_length(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for k, stated in enumerate(("", 44100 * 2, 32000, 31999, 31000)):
        soundfile.write(folder / f"{k}.wav", noise(44100 * 2, k), 44100)
        rows.append(dict(zip(COLUMNS, (f"{k}.wav", "fra", "s", "x", "train", "", stated), strict=True)))
    write_table(folder, rows)
    assert [r.path for r in go(folder, tmp_path / "out").rejected] == ["4.wav"]


# What stops it


def test_missing_or_empty_corpora_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="nowhere does not exist"):
        go(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="neither manifest.tsv nor audio files"):
        go(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(CorpusError, match="table clips.tsv does not exist"):
        go(tmp_path / "empty", tmp_path / "out", table="clips.tsv")
    write_table(tmp_path / "empty", [])
    with pytest.raises(CorpusError, match="lists no clips"):
        go(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file\tlanguage\n", "no column 'path'; its header is: file, language"),
        ("path\tlang\n", "no column 'language'"),
        ("", "no column 'path'; its header is: empty"),
        ("path\tlanguage\na.wav\n", "row 2 has 1 fields, the header has 2"),
        (
            "path\tlanguage\na.wav\tfraa\nb.wav\txqx\n",
            r"row 2: 'fraa' is not .* did you mean fra \(French\).*row 3: 'xqx'",
        ),
        ("path\tlanguage\na.wav\tfra\n", "none of the 1 clips of .* is usable; the first: a.wav .row 2.: no such file"),
        (b"path\tlanguage\n\xff\xfe\tfra\n", "not UTF-8"),
    ],
)
def test_bad_tables_are_refused(tmp_path, table, message):
    (tmp_path / "manifest.tsv").write_bytes(table.encode() if isinstance(table, str) else table)
    with pytest.raises((CorpusError, PrepareError), match=message):
        go(tmp_path, tmp_path / "out")


def test_odd_but_good_tables_are_read(tmp_path):
    soundfile.write(tmp_path / "a b.wav", noise(40000, 0), 16000)
    (tmp_path / "t.tsv").write_bytes(
        "\ufeffextra\tpath\tcorpus\tlanguage\tsplit\r\n1\ta b.wav\tc\tpt-BR\tTraining\r\n\r\n".encode()
    )
    made = go(tmp_path, tmp_path / "out", table="t.tsv")
    assert made.manifest.languages == ("por",) and made.manifest.corpora == ("c",) and made.manifest.speakers == ("",)
    assert len(go(tmp_path, tmp_path / "out2", table=tmp_path / "t.tsv").manifest) == 1


@pytest.mark.parametrize(
    ("column", "value", "reason"), [("split", "trian", "split is 'trian'"), ("n_samples", "1e4", "n_samples")]
)
def test_bad_fields_leave_out_their_row_alone(corpus, tmp_path, column, value, reason):
    write_table(tmp_path, [corpus[1][0] | {column: value}, corpus[1][1]])
    shutil.copytree(corpus[0] / "fr", tmp_path / "fr")
    made = go(tmp_path, tmp_path / "out")
    assert len(made.rejected) == 1 and reason in made.rejected[0].reason and len(made.manifest) == 1


def test_no_training_clip_is_refused(corpus, tmp_path):
    shutil.copytree(corpus[0] / "fr", tmp_path / "fr")
    rows = [row for row in corpus[1] if row["language"] == "fr"]
    write_table(tmp_path, [row | {"split": "dev"} for row in rows])
    with pytest.raises(PrepareError, match="no clip of the split 'train', only dev"):
        go(tmp_path, tmp_path / "out")
    write_table(tmp_path, rows)
    for row in rows:
        if row["split"] == "train":
            (tmp_path / row["path"]).write_bytes(b"garbage")
    with pytest.raises(PrepareError, match="no training clip is usable .16 of 20 clips left out: 16 x unreadable"):
        go(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_bad_options_are_refused(corpus, tmp_path):
    for options in ({"workers": 0}, {"clips_per_shard": 0}, {"join_seconds": -1.0}, {"min_seconds": -1.0}):
        with pytest.raises(PrepareError, match="at least"):
            go(corpus[0], tmp_path / "out", **options)
    with pytest.raises(PrepareError, match=r"join_seconds \(1\) is less than min_seconds \(2\)"):
        go(corpus[0], tmp_path / "out", join_seconds=1.0)
    with pytest.raises(PrepareError, match="is the corpus folder itself"):
        go(corpus[0], corpus[0])


# Folders without a table, and without splits


def test_a_folder_without_a_table(tmp_path):
    for path in (
        "fr/cv/deep/er/a.wav",
        "fr/cv/b.flac",
        "de/c.wav",
        "de/cv/.hidden.wav",
        ".git/fra/x.wav",
        "fr/cv/a.txt",
    ):
        (tmp_path / "speech" / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(("wav", "flac")):
            soundfile.write(tmp_path / "speech" / path, noise(40000, 0), 16000)
    (tmp_path / "speech/fr/loop").symlink_to(tmp_path / "speech/fr")
    clips = folder_corpus.read(tmp_path / "speech").clips
    assert [(c.path, c.language, c.corpus) for c in clips] == [
        ("de/c.wav", "deu", "speech"),
        ("fr/cv/b.flac", "fra", "cv"),
        ("fr/cv/deep/er/a.wav", "fra", "cv"),
    ]
    (tmp_path / "speech/music").mkdir()
    soundfile.write(tmp_path / "speech/music/x.wav", noise(40000, 0), 16000)
    with pytest.raises(CorpusError, match="'music' is not a language"):
        folder_corpus.read(tmp_path / "speech")


def test_splits_are_dealt_by_sentence_where_the_table_has_none(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(4000, 0), 16000)
    rows = []
    for k in range(3000):
        rows.append(
            {"path": "a.wav", "language": "fra", "id": f"u{k}", "text": f"sentence {k // 3}" if k < 2400 else ""}
        )
    write_table(tmp_path, rows, ["path", "language", "id", "text"])
    clips = folder_corpus.read(tmp_path).clips
    shares = Counter(clip.split for clip in clips)
    assert 0.77 < shares[Split.TRAIN] / 3000 < 0.83 and 0.08 < shares[Split.DEV] / 3000 < 0.12
    homes = {}
    for clip in clips[:2400]:
        homes.setdefault(clip.text, set()).add(clip.split)
    assert len(homes) == 800 and all(len(home) == 1 for home in homes.values())


# Full disks, and the command line


def limited(folder, out, workers, size):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()),) * 2);"
        "from data_pipelines.__main__ import main; sys.exit(main())"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "prepare",
        str(folder),
        "--out",
        str(out),
        "--workers",
        str(workers),
        str(size),
    ]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(corpus, tmp_path):
    out = tmp_path / "out"
    result = limited(corpus[0], out, 1, 200_000)
    assert result.returncode == 1 and "File too large" in result.stderr and "Traceback" not in result.stderr
    assert re.search(r"error: .*shards/.*\.arrayrecord", result.stderr)
    assert not list(out.rglob(".partial*")) and not (out / MANIFEST_NAME).exists()
    for records in out.glob("shards/*.arrayrecord"):
        assert records.with_suffix(".arrow").exists()
    go(corpus[0], out, clips_per_shard=1000)
    go(corpus[0], tmp_path / "straight", clips_per_shard=1000)
    assert tree(out) == tree(tmp_path / "straight")


@pytest.mark.soak
def test_a_really_full_disk_with_workers(corpus, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    assert mounted.returncode == 0, f"this test needs root and a machine that lets it mount: {mounted.stderr.strip()}"
    try:
        process = prepare_in_a_process(corpus[0], disk / "out", "--workers", "2", "--clips-per-shard", "8")
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1 and "No space left on device" in stderr and "Traceback" not in stderr, stderr
        assert not list(disk.rglob(".partial*")) and not (disk / "out" / MANIFEST_NAME).exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_command_line(corpus, tmp_path):
    out = tmp_path / "out"
    for expected in (r"60 clips, 0\.\d+ h decoded", "already prepared"):
        process = prepare_in_a_process(corpus[0], out, "--workers", "1")
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0 and re.search(expected, stdout) and "fra  French" in stdout, stdout + stderr
    describe = [sys.executable, "-m", "data_pipelines", "describe", str(out), "--check"]
    assert "every record is whole" in subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True).stdout
    next(out.glob("shards/*.arrayrecord")).unlink()
    result = subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and "is missing" in result.stderr
    process = prepare_in_a_process(tmp_path / "nowhere", out)
    assert process.communicate(timeout=60)[1].strip() == f"error: corpus folder {tmp_path / 'nowhere'} does not exist"
    assert process.returncode == 1


def test_importing_prepare_is_light():
    code = (
        "import sys, data_pipelines.prepare, data_pipelines.sources;"
        "heavy = {'jax', 'grain', 'librosa', 'tensorflow', 'scipy', 'numba', 'pandas'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=60)


# The corpus that ships


def test_the_demo_corpus_is_what_its_table_says():
    clips = folder_corpus.read(DEMO)
    assert not clips.rejected and len({clip.language for clip in clips.clips}) == 31
    files = {p.relative_to(DEMO).as_posix() for p in DEMO.glob("*/*/*")}
    assert files == {clip.path for clip in clips.clips}
    assert sum(p.stat().st_size for p in DEMO.rglob("*") if p.is_file()) < 19_500_000
    credits = (DEMO / "LICENCES.txt").read_text()
    assert {clip.licence for clip in clips.clips} == {"CC-BY-3.0", "CC-BY-SA-3.0", "GPL-2.0-only", "GPL-2.0-or-later"}
    for corpus in {clip.corpus for clip in clips.clips}:
        assert f"- {corpus} (" in credits
    homes = {}
    for clip in clips.clips:
        if clip.text:
            homes.setdefault((clip.language, clip.text), set()).add(clip.split)
    assert all(len(home) == 1 for home in homes.values())
    minutes = Counter()
    for clip in clips.clips:
        minutes[clip.language] += clip.samples / 960_000
    assert {language for language, _ in minutes.most_common(3)} == {"spa", "rus", "fra"}
    readme = (DEMO / "README.md").read_text()
    for language, amount in minutes.items():
        assert f"| {language} | {sum(c.language == language for c in clips.clips)} | {amount:.2f} |" in readme
