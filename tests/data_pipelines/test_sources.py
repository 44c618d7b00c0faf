import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile

from data_pipelines.manifest import Manifest
from data_pipelines.prepare import prepare
from data_pipelines.sources import ShardSource, SourceError, check_records


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two languages, 12 clips of 16-bit noise, joined to utterances in four shards; int16 [samples] by clip name."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    clips = {}
    lines = ["path\tlanguage\tsource\tspeaker\tsplit"]
    for language in ("fra", "deu"):
        for k in range(6):
            name = f"{language}/{k}.wav"
            clips[name] = (rng.normal(size=9000 + 1000 * k) * 3000).astype(np.int16)
            (folder / language).mkdir(exist_ok=True)
            soundfile.write(folder / name, clips[name], 16000, subtype="PCM_16")
            lines.append(f"{name}\t{language}\tc\ts{k // 3}\t{'train' if k < 5 else 'dev'}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder, clips


@pytest.fixture
def manifest(corpus, tmp_path):
    return prepare(corpus[0], out=tmp_path / "out", workers=1, join_seconds=1.0, min_seconds=0, progress=False).manifest


def test_every_utterance_is_its_clips_head_to_tail(corpus, manifest):
    source = ShardSource(manifest)
    assert len(source) == len(manifest) and len(manifest.shard_names) == 4
    for i in range(len(manifest)):
        expected = np.concatenate([corpus[1][name] for name in manifest.clip_names(i)])
        waveform = source.read(i)
        assert waveform.dtype == np.float32
        np.testing.assert_array_equal(waveform * 32768, expected)
        np.testing.assert_array_equal(source.read(i, start=777, samples=5000) * 32768, expected[777:5777])
        np.testing.assert_array_equal(source.read(i, start=777) * 32768, expected[777:])
    check_records(manifest)


def test_threads_and_pickles_read_the_same(manifest):
    source = ShardSource(manifest)
    expected = [source.read(i) for i in range(len(manifest))]
    copies = [source, pickle.loads(pickle.dumps(source)), ShardSource(Manifest.load(manifest.root))]
    failures = []

    def work(seed):
        for i in np.random.default_rng(seed).integers(len(manifest), size=40):
            for copy in copies:
                if not np.array_equal(copy.read(i), expected[i]):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_bad_requests_are_refused_by_name(manifest):
    source = ShardSource(manifest)
    total = int(manifest.samples[0])
    for request in ({"start": -1}, {"start": total + 1}, {"start": 0, "samples": total + 1}, {"samples": -1}):
        with pytest.raises(
            SourceError, match=r"asked of .*deu-train-.*arrayrecord record 0, deu/c utterance deu/0.wav"
        ):
            source.read(0, **request)
    for i in (-1, len(manifest)):
        with pytest.raises(SourceError, match=f"utterance {i} asked of"):
            source.read(i)


def shard_of(manifest, i):
    return manifest.root / manifest.shard_names[manifest.shard[i]]


def test_a_missing_shard_is_named(manifest):
    last = len(manifest) - 1
    shard_of(manifest, last).unlink()
    source = ShardSource(manifest)
    assert len(source.read(0))
    with pytest.raises(SourceError, match=f"{shard_of(manifest, last).name} record .* cannot be read"):
        source.read(last)
    with pytest.raises(SourceError, match=f"{shard_of(manifest, last).name} cannot be opened"):
        check_records(manifest)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_a_truncated_shard_is_named(manifest, share):
    path = shard_of(manifest, 0)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(SourceError, match=path.name):
        ShardSource(manifest).read(0)
    with pytest.raises(SourceError, match=path.name):
        check_records(manifest)


def test_a_flipped_bit_is_seen(manifest):
    path = shard_of(manifest, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 4
    path.write_bytes(data)
    with pytest.raises(SourceError, match=path.name):
        [ShardSource(manifest).read(i) for i in manifest.rows() if manifest.shard[i] == manifest.shard[0]]


def test_a_shard_of_another_corpus_in_its_place_is_named(manifest):
    first, other = shard_of(manifest, 0), next(shard_of(manifest, i) for i in manifest.rows() if manifest.shard[i] == 1)
    first.write_bytes(other.read_bytes())
    with pytest.raises(SourceError, match="the record is of 'fra/0.wav'; the shard is not the manifest's"):
        ShardSource(manifest).read(0)


def test_a_shard_with_too_few_records_is_named(manifest):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = shard_of(manifest, 0)
    records = manifest.shard_records[0]
    packed = ShardSource(manifest)
    packed._open()
    kept = [packed._records[k] for k in range(records - 1)]
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in kept:
        writer.write(record)
    writer.close()
    with pytest.raises(SourceError, match=f"{path.name} holds {records - 1} records, the manifest says {records}"):
        check_records(manifest)
    with pytest.raises(SourceError, match=f"{path.name} record {records - 1}"):
        ShardSource(manifest).read(records - 1)


def test_making_a_source_opens_no_file_and_needs_no_reader(manifest):
    code = (
        "import sys; from data_pipelines.manifest import Manifest; from data_pipelines.sources import ShardSource;"
        f"s = ShardSource(Manifest.load({str(manifest.root)!r}));"
        "assert not {'array_record', 'grain', 'librosa', 'jax'} & set(sys.modules), sorted(sys.modules);"
        "assert s.read(0).size"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_too_many_shards_for_the_open_file_limit(manifest):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits});"
        "from data_pipelines.manifest import Manifest; from data_pipelines.sources import ShardSource;"
        f"assert ShardSource(Manifest.load({str(manifest.root)!r})).read(0).size;"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )

    def run(limits):
        command = [sys.executable, "-c", code.format(limits=limits)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert int(run((200, 4096)).stdout) == 4 + 256  # lifted as far as needed
    assert int(run((2000, 4096)).stdout) == 2000
    refused = run((200, 200)).stderr
    assert "4 shards, but this process may open 200 files" in refused and "--clips-per-shard" in refused
