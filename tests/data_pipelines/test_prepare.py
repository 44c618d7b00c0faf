"""What `prepare` makes of a corpus: every sample once, the same bytes however it was made; and its command line."""

import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.corpora import folder as folder_corpus
from data_pipelines.manifest import Manifest, Split
from data_pipelines.shards import Joining, join_neighbours
from data_pipelines.sources import ShardSource, check_records
from tests.data_pipelines.noise_corpus import REPOSITORY, go, noise, prepare_in_a_process, tree, write_table

DEMO = REPOSITORY / "demo_corpus"


# What comes out


def test_every_sample_goes_in_and_comes_out_once(raw, whole):
    folder, rows = raw
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


def test_nothing_is_joined_with_zero_seconds(raw, tmp_path):
    made = go(raw[0], tmp_path / "out", join_seconds=0, min_seconds=0)
    assert (made.manifest.clips == 1).all() and len(made.manifest) == 60


# The same bytes, however it was made


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(raw, whole, tmp_path, workers):
    assert len(whole.manifest.shard_names) > 12
    go(raw[0], tmp_path / "out", workers=workers)
    assert tree(tmp_path / "out") == tree(whole.root)


def test_the_place_of_the_corpus_does_not_matter(raw, whole, tmp_path):
    shutil.copytree(raw[0], tmp_path / "else" / "where")
    go(tmp_path / "else" / "where", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(whole.root)


def test_a_finished_prepare_is_left_alone(raw, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.root.rglob("*")}
    again = go(raw[0], whole.root)
    assert not again.fresh and whole.fresh
    assert {p: p.stat().st_mtime_ns for p in whole.root.rglob("*")} == before
    assert again.tally == whole.tally and again.manifest.fingerprint == whole.manifest.fingerprint


# The command line


@pytest.mark.once
def test_the_command_line(raw, tmp_path):
    out = tmp_path / "out"
    for expected in (r"60 clips, 0\.\d+ h decoded", "already prepared"):
        process = prepare_in_a_process(raw[0], out, "--workers", "1")
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


def test_the_command_line_with_a_reader_and_its_options(raw, tmp_path):
    kaldi, out = tmp_path / "kaldi", tmp_path / "out"
    kaldi.mkdir()
    places = sorted((raw[0] / "fr/one").glob("*.wav"))
    (kaldi / "wav.scp").write_text("".join(f"utt-{k} {path}\n" for k, path in enumerate(places)))
    options = ["--reader", "kaldi", "--option", f"data={kaldi}", "language=oci", "--workers", "1"]
    _, stderr = (process := prepare_in_a_process(raw[0], out, *options)).communicate(timeout=120)
    assert process.returncode == 0, stderr
    manifest = Manifest.load(out)
    assert manifest.languages == ("oci",)
    assert {name for i in range(len(manifest)) for name in manifest.clip_names(i)} == {f"utt-{k}" for k in range(10)}
    _, stderr = (process := prepare_in_a_process(raw[0], out, *options[:3], "langauge=oci")).communicate(timeout=60)
    assert process.returncode == 1 and "no option 'langauge'; did you mean language" in stderr


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
