"""Sums that are divided once, and metric files in which no step stands twice, on full disks neither."""

import errno
import json
import math
import os
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from data_pipelines.atomic import CannotWrite
from tests.wavlab_jax.full_disk import FullDisk
from wavlab_jax.metrics import MetricsWriter, read_lines


def events_of(folder):
    """The events of a TensorBoard folder, file after file, read as their format says, checksums included."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            content, checksum, data = data[12 : 12 + size], data[12 + size : 16 + size], data[16 + size :]
            assert struct.unpack("<I", checksum)[0] == masked_crc32c(content)
            found.append(Event.FromString(content))
    return found


def steps_of(folder):
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    return [line["step"] for line in read_lines(folder / "metrics.jsonl")]


def test_resuming_drops_the_lines_that_will_be_written_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1.0 / step, "bad": math.inf})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # a kill in the middle of a line
    writer = MetricsWriter(tmp_path, resume_step=20)
    writer.write(30, {"loss": np.float32(7.0).item()})
    writer.close()
    writer.close()
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert steps_of(tmp_path) == [10, 20, 30]
    assert lines[-1]["loss"] == 7.0 and lines[0]["bad"] is None


def test_tensorboard_gets_the_same_numbers_and_is_told_what_is_written_again(tmp_path):
    for resume_step, steps in ((0, (10, 20, 30)), (20, (30,))):
        writer = MetricsWriter(tmp_path, resume_step=resume_step)
        for step in steps:
            nested = {"eng": {"masked_accuracy": 0.25, "masked_loss": math.nan}}
            writer.write(step, {"loss": step / 4, "languages": nested, "bad": math.nan, "note": "words"})
        writer.close()
    events = events_of(tmp_path)
    assert [event.file_version for event in events if event.HasField("file_version")] == ["brain.Event:2"] * 2
    assert [event.step for event in events if event.HasField("session_log")] == [1, 21]
    written = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events if e.HasField("summary")]
    assert written == [(step, {"loss": step / 4, "language/eng/masked_accuracy": 0.25}) for step in (10, 20, 30, 30)]
    assert list(read_lines(tmp_path / "metrics.jsonl"))[0]["languages"]["eng"]["masked_loss"] is None


def test_probes_have_lines_of_their_own(tmp_path):
    for resume_step, steps in ((-1, (0, 10)), (0, (10,)), (-1, (0, 10))):
        writer = MetricsWriter(tmp_path, resume_step=resume_step)
        for step in steps:
            writer.write(step, {"loss": 1.0})
            writer.write_probe(step, {"masked": {"accuracy": step / 20, "languages": {"eng": {"accuracy": 0.5}}}})
        writer.sync()
        writer.close()
        assert [line["step"] for line in read_lines(tmp_path / "probes.jsonl")] == [0, 10] == steps_of(tmp_path)
    written = [{v.tag: v.simple_value for v in e.summary.value} for e in events_of(tmp_path) if e.HasField("summary")]
    assert written[3] == {"probe/masked/accuracy": 0.5, "probe/masked/language/eng/accuracy": 0.5}


def test_the_writer_of_another_host_writes_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, active=False)
    writer.write(1, {"loss": 1.0})
    writer.sync()
    writer.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "tfevents"])
@pytest.mark.parametrize("free", [0, 5])
def test_what_a_full_disk_cuts_short_is_taken_back_and_written_once_there_is_space(tmp_path, monkeypatch, name, free):
    writer = MetricsWriter(tmp_path)
    for step in (10, 20):
        writer.write(step, {"loss": 1.0})
    with monkeypatch.context() as patch:
        FullDisk(patch, name, free=free)
        with pytest.raises(CannotWrite, match=r"No space left on device\): free some space") as raised:
            writer.write(30, {"loss": 3.0})
        assert name in raised.value.filename
        writer.close()
    assert steps_of(tmp_path) == ([10, 20] if name == "metrics.jsonl" else [10, 20, 30])
    assert [e.step for e in events_of(tmp_path) if e.HasField("summary")] == [10, 20]
    writer = MetricsWriter(tmp_path, resume_step=20)
    for step in (30, 40):
        writer.write(step, {"loss": 4.0})
    writer.close()
    assert steps_of(tmp_path) == [10, 20, 30, 40]
    assert [e.step for e in events_of(tmp_path) if e.HasField("summary")] == [10, 20, 30, 40]


def test_a_disk_that_is_full_from_the_start_leaves_the_lines_there_were(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path)
    writer.write(10, {"loss": 1.0})
    writer.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(CannotWrite, match=r"metrics.jsonl cannot be written \(No space left on device\)"):
            MetricsWriter(tmp_path, resume_step=10)
    assert steps_of(tmp_path) == [10] and sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


def test_lines_are_in_the_file_at_once_and_on_the_disk_when_asked_and_at_the_end(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    writer = MetricsWriter(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    writer.write(10, {"loss": 1.0})
    assert steps_of(tmp_path) == [10] and not synced
    writer.sync()
    assert synced == [str(tmp_path / "metrics.jsonl")]
    writer.close()
    assert len(synced) == 3 and synced.count(str(tmp_path / "metrics.jsonl")) == 2
