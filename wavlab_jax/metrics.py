"""Sums that are divided once, and the files that metrics are written to."""

import contextlib
import json
import math
import os
import platform
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from data_pipelines.atomic import cannot_write, whole_file

JSON_LINES = "metrics.jsonl"
PROBE_LINES = "probes.jsonl"  # a line a probe; in TensorBoard its numbers begin with "probe/"
# A line's objects, and what TensorBoard calls each of their entries: {"languages": {"eng": {"masked_loss": 2.0}}} in
# JSON is language/eng/masked_loss there.
OBJECTS = {"languages": "language", "layers": "layer", "modules": "module"}


class Sum(NamedTuple):
    """A total and the weight it will be divided by, once, at the very end. Both scalars, or both of one shape."""

    total: jax.Array
    weight: jax.Array


Sums = dict[str, Sum]  # adds across micro-batches, devices, hosts and steps; each term has its own denominator


class Tracker(Protocol):
    """Another place that lines of metrics go to: flat names, finite numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line."""

    def close(self) -> None:
        """No more lines."""


class MetricsWriter:
    """Appends one JSON line a record and the same numbers to TensorBoard, and to a tracker if there is one; a step is
    never written twice. Probes have a file of their own, made with the first.

    Opening with `resume_step` drops every line after that step, so that a run killed between a metric and the next
    checkpoint does not leave lines that the resumed run will write again; -1 drops all. Of several hosts one is
    `active`; the others' writers write nothing.

    Everything raises CannotWrite naming the file. What a full disk cuts short is taken back, so that both files hold
    whole records only; the JSON line comes first, and stays when TensorBoard's file fails.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0, active: bool = True, tracker: Tracker | None = None):
        self._files = contextlib.ExitStack()
        self._active, self._tracker = active, tracker
        if not active:
            return
        board, self._probes = folder / "tensorboard", folder / PROBE_LINES
        board.mkdir(parents=True, exist_ok=True)
        _cut(folder / JSON_LINES, resume_step)
        if self._probes.exists():
            _cut(self._probes, resume_step)
        with self._files:
            self._lines = [self._files.enter_context(_Appended(folder / JSON_LINES))]
            # The names sort by time, as TensorBoard reads them.
            name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}"
            self._board = self._files.enter_context(_Appended(board / name))
            self._event(file_version="brain.Event:2")
            # TensorBoard then hides what an earlier process wrote from this step on.
            self._event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._files = self._files.pop_all()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line {"step": step, **values}; non-finite floats become null, so that the line stays JSON."""
        if not self._active:
            return
        self._write(step, values, to=self._lines[0])

    def write_probe(self, step: int, values: Mapping[str, Any]) -> None:
        """The same of a probe."""
        if not self._active:
            return
        if len(self._lines) == 1:
            self._lines.append(self._files.enter_context(_Appended(self._probes)))
        self._write(step, values, to=self._lines[1], prefix="probe/")

    def _write(self, step: int, values: Mapping[str, Any], *, to: "_Appended", prefix: str = "") -> None:
        clean = _clean(values)
        to.append((json.dumps({"step": step, **clean}) + "\n").encode())
        scalars = {f"{prefix}{name}": value for name, value in flat(clean).items()}
        self._event(
            step=step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()])
        )
        if self._tracker is not None:
            self._tracker.log(step, scalars)

    def sync(self) -> None:
        """Returns when all lines are on the disk: before a checkpoint, whose run will not write them again."""
        if self._active:
            for lines in self._lines:
                lines.sync()

    def close(self) -> None:
        """Brings both files to the disk and closes them, and the tracker; a second time does nothing."""
        self._files.close()
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.close()

    def _event(self, **fields) -> None:
        """Appends a TFRecord: length and content, each followed by its checksum.

        Not through tensorboardX's writer: that has a thread, which a full disk ends, and the run then waits for it for
        good as soon as its queue is full.
        """
        content = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(content))
        checked = [part + struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self._board.append(b"".join(checked))


def flat(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line under the names that TensorBoard knows them by."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{OBJECTS.get(name, name)}/{entry}": number for entry, number in flat(value).items()}
        elif isinstance(value, int | float):
            found[name] = value
    return found


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _clean(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, last: int) -> None:
    """Leaves the lines up to that step."""
    kept = [line for line in read_lines(path) if line["step"] <= last]
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


class _Appended:
    """A file of records to which others are appended, whole or not at all. Nothing is buffered here."""

    def __init__(self, path: Path):
        self.path = path
        with self._named():
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, record: bytes) -> None:
        """Appends the bytes, or nothing."""
        whole = os.fstat(self._descriptor).st_size
        with self._named():
            try:
                left = record
                while left:  # the last bytes before a disk is full are written, and only the next ones fail
                    left = left[os.write(self._descriptor, left) :]
            except BaseException:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    os.ftruncate(self._descriptor, whole)
                raise

    def sync(self) -> None:
        """Returns when everything is on the disk."""
        with self._named():
            os.fsync(self._descriptor)

    def __enter__(self) -> "_Appended":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.sync()
        finally:
            os.close(self._descriptor)

    @contextlib.contextmanager
    def _named(self):
        try:
            yield
        except OSError as error:
            raise cannot_write(error, self.path) from error


def read_lines(path: Path) -> Iterable[dict]:
    """The records of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
