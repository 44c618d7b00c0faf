"""What `prepare` is given: bad clips are left out and listed, bad corpora refused; tables and folders."""

import csv
import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import soundfile

from data_pipelines.compositions import list_corpora
from data_pipelines.corpora import CorpusError, listing
from data_pipelines.corpora import folder as folder_corpus
from data_pipelines.manifest import MANIFEST_NAME, Split
from data_pipelines.prepare import PrepareError
from tests.data_pipelines.noise_corpus import (
    COLUMNS,
    go,
    noise,
    prepare_in_a_process,
    write_table,
)

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
        "a/silent.wav": "silent or constant",
        "a/nan.wav": "not finite",
        "a/short.wav": "too short: 399 samples, one frame needs 400",
        "a/wrong-length.wav": "n_samples is 12345 in the table, 16000 in the file",
        "a/missing.wav": "no such file",
        "a/folder.wav": "not a file",
        "../outside.wav": "leads out of the corpus folder",
        "a/../../outside.wav": "leads out of the corpus folder",
        str(tmp_path / "outside.wav"): "leads out of the corpus folder",
        "a/good.wav": r"id 'a/good.wav' was already given in row 2",
        "": "no path",
    }
    rows = []
    for path in ["a/good.wav", "a/good2.wav", "a/exact.wav", *(f"./{p}" if p == "a/good.wav" else p for p in bad)]:
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
        assert rows[int(entry["row"]) - 2]["path"] in (entry["path"], f"./{entry['path']}")
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


def test_a_language_that_is_all_bad_leaves_an_empty_shard_out(raw, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(raw[0], folder)
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


def test_an_mp3_may_be_a_frame_or_two_from_its_stated_length(tmp_path):
    """As Lhotse's manifests of Common Voice are: whoever counted them counted what the encoder put around the sound."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for k, stated in enumerate((44100 * 2, 44100 * 2 + 2547, 44100 * 2 + 5000)):
        soundfile.write(folder / f"{k}.mp3", noise(44100 * 2, k), 44100)
        rows.append(dict(zip(COLUMNS, (f"{k}.mp3", "fra", "s", "x", "train", "", stated), strict=True)))
    write_table(folder, rows)
    assert [r.path for r in go(folder, tmp_path / "out").rejected] == ["2.mp3"]


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
        (
            "path\tlanguage\na.wav\n",
            "none of the 1 clips .* a.wav .row 2.: another number of fields: 1, the header has 2",
        ),
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
    (tmp_path / "absolute.tsv").write_text(f"path\tlanguage\tsplit\n{tmp_path}/a b.wav\tpt\ttrain\n/else/b.wav\tpt\t\n")
    absolute = go(tmp_path, tmp_path / "out3", table="absolute.tsv")
    assert absolute.manifest.id(0) == "a b.wav"  # so that a corpus that was moved is the same one
    assert [(r.path, r.reason) for r in absolute.rejected] == [
        ("/else/b.wav", "the path leads out of the corpus folder")
    ]


@pytest.mark.parametrize(
    ("column", "value", "reason"), [("split", "trian", "split is 'trian'"), ("n_samples", "1e4", "n_samples")]
)
def test_bad_fields_leave_out_their_row_alone(raw, tmp_path, column, value, reason):
    write_table(tmp_path, [raw[1][0] | {column: value}, raw[1][1]])
    shutil.copytree(raw[0] / "fr", tmp_path / "fr")
    made = go(tmp_path, tmp_path / "out")
    assert len(made.rejected) == 1 and reason in made.rejected[0].reason and len(made.manifest) == 1


def test_malformed_rows_are_left_out_listed_and_warned_of(tmp_path):
    folder, good = tmp_path / "corpus", [f"{k}.wav" for k in range(6)]
    folder.mkdir()
    for k, name in enumerate(good):
        soundfile.write(folder / name, noise(40000, k), 16000)
    float32 = np.concatenate([noise(40000, 9) / 32768, [1.5, -1.5]])
    soundfile.write(folder / "5.wav", float32, 16000, subtype="FLOAT")
    lines = ["path\tlanguage\tsplit", *(f"{name}\tfra\ttrain" for name in good)]
    lines[3:3] = ["0.wav", "0.wav\tfraa\ttrain", "0.wav\t \ttrain", "0.wav\tfra\ttrain\tmore", "0.wav\tfraa\tdev"]
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    process = prepare_in_a_process(folder, tmp_path / "out", "--workers", "1")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "11 clips, " in stdout and "5 clips, 0.0 s of audio, left out; 2 samples clipped" in stdout
    assert "     2 'fraa' is not a language code or name of ISO 639\n" in stdout
    listed = tmp_path / "out" / "quarantine.tsv"
    warning = f"warning: 5 of 11 clips were left out; which, in which row and why, says {listed}"
    assert stderr.splitlines()[-1] == warning
    unknown = r"'fraa' is not a language code or name of ISO 639; did you mean fra \(French\)"
    expected = ["another number of fields: 1, the header has 3", unknown, "no language", "another .*: 4,", unknown]
    for row, (line, reason) in enumerate(zip(listed.read_text().splitlines()[1:], expected, strict=True), start=4):
        assert re.match(f"0.wav\t{row}\t{reason}", line)
    again = go(folder, tmp_path / "out", clips_per_shard=1000)
    assert not again.fresh and again.tally.clipped == 2 and again.manifest.clips.sum() == 6


def test_a_language_that_most_rows_have_and_nobody_knows_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(40000, 0), 16000)
    rows = [{"path": "a.wav", "language": "fra", "id": f"{k}"} for k in range(2)]
    wrong = [{"path": "a.wav", "language": code, "id": f"w{k}"} for k, code in enumerate(("fraa", "", "fraa"))]
    write_table(tmp_path, rows + wrong, ["path", "language", "id"])
    with pytest.raises(CorpusError, match="3 of 5 clips have no language that is known: .*row 4: 'fraa'.*row 5: ''"):
        folder_corpus.read(tmp_path)
    write_table(tmp_path, rows + wrong[:2], ["path", "language", "id"])
    assert len(folder_corpus.read(tmp_path).rejected) == 2


def test_no_training_clip_is_refused(raw, tmp_path):
    shutil.copytree(raw[0] / "fr", tmp_path / "fr")
    rows = [row for row in raw[1] if row["language"] == "fr"]
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


def test_bad_options_are_refused(raw, tmp_path):
    for options in ({"workers": 0}, {"clips_per_shard": 0}, {"join_seconds": -1.0}, {"min_seconds": -1.0}):
        with pytest.raises(PrepareError, match="at least"):
            go(raw[0], tmp_path / "out", **options)
    with pytest.raises(PrepareError, match=r"join_seconds \(1\) is less than min_seconds \(2\)"):
        go(raw[0], tmp_path / "out", join_seconds=1.0)
    with pytest.raises(PrepareError, match="is the corpus folder itself"):
        go(raw[0], raw[0])


# Folders without a table, and without splits


def test_a_folder_without_a_table(tmp_path):
    for path in (
        "fr/cv/deep/er/a.wav",
        "fr/cv/b.flac",
        "de/other/c.wav",
        "de/cv/.hidden.wav",
        ".git/fra/x.wav",
        "fr/cv/a.txt",
        "README.txt",
    ):
        (tmp_path / "speech" / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(("wav", "flac")):
            soundfile.write(tmp_path / "speech" / path, noise(40000, 0), 16000)
    (tmp_path / "speech/fr/loop").symlink_to(tmp_path / "speech/fr")
    listing = folder_corpus.read(tmp_path / "speech")
    assert not listing.rejected
    assert [(c.path, c.language, c.corpus) for c in listing.clips] == [
        ("de/other/c.wav", "deu", "other"),
        ("fr/cv/b.flac", "fra", "cv"),
        ("fr/cv/deep/er/a.wav", "fra", "cv"),
    ]
    (tmp_path / "speech/music/one").mkdir(parents=True)
    soundfile.write(tmp_path / "speech/music/one/x.wav", noise(40000, 0), 16000)
    (left_out,) = folder_corpus.read(tmp_path / "speech").rejected
    assert left_out.path == "music/one/x.wav" and left_out.reason.startswith("'music' is not a language code")
    shutil.rmtree(tmp_path / "speech/fr")
    (tmp_path / "speech/music/one/y.wav").symlink_to("x.wav")
    message = r"2 of 3 .*speech/music/one/x.wav \(expected under <language>/<corpus>/\): 'music' is not a language"
    with pytest.raises(CorpusError, match=message):
        folder_corpus.read(tmp_path / "speech")


def test_stray_files_of_a_folder_without_a_table_are_left_out_and_listed(tmp_path):
    folder = tmp_path / "speech"
    paths = ["fr/cv/a.wav", "fr/cv/b.wav", "fr/cv/c.M4A", "fr/stray.wav", "top.flac", "notes.txt"]
    (folder / "fr/cv").mkdir(parents=True)
    for path in paths:
        soundfile.write(folder / path, noise(40000, 0), 16000, format="FLAC" if path.endswith("flac") else "WAV")
    made = go(folder, tmp_path / "out", join_seconds=0, min_seconds=0)
    assert {name for i in range(len(made.manifest)) for name in made.manifest.clip_names(i)} == set(paths[:2])
    asked = "move it to <language>/<corpus>/, or list it in manifest.tsv"
    assert sorted((r.path, r.reason) for r in made.rejected) == [
        ("fr/cv/c.M4A", ".M4A is not decoded here: convert it (ffmpeg -i FILE out.flac)"),
        ("fr/stray.wav", f"not under <language>/<corpus>/: lies in fr/ itself; {asked}"),
        ("top.flac", f"not under <language>/<corpus>/: lies at the top; {asked}"),
    ]
    assert made.tally.clips == 5 and made.tally.rejected == 3
    assert "fr/stray.wav" in (tmp_path / "out/quarantine.tsv").read_text()
    assert not go(folder, tmp_path / "out", join_seconds=0, min_seconds=0).fresh
    shutil.rmtree(folder / "fr/cv")
    with pytest.raises(PrepareError, match=r"none of the 2 clips .* is usable; the first: top.flac .* lies at the top"):
        go(folder, tmp_path / "out2")


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


def test_a_name_that_is_not_utf8_stops_nothing(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "fra/one").mkdir(parents=True)
    soundfile.write(folder / "fra/one/good.wav", noise(40000, 1), 16000)
    shutil.copy(folder / "fra/one/good.wav", os.fsencode(folder / "fra/one") + b"/caf\xe9.wav")
    for out in (tmp_path / "out", tmp_path / "out"):  # the second time, it is read back
        prepared = go(folder, out)
        assert [r.reason for r in prepared.rejected] == ["the file's name is not UTF-8: rename it"]
        assert prepared.manifest.clip_names(0) == ["fra/one/good.wav"]


@pytest.mark.parametrize("reader", ["folder", "kaldi"])
def test_a_listing_that_takes_long_shows_that_it_goes_on(raw, tmp_path, monkeypatch, capsys, reader):
    monkeypatch.setattr(listing, "BAR_AFTER", 0.0)
    (tmp_path / "wav.scp").write_text("a fr/one/00.wav\n")
    options = {"data": str(tmp_path), "language": "fra"} if reader == "kaldi" else {}
    for progress in (True, False):
        list_corpora(raw[0], reader=reader, options=options, progress=progress)
        assert (f"listing {raw[0].name}" in capsys.readouterr().err) == progress
