"""Listings as columns: what goes in comes out, in memory or in files, and is sorted as Python sorts it."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import columns, plan_order
from data_pipelines.columns import Names, Numbers, Strings
from data_pipelines.corpora import Clip, CorpusError, Listing, clips
from data_pipelines.corpora.clips import ClipWriter
from data_pipelines.corpora.keyed_lines import KeyedLines
from data_pipelines.corpora.listing import scratch_in
from data_pipelines.manifest import Split
from data_pipelines.plan_shards import make_plan
from tests.data_pipelines.noise_corpus import go, tree

NAMES = st.text("ab-\U0001f600é", max_size=3)
CLIPS = st.lists(
    st.builds(
        Clip,
        id=st.just(""),
        path=NAMES,
        language=st.sampled_from(["fra", "deu", "eng"]),
        corpus=NAMES,
        speaker=NAMES,
        split=st.sampled_from(Split),
        text=NAMES,
        licence=NAMES,
        samples=st.none() | st.integers(0, 1 << 40),
        row=st.integers(1, 1 << 40),
        size=st.integers(0, 1 << 40),
        member=NAMES,
        start=st.sampled_from([0.0, 0.5, 2.0]),
        end=st.none() | st.floats(0, 10),
        root=st.sampled_from(["", "x", "y"]),
        modified=st.integers(0, 1 << 62),
    ),
    max_size=40,
)


def written(given, folder=None):
    writer = ClipWriter(folder)
    for number, clip in enumerate(given):
        writer.add(clip._replace(id=f"{clip.path}{number % 7}-{number}"))
    return writer.clips()


@settings(max_examples=60, deadline=None)
@given(CLIPS, st.integers(1, 9), st.sampled_from([1, 3, 1 << 19]))
def test_clips_come_out_as_they_went_in_and_in_order(given, limit, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "PIECE", 4)
        patch.setattr(plan_order, "PIECE", 4)
        patch.setattr(plan_order, "SORTED_AT_ONCE", at_once)
        made = written(given)
        listed = [c._replace(id=f"{c.path}{n % 7}-{n}") for n, c in enumerate(given)]
        assert list(made) == listed == [made[k] for k in range(len(made))] and made[1:3] == listed[1:3]
        key = lambda c: (c.split, c.language, c.corpus, c.speaker, c.root, c.path, c.start, c.id)  # noqa: E731
        kin = list(plan_order.kin_in_order(made)) if given else []
        assert [clip for one in kin for clip in made.take(one.rows)] == sorted(listed, key=key)
        assert [(one.split, one.language) for one in kin] == sorted({(c.split, c.language) for c in listed})
        for one in kin:
            speakers = [(c.corpus, c.speaker) for c in made.take(one.rows)]
            assert one.speakers.tolist() == [k for k in range(len(speakers)) if not k or speakers[k] != speakers[k - 1]]
        writer = ClipWriter()
        writer.extend(made, np.arange(len(made))[::2], root="r", corpus="c", licence="l")
        assert list(writer.clips()) == [
            c._replace(id=f"r/{c.id}", root="r", corpus="c", licence=c.licence or "l") for c in listed[::2]
        ]
        if any(clip.split is Split.TRAIN for clip in listed):
            folders = {"": "/a", "x": "/b", "y": "/c"}
            rules = {"clips_per_shard": limit, "join_seconds": 4.0, "min_seconds": 2.0}
            plan = make_plan(folders, Listing(made, []), **rules)
            tasks = [plan.task(shard) for shard in plan.shards]
            assert [clip for task in tasks for clip in task.clips] == sorted(listed, key=key)
            assert all(len(task.clips) <= limit for task in tasks)
            assert len({task.name for task in tasks}) == len(tasks)
            # Names depend on what the clips are, not on how their names happen to be numbered.
            other = written([given[0]._replace(corpus="zz", speaker="zz"), *given])
            kept = ClipWriter()
            kept.extend(other, np.arange(1, len(other)))
            kept = kept.clips()
            ids = {"columns": kept.columns | {"id": made.columns["id"]}}
            assert make_plan(folders, Listing(clips.Clips(**ids), []), **rules).digest == plan.digest


def test_columns_in_files_are_those_in_memory_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "IN_MEMORY", 10)
    for folder in (None, tmp_path / "scratch"):
        numbers, strings, names = Numbers("i8", folder=folder), Strings(folder=folder), Names(folder=folder)
        for piece in ([], ["a", None, "bc\U0001f600"], ["", "long" * 10]):
            numbers.append([len(value or "") for value in piece])
            strings.append(pa.array([None, *piece], pa.large_string())[1:])
            names.append([value or "" for value in piece])
        assert numbers.take().tolist() == [1, 0, 3, 0, 40]
        assert strings.take().to_pylist() == ["a", None, "bc\U0001f600", "", "long" * 10]
        assert names.take().to_pylist() == ["a", "", "bc\U0001f600", "", "long" * 10]
    assert (tmp_path / "scratch").is_dir() and not list((tmp_path / "scratch").iterdir())


def test_a_corpus_whose_listing_is_in_files_becomes_the_same(raw, whole, tmp_path, monkeypatch):
    for module in (columns, clips, plan_order):
        monkeypatch.setattr(module, "IN_MEMORY" if module is columns else "PIECE", 7)
    assert tree(go(raw[0], tmp_path / "out", scratch=tmp_path / "elsewhere").root) == tree(whole.root)
    assert (tmp_path / "elsewhere").is_dir() and not list((tmp_path / "elsewhere").iterdir())


def test_a_full_disk_while_listing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "IN_MEMORY", 10)
    monkeypatch.setattr(columns.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(28, "No space")))
    with scratch_in(tmp_path), pytest.raises(OSError, match=f"{tmp_path} cannot be written .*free some space"):
        written([Clip("", "p" * 20, "fra", "c", "s", Split.TRAIN, "", "", None, 1, 1)], tmp_path)


def test_lines_by_their_keys(tmp_path, monkeypatch):
    (tmp_path / "t").write_bytes("\ufeffa x  y \r\n\nb\n c\tz\nb again\nd é".encode())
    lines = KeyedLines(tmp_path / "t")
    assert [lines.get(key) for key in ("a", "b", "c", "d", "e")] == ["x  y", "again", "z", "é", None]
    assert list(lines.items()) == [("a", "x  y"), ("b", ""), ("c", "z"), ("b", "again"), ("d", "é")]
    (tmp_path / "t").write_text("one\tmore words\ntwo words\tx\n")
    monkeypatch.setattr("builtins.hash", lambda value: 5)  # all alike: only letters tell
    lines = KeyedLines(tmp_path / "t", separator="\t")
    assert lines.get("one") == "more words" and lines.get("three") is None and list(lines.unasked()) == ["two words"]
    assert not len(KeyedLines(tmp_path / "none")) and KeyedLines(tmp_path / "none").get("a") is None
    (tmp_path / "t").write_bytes(b"a \xff\n")
    with pytest.raises(CorpusError, match="is not UTF-8"):
        KeyedLines(tmp_path / "t").get("a")
