"""Several corpora into one manifest: composition files, filters, duplicates, parts; the same bytes however made."""

import itertools
import json
import os
import re
import signal
import time

import numpy as np
import pytest
import soundfile

from data_pipelines.compositions import read_composition
from data_pipelines.corpora import CorpusError
from data_pipelines.manifest import MANIFEST_NAME
from data_pipelines.plan_shards import PrepareError
from data_pipelines.prepare import Part, PartDone
from data_pipelines.shards import Filters
from tests.data_pipelines.noise_corpus import go, noise, prepare_in_a_process, tree

OPTIONS = ("--clips-per-shard", "4", "--no-duplicates")


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """A composition of a folder and a Kaldi corpus that share three recordings, each twice in one or the other."""
    root = tmp_path_factory.mktemp("composed")
    for k in range(24):
        path = root / f"speech/{'fra' if k % 2 else 'deu'}/one/{k:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(12000 + 100 * k, k), 16000)
    data = root / "kaldi/train"
    data.mkdir(parents=True)
    soundfile.write(
        root / "kaldi/long.flac", np.concatenate([noise(12000 + 100 * k, k) for k in (30, 3, 5, 31)]), 16000
    )
    bounds = np.cumsum([0, 15000, 12300, 12500, 15100]) / 16000
    (data / "wav.scp").write_text("long long.flac\n")
    (data / "segments").write_text(
        "".join(f"u{k} long {a} {b}\n" for k, (a, b) in enumerate(itertools.pairwise(bounds)))
    )
    soundfile.write(root / "speech/fra/one/99.wav", noise(12300, 3), 16000)
    (root / "corpora.toml").write_text(
        '[[corpus]]\nname = "read"\nreader = "folder"\nfolder = "speech"\nlicence = "CC0-1.0"\n'
        '[[corpus]]\nname = "told"\nreader = "kaldi"\nfolder = "$WHERE/kaldi"\nlanguage = "fr"\n'
    )
    os.environ["WHERE"] = str(root)
    yield root
    del os.environ["WHERE"]


@pytest.fixture(scope="module")
def made(composed, tmp_path_factory):
    return go(composed / "corpora.toml", tmp_path_factory.mktemp("made") / "out", duplicates=False)


def test_one_manifest_of_all_corpora_and_the_duplicates_of_them_listed(composed, made):
    manifest = made.manifest
    assert manifest.corpora == ("read", "told") and manifest.languages == ("deu", "fra")
    names = {name for i in range(len(manifest)) for name in manifest.clip_names(i)}
    fresh = {f"read/{'fra' if k % 2 else 'deu'}/one/{k:02d}.wav" for k in range(24)}
    copies = {"read/fra/one/03.wav", "read/fra/one/99.wav", "told/u1", "read/fra/one/05.wav", "told/u2"}
    assert names >= (fresh | {"told/u0", "told/u3"}) - copies and len(names) == 24 + 2
    assert len(names & {"read/fra/one/03.wav", "read/fra/one/99.wav", "told/u1"}) == 1
    assert len(names & {"read/fra/one/05.wav", "told/u2"}) == 1
    assert len(made.rejected) == 3 and all(
        r.reason.startswith("duplicate: the same samples as ") for r in made.rejected
    )
    assert manifest.facts["options"]["drop_duplicates"] and made.tally.rejected == 3
    tally = made.tally
    assert tally.read + tally.repeated == tally.written + tally.left_out and tally.left_out == 12300 * 2 + 12500
    licences = {manifest.corpora[manifest.corpus[i]]: manifest.licence(i) for i in range(len(manifest))}
    assert licences == {"read": "CC0-1.0", "told": None}
    everything = go(composed / "corpora.toml", made.root.parent / "with", duplicates=True)
    assert everything.tally.clips == 29 and not everything.rejected
    # Changing one's mind re-encodes only the shards that hold duplicates, both ways.
    before = {p.name: p.stat().st_ino for p in everything.root.glob("shards/*")}
    go(composed / "corpora.toml", everything.root, duplicates=False, overwrite=True)
    assert tree(everything.root) == tree(made.root)
    kept = {p.name for p in everything.root.glob("shards/*") if before.get(p.name) == p.stat().st_ino}
    assert kept and any(name.startswith("deu") for name in kept)
    go(composed / "corpora.toml", everything.root, overwrite=True)
    assert len(everything.manifest) and not go(composed / "corpora.toml", everything.root).rejected


@pytest.mark.once
def test_killed_while_shards_lose_their_duplicates_it_ends_the_same(composed, made, tmp_path):
    out = tmp_path / "out"
    process = prepare_in_a_process(composed / "corpora.toml", out, *OPTIONS, "--workers", "2")
    deadline = time.time() + 60
    while len(list(out.glob("shards/[!.]*.arrow"))) < 4 and time.time() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert list(out.glob("shards/[!.]*.arrow")) and not (out / MANIFEST_NAME).exists()
    time.sleep(0.2)  # its workers notice
    for _ in range(2):
        process = prepare_in_a_process(composed / "corpora.toml", out, *OPTIONS, "--workers", "2")
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0 and "told" not in stderr, stderr
    assert "already prepared" in stdout and "     3 duplicate\n" in stdout
    assert tree(out) == tree(made.root)


def test_parts_of_a_cluster_make_the_same(composed, made, tmp_path):
    out, corpora = tmp_path / "out", composed / "corpora.toml"
    first = go(corpora, out, duplicates=False, part=Part(2, 3))
    assert isinstance(first, PartDone) and first.elsewhere > 0 and not (out / MANIFEST_NAME).exists()
    counts = [go(corpora, out, duplicates=False, part=Part(part, 3)) for part in (1, 3, 2, 1, 3)]
    assert sum(done.shards for done in counts[-3:]) == len({p.stem for p in made.root.glob("shards/*.arrow")})
    assert counts[-1].elsewhere == 0
    before = {p.name: p.stat().st_ino for p in out.glob("shards/*.arrow")}
    go(corpora, out, duplicates=False)
    assert tree(out) == tree(made.root)
    assert all(before[p.name] == p.stat().st_ino for p in out.glob("shards/*.arrow")), "the last call made shards anew"
    with pytest.raises(PrepareError, match="counted from 1"):
        go(corpora, out, part=Part(0, 3))


def test_held_out_copies_are_kept_and_training_copies_are_not(tmp_path):
    rows = ["path\tlanguage\tsplit"]
    for k, split in enumerate(("train", "test", "train")):
        soundfile.write(tmp_path / f"{k}.wav", noise(20000, k // 2), 16000)
        rows.append(f"{k}.wav\tfra\t{split}")
    (tmp_path / "manifest.tsv").write_text("\n".join(rows) + "\n")
    (left_out,) = go(tmp_path, tmp_path / "out", duplicates=False).rejected
    assert (left_out.path, left_out.reason) == ("0.wav", "duplicate: the same samples as 1.wav")


def test_filters_leave_out_and_say_why(tmp_path):
    rows = ["path\tlanguage\tsplit"]
    sounds = {
        "good": noise(32000, 0),
        "short": noise(7999, 1),
        "long": noise(80001, 2),
        "quiet": (noise(32000, 3) / 300).astype(np.int16),
        "click": np.where(np.arange(32000) == 9, 5000, noise(32000, 4) // 300).astype(np.int16),
    }
    for name, waveform in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", waveform, 16000)
        rows.append(f"{name}.wav\tfra\ttrain")
    (tmp_path / "manifest.tsv").write_text("\n".join(rows) + "\n")
    filters = Filters(min_seconds=0.5, max_seconds=5.0, min_peak_dbfs=-40.0, min_rms_dbfs=-50.0)
    made = go(tmp_path, tmp_path / "out", filters=filters)
    reasons = {r.path: r.reason for r in made.rejected}
    assert set(reasons) == {"short.wav", "long.wav", "quiet.wav", "click.wav"}
    assert reasons["short.wav"] == "shorter than 0.5 s: 0.500 s" and reasons["long.wav"].startswith("longer than 5 s")
    assert re.fullmatch(r"too quiet: peak under -40 dBFS, -5\d\.\d", reasons["quiet.wav"])
    assert re.fullmatch(r"too quiet: RMS under -50 dBFS, -\d\d\.\d", reasons["click.wav"])
    assert json.loads((tmp_path / "out/plan.json").read_text())["options"]["filters"] == filters._asdict()
    with pytest.raises(PrepareError, match="filters was .* is .*'max_seconds': None"):
        go(tmp_path, tmp_path / "out")


def test_a_corpus_of_a_composition_without_a_usable_clip_is_refused(composed, tmp_path):
    """Its audio was not unpacked, or lies elsewhere: told before the other corpora are decoded."""
    data = tmp_path / "kaldi"
    data.mkdir()
    (data / "wav.scp").write_text("a audio/a.flac\nb audio/b.flac\n")
    path = tmp_path / "corpora.toml"
    path.write_text(
        (composed / "corpora.toml").read_text().replace('folder = "speech"', f'folder = "{composed}/speech"')
        + '[[corpus]]\nname = "empty"\nreader = "kaldi"\nfolder = "kaldi"\nlanguage = "fr"\n'
    )
    told = r"corpus 'empty': none of its 2 clips is usable; the first: audio/a.flac \(row 1\): no such file"
    with pytest.raises(CorpusError, match=told):
        go(path, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.arrow").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no .*corpus.* tables"),
        ("[[corpora]]\nname = 'a'", "unknown key 'corpora'; did you mean corpus"),
        ("[[corpus]]\nname = 'a'\nraeder = 'folder'", "corpus 'a': unknown key 'raeder'; did you mean reader"),
        ("[[corpus]]\nname = 'a'\nreader = 'folder'", "corpus 'a' has no 'folder'"),
        ("[[corpus]]\nname = 'a'\nreader = 'foldr'\nfolder = '.'", "no reader is called 'foldr'; did you mean folder"),
        ("[[corpus]]\nname = 'a'\nreader = 'folder'\nfolder = '.'\nlanguage = 'fr'", "knows the languages itself"),
        (
            "[[corpus]]\nname = 'a'\nreader = 'kaldi'\nfolder = '.'\noptions = {dta = 'x'}",
            "key 'dta'; did you mean data",
        ),
        ("[[corpus]]\nname = 'a'\nreader = 'folder'\nfolder = '$NOT_SET_ANYWHERE/x'", "a variable that is not set"),
        ("[[corpus]]\nname = 1\nreader = 'folder'\nfolder = '.'", "name is 1, not a string"),
        ("[[corpus]", "is not TOML"),
    ],
)
def test_wrong_compositions_are_refused(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(CorpusError, match=message):
        read_composition(tmp_path / "c.toml")
