"""Prepared corpora at an address: `file://` goes through the same code as s3://, and gs:// through ArrayRecord's own
client to a server in this process that answers as Google's JSON API does."""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import storage
from data_pipelines.corpora import CorpusError
from data_pipelines.manifest import Manifest, Split
from data_pipelines.pipeline import eval_batches, train_batches
from data_pipelines.prepare import prepare
from data_pipelines.sources import ShardSource, check_records
from data_pipelines.storage import StorageError, address_of
from data_pipelines.unit_pieces import UnitPieces
from data_pipelines.units import UnitStore, UnitWriter
from tests.data_pipelines.noise_corpus import REPOSITORY
from tests.data_pipelines.ramps import CLEAN


@pytest.fixture
def remote(corpus, tmp_path, monkeypatch):
    """A copy of the corpus, to be reached by its address only, and an empty cache."""
    monkeypatch.setenv("SPEECH_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(corpus.root, tmp_path / "bucket" / "corpus"))


def test_addresses():
    assert str(address_of("gs://bucket/a/b/")) == str(address_of(Path("gs://bucket/a/b"))) == "gs://bucket/a/b"
    assert str(address_of("file:///a/b")) == "file:///a/b"
    assert address_of("/a/b") is None and address_of(Path("a:b/c")) is None
    with pytest.raises(StorageError, match="http://x/y: addresses of gs, s3, file are read"):
        address_of("http://x/y")


def test_a_corpus_at_an_address_reads_as_at_home(corpus, remote):
    manifest = Manifest.load(f"file://{remote}")
    assert manifest.fingerprint == corpus.fingerprint and manifest.root.is_relative_to(os.environ["SPEECH_CACHE"])
    assert not list(manifest.root.rglob("*.arrayrecord"))  # nothing before it is needed
    here, there = ShardSource(corpus), ShardSource(manifest)
    for i in (0, 7, len(corpus) - 1):
        np.testing.assert_array_equal(here.read(i), there.read(i))
    check_records(manifest)
    shutil.rmtree(remote / "shards")  # fetched once, not again
    assert ShardSource(Manifest.load(f"file://{remote}", check_shards=False)).read(3).size


def test_an_address_with_spaces_and_letters_beyond_ascii(corpus, remote):
    odd = remote.rename(remote.with_name("mein Korpus für #1"))
    assert Manifest.load(f"file://{odd}").fingerprint == corpus.fingerprint
    client, path = storage._opened(address_of("gs://bucket/a b?endpoint_override=127.0.0.1:9"))
    assert path == "bucket/a b" and client.type_name == "gcs"


def test_shards_are_there_before_processes_and_clocks_start(corpus, remote):
    """Else each worker would fetch all of them, and the first batch would be given up for a read that hangs."""
    manifest = Manifest.load(f"file://{remote}")
    for make in (
        lambda: train_batches(CLEAN, manifest, ()),
        lambda: eval_batches(manifest, (), manifest.rows(Split.DEV), lengths=CLEAN.lengths, rows_per_batch=4),
    ):
        shutil.rmtree(manifest.root / "shards", ignore_errors=True)
        with make() as batches:
            assert len(list(manifest.root.rglob("*.arrayrecord"))) == len(corpus.shard_names)
            next(batches)


def test_several_processes_that_share_a_cache_fetch_a_shard_once(corpus, remote, monkeypatch):
    """Threads stand for them: the lock is one of open files."""
    manifest, fetched, fetch = Manifest.load(f"file://{remote}"), [], storage._fetch
    monkeypatch.setattr(storage, "_fetch", lambda *what: fetched.append(what[1]) or fetch(*what))
    threads = [threading.Thread(target=ShardSource(manifest).fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fetched) == sorted(corpus.shard_names)


def test_what_changed_there_is_fetched_again(corpus, remote):
    before = Manifest.load(f"file://{remote}")
    time = (before.root / "manifest.arrow").stat().st_mtime_ns
    assert (Manifest.load(f"file://{remote}").root / "manifest.arrow").stat().st_mtime_ns == time
    os.utime(remote / "manifest.arrow", ns=(1, 1))
    assert (Manifest.load(f"file://{remote}").root / "manifest.arrow").stat().st_mtime_ns != time


def test_what_is_missing_or_cut_there_is_named(remote):
    shard = next((remote / "shards").glob("*.arrayrecord"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(StorageError, match=f"file://.*{shard.name} has {len(whole) - 5} bytes, {len(whole)} expected"):
        Manifest.load(f"file://{remote}")
    manifest = Manifest.load(f"file://{remote}", check_shards=False)
    with pytest.raises(StorageError, match=f"{shard.name} gave {len(whole) - 5} of {len(whole)} bytes"):
        ShardSource(manifest).read(0)
    assert not (manifest.root / "shards" / shard.name).exists()
    shard.unlink()
    with pytest.raises(StorageError, match=f"{shard.name} does not exist: copy the whole"):
        Manifest.load(f"file://{remote}")
    with pytest.raises(StorageError, match="nowhere/manifest.arrow does not exist"):
        Manifest.load(f"file://{remote}/nowhere")


def test_a_cache_without_space_is_told_before_anything_is_fetched(remote, monkeypatch):
    manifest = Manifest.load(f"file://{remote}")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(StorageError, match="GB more in .* where 0.0 GB are free.*SPEECH_CACHE"):
        ShardSource(manifest).read(0)
    assert not list(manifest.root.rglob("*.arrayrecord"))


def test_units_at_an_address(corpus, units, remote):
    shutil.copytree(units[0].directory, remote / "units")
    store = UnitStore.load(f"file://{remote}/units", corpus)
    np.testing.assert_array_equal(store.read(4), units[0].read(4))


class Bucket(http.server.BaseHTTPRequestHandler):
    """GET /storage/v1/b/BUCKET/o/OBJECT?alt=media, with ranges, as Google's JSON API answers it; files below `root`."""

    protocol_version = "HTTP/1.1"
    root: Path
    ranges: list[str]

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = urllib.parse.unquote(re.sub(r"^.*/b/[^/]+/o/", "", urllib.parse.urlsplit(self.path).path))
        try:
            data = (self.root / name).read_bytes()
        except OSError:
            self.send_error(404)
            return
        asked = self.headers.get("range", f"bytes=0-{len(data)}")
        self.ranges.append(asked)
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
        start = int(first) if first else max(0, len(data) - int(last))
        body = data[start : min(len(data), int(last) + 1) if first and last else len(data)]
        self.send_response(206)
        self.send_header("content-range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        for header in ("x-goog-generation", "x-goog-metageneration"):
            self.send_header(header, "1")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True


def test_shards_in_a_google_bucket_are_read_where_they_lie(corpus, remote):
    """In a process of its own: the client reads the server's address once. pyarrow's part is done by a local copy."""
    handler = type("Served", (Bucket,), {"root": remote.parent, "ranges": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = storage.local_folder(f"file://{remote}", names=("manifest.arrow",))
    origin = cache / storage.ORIGIN_NAME
    origin.write_text(origin.read_text().replace(f"file://{remote}", "gs://bucket/corpus"))
    code = (
        "from data_pipelines.manifest import Manifest; from data_pipelines.sources import ShardSource\n"
        f"roots = ({str(corpus.root)!r}, {str(cache)!r})\n"
        "here, there = (ShardSource(Manifest.load(root, check_shards=False)) for root in roots)\n"
        "assert all((here.read(i) == there.read(i)).all() for i in (0, 9, 40))\n"
    )
    environment = os.environ | {"CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
        )
    finally:
        server.shutdown()
        server.server_close()
    assert ran.returncode == 0, ran.stderr
    assert handler.ranges and not list(cache.rglob("*.arrayrecord"))


def test_what_is_written_or_raw_is_not_at_an_address(raw, corpus, tmp_path, monkeypatch):
    """As a path, an address would be a folder called "gs:" here; ArrayRecord, asked to write there, hangs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.toml").write_text('[[corpus]]\nname = "a"\nreader = "folder"\nfolder = "gs://bucket/a"\n')
    for refused, arguments in {
        "gs://bucket/out: the folder to prepare to": (raw[0], {"out": "gs://bucket/out"}),
        "s3://bucket/in: the corpus": (Path("s3://bucket/in"), {"out": "out"}),
        "gs://bucket/scratch: the folder for listings": (
            raw[0],
            {"out": "out", "scratch": Path("gs://bucket/scratch")},
        ),
        "corpus 'a': gs://bucket/a: a corpus": ("all.toml", {"out": "out"}),
    }.items():
        with pytest.raises((StorageError, CorpusError), match=f"{refused} must be local, or on a mounted disk"):
            prepare(arguments[0], workers=1, progress=False, **arguments[1])
    with pytest.raises(StorageError, match="the units to write must be local"):
        UnitWriter(Path("gs://bucket/units"), corpus, units=2, source="test")
    with pytest.raises(StorageError, match="the units to write must be local"):
        UnitPieces("gs://bucket/units", corpus, units=2, source="test")
    assert [path.name for path in tmp_path.iterdir()] == ["all.toml"]
    ran = subprocess.run(
        [sys.executable, "-m", "data_pipelines", "inspect", corpus.root, "--sample", "0", "--html", "gs://bucket/page"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and ran.stderr.startswith("error: gs://bucket/page: the page must be local")


def test_a_bucket_out_of_reach_is_given_up(tmp_path):
    """Nobody listens at the server's address; without the limit, the client tries for a quarter of an hour."""
    code = (
        "from data_pipelines import storage; from data_pipelines.manifest import Manifest\n"
        "assert storage.GIVE_UP_SECONDS == 60\n"
        "storage.GIVE_UP_SECONDS = 1\n"
        "Manifest.load('gs://bucket/corpus')\n"
    )
    environment = os.environ | {"CLOUD_STORAGE_EMULATOR_ENDPOINT": "http://127.0.0.1:9", "SPEECH_CACHE": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "StorageError: gs://bucket/corpus cannot be reached" in ran.stderr, ran.stderr
