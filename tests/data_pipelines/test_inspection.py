"""What `inspect` says, beside counts made in the plainest way; and that its page stands alone."""

import base64
import io
import math
import re
import subprocess
import sys
import time
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from data_pipelines.balance import DrawConfig
from data_pipelines.inspection import (
    LENGTH_EDGES,
    choose_rows,
    clipped_share,
    drawn,
    inspect,
    silent_share,
    summarise,
)
from data_pipelines.inspection_page import render, table_text
from data_pipelines.manifest import Manifest, write_manifest
from data_pipelines.prepare import prepare
from tests.data_pipelines.noise_corpus import REPOSITORY, noise, write_table

COLUMNS = ["path", "language", "source", "split"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Noise at 16, 24 and 48 kHz in three languages; in `fra` one clip twice, one clipped, one mostly silent."""
    folder, rows = tmp_path_factory.mktemp("odd"), []
    rng = np.random.default_rng(1)

    def clip(language, corpus, split, samples, rate=16_000):
        name = f"{len(rows):02d}.wav"
        soundfile.write(folder / name, samples, rate, subtype="PCM_16")
        rows.append(dict(zip(COLUMNS, (name, language, corpus, split), strict=True)))
        return name

    for k in range(30):
        language, rate = (("fra", 16_000), ("deu", 48_000), ("eng", 24_000))[k % 3]
        seconds = float(rng.uniform(1, 5))
        clip(language, "xy"[k % 2], "dev" if k > 26 else "train", noise(int(seconds * rate), k), rate)
    names = {"duplicate": clip("fra", "x", "train", noise(40_000, 77))}
    clip("fra", "x", "train", noise(40_000, 77))
    names["clipped"] = clip("fra", "x", "train", np.where(np.arange(30_000) // 100 % 2, 32767, -32768).astype(np.int16))
    quiet = np.zeros(32_000, np.int16)
    quiet[:3000] = noise(3000, 5)
    names["silent"] = clip("fra", "x", "train", quiet)
    write_table(folder, rows, COLUMNS)
    out = folder.parent / f"{folder.name}-out"
    options = dict(workers=1, join_seconds=0, min_seconds=0, progress=False, clips_per_shard=5)
    return prepare(folder, out=out, **options).manifest, names


def test_the_numbers_are_those_of_a_plain_count(odd):
    manifest = odd[0]
    seconds, lengths, corpora = defaultdict(float), defaultdict(list), defaultdict(lambda: defaultdict(float))
    for i in range(len(manifest)):
        language, own = manifest.languages[manifest.language[i]], int(manifest.samples[i]) / 16_000
        lengths[language].append(own)
        corpora[language][manifest.corpora[manifest.corpus[i]]] += own
        if manifest.split[i] == 0:
            seconds[language] += own
    summaries = summarise(manifest)
    assert [one.language for one in summaries] == sorted(lengths, key=lambda name: -sum(lengths[name]))
    for one in summaries:
        own = lengths[one.language]
        assert one.utterances == one.clips == len(own)
        assert one.seconds == pytest.approx(sum(own)) and one.train == pytest.approx(seconds[one.language])
        assert (one.shortest, one.longest) == (min(own), max(own)) and one.median == pytest.approx(np.median(own))
        assert one.corpora == pytest.approx(dict(corpora[one.language]))
        ends = [*LENGTH_EDGES[1:], math.inf]
        counted = [sum(a <= s < b for s in own) for a, b in zip(LENGTH_EDGES, ends, strict=True)]
        assert list(one.histogram) == counted
    rates = {one.language: one.rates.seconds for one in summaries}
    assert {language: list(own) for language, own in rates.items()} == {"fra": [16000], "deu": [48000], "eng": [24000]}
    for one in summaries:
        assert sum(one.rates.seconds.values()) == pytest.approx(one.seconds)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_shares_and_epochs_of_a_run(odd, alpha):
    train = odd[0].seconds(0, by=("language", "corpus"))
    by_language = odd[0].seconds(0)
    found = drawn(train, cfg=DrawConfig(language_exponent=alpha), steps=700, seconds_per_step=12.5)
    total = sum(s**alpha for s in by_language.values())
    for language, seconds in by_language.items():
        assert found[language].share == pytest.approx(seconds**alpha / total)
        assert found[language].epochs == pytest.approx(700 * 12.5 * seconds**alpha / total / seconds)
    assert sum(own.epochs * by_language[name] for name, own in found.items()) == pytest.approx(700 * 12.5)


def test_what_looks_wrong_is_found_and_nothing_else(odd):
    manifest, names = odd
    found = inspect(manifest, sample=None, clips=0, progress=False)
    kinds = {suspect.kind: manifest.id(suspect.row) for suspect in found.suspects}
    assert len(found.suspects) == 3 and set(kinds) == {"silent", "clipped", "duplicate"}
    assert kinds["silent"] == names["silent"] and kinds["clipped"] == names["clipped"]
    duplicate = next(suspect for suspect in found.suspects if suspect.kind == "duplicate")
    assert names["duplicate"] in duplicate.says
    assert "all 34 utterances were decoded: 1 silent, 1 clipped, 1 duplicate" in table_text(found, draws=())
    # A sample of eight looks at the rows that have the length of another; here there is one such pair.
    rows = choose_rows(manifest, 8, seed=0)
    assert len(rows) == len(set(rows.tolist())) == 8
    assert {manifest.find(names["duplicate"]), duplicate.row} <= set(rows.tolist())


def test_levels_at_their_thresholds():
    loud, quiet = (np.full(320, 10 ** (db / 20), np.float32) for db in (-59.9, -60.1))
    assert silent_share(np.concatenate([loud, quiet, quiet, loud, loud[:100]])) == 0.5
    peaks = np.zeros(1000, np.float32)
    peaks[[1, 2, 5, 6, 7, 997, 998, 999]] = [1, -1, 1, 1, 1, -1, -1, -1]
    assert clipped_share(peaks) == 0.006 and clipped_share(peaks * np.float32(0.9)) == 0.0


class Page(HTMLParser):
    """Checks that tags close as they open; keeps what might be fetched, and the audio."""

    VOID = {"meta", "input", "rect", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.audio = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "action", "data", "srcset"):
                (self.audio if value.startswith("data:audio/flac;base64,") else self.fetched).append(value)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_can_be_heard(odd, tmp_path):
    manifest = odd[0]
    text = render(inspect(manifest, clips=2, progress=False), draw=DrawConfig(language_exponent=0.5), steps=100)
    page = Page()
    page.feed(text)
    assert not page.open and not page.fetched and not re.search(r"https?://|@import|url\(|fetch\(", text)
    assert len(page.audio) == 3 * 2 + 3  # two of each language, and the suspicious rows
    for sound in page.audio:
        waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(sound.partition(",")[2])))
        assert rate == 16_000 and 0 < len(waveform) <= 48_000
    small = inspect(manifest, clips=2, audio_megabytes=0.3, progress=False)
    assert 0 < sum(len(heard.flac) for heard in (*small.heard, *small.heard_suspects)) <= 300_000


def test_the_command(odd, tmp_path):
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "data_pipelines", "inspect", str(odd[0].root), "--html", str(page)]
    ran = subprocess.run(
        [*command, "--alpha", "1", "0.5", "--steps", "700", "--seconds-per-step", "12.5"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "ep a=0.5" in ran.stdout and "1 duplicate" in ran.stdout and page.stat().st_size > 10_000
    line = next(line for line in ran.stdout.splitlines() if line.startswith("deu"))
    share = drawn(odd[0].seconds(0, by=("language", "corpus")), cfg=DrawConfig(language_exponent=0.5))["deu"].share
    assert f"{share:.3%}" in line and "48000" in line


@pytest.mark.soak
def test_a_million_utterances_in_reasonable_time(tmp_path):
    rng = np.random.default_rng(0)
    count = 1_000_000
    write_manifest(
        tmp_path,
        samples=rng.integers(16_000, 480_000, count),
        language=[
            f"q{a}{b}" for a, b in zip("abcdefghij" * (count // 10), "abcdefghijklm" * (count // 13 + 1), strict=False)
        ],
        corpus=["one", "two"] * (count // 2),
    )
    manifest = Manifest.load(tmp_path, check_shards=False)
    started = time.perf_counter()
    found = inspect(manifest, sample=0, clips=0)
    assert sum(one.utterances for one in found.languages) == count
    assert len(render(found, draw=DrawConfig())) < 1_000_000
    assert time.perf_counter() - started < 20
