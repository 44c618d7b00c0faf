"""Batches from worker processes through memory that stays: mapped once, written again and again.

Grain puts every array of every element into a new block of shared memory, which this process maps, reads and unmaps:
the kernel clears and maps each page anew, twice, which costs as much as a third of decoding (docs/data.md). Here each
worker has a few slots in one anonymous file (`memfd_create`), so that there is no name to clean up however either side
ends, and no limit of /dev/shm's. A batch is made in a slot and lies there until it was copied out here.
A worker whose slots are all full makes its batch elsewhere and hands it to Grain: nothing waits for a slot, and nothing
is ever overwritten.
"""

import contextlib
import math
import mmap
import os
import threading
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from data_pipelines.batch import Batch

ALIGNMENT = 64  # bytes: numpy's loops like arrays to begin on a cache line
_worker = 0  # which of the workers this process is, and where it makes batches; see `be_worker`
_making: "Place | None" = None
_open: dict = {}  # (name of the file, worker) -> _Slots, or None
_opening = threading.Lock()


class Wanted(NamedTuple):
    """An array's dtype, as numpy takes it, and its shape."""

    dtype: object
    shape: tuple[int, ...]


class Placed(NamedTuple):
    """Where a batch lies: its slot, and its arrays one after another in it."""

    slot: int
    arrays: tuple[Wanted, ...]


class SharedBatches:
    """Slots for `workers` processes, `slots` of `slot_bytes` bytes for each (see `bytes_of`); made where batches are
    used. Close it once the workers have ended.

    The first bytes of the file say which slots are full. Each is set by one worker and cleared here, after what it
    guards was written or read; the message that names the slot travels through a pipe, which orders the two.
    """

    def __init__(self, *, workers: int, slots: int, slot_bytes: int):
        self._first, self._slot_bytes = _aligned(workers * slots), _aligned(slot_bytes)
        total = self._first + workers * slots * self._slot_bytes
        name = f"batches-{uuid.uuid4().hex}"
        self._file = os.memfd_create(name)
        os.truncate(self._file, total)  # takes no memory until it is written to
        self._map = mmap.mmap(self._file, total)
        # A spawned process inherits no descriptor, but may open its parent's.
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        self.place = Place(path, name, total=total, first=self._first, slots=slots, slot_bytes=self._slot_bytes)

    def take(self, element: Batch | Placed) -> Batch:
        """The batch, in memory of its own."""
        if not isinstance(element, Placed):
            return own_copy(element)
        at, arrays = self._first + element.slot * self._slot_bytes, []
        for dtype, shape in element.arrays:
            arrays.append(np.array(np.ndarray(shape, dtype, buffer=self._map, offset=at)))
            at += _aligned(arrays[-1].nbytes)
        self._map[element.slot] = 0
        return Batch(*arrays)

    def close(self) -> None:
        """Gives the memory back."""
        self._map.close()
        os.close(self._file)


class _Slots:
    """In a worker: its own slots of the file, mapped."""

    def __init__(self, place: "Place"):
        file = os.open(place.path, os.O_RDWR)
        try:
            # The parent may have closed it, and have another file under that number by now.
            if place.name not in os.readlink(f"/proc/self/fd/{file}"):
                raise OSError(f"{place.path} is another file by now")
            self._map = mmap.mmap(file, place.total)
        finally:
            os.close(file)
        self._place, self._lock = place, threading.Lock()
        self._begin = np.frombuffer(self._map, np.uint8).ctypes.data
        self._own = range(_worker * place.slots, (_worker + 1) * place.slots)
        self._next = 0

    def take(self) -> int | None:
        """A free slot, which is full from now on; None if there is none."""
        with self._lock:
            for step in range(len(self._own)):
                slot = self._own[(self._next + step) % len(self._own)]
                if not self._map[slot]:
                    self._map[slot] = 1
                    self._next = (self._next + step + 1) % len(self._own)
                    return slot
        return None

    def arrays(self, slot: int, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        """The slot's memory, as arrays one after another."""
        at, found = self._place.first + slot * self._place.slot_bytes, []
        for dtype, shape in wanted:
            found.append(np.ndarray(shape, dtype, buffer=self._map, offset=at))
            at += _aligned(found[-1].nbytes)
        return found

    def slot_of(self, batch: Batch) -> int | None:
        """The slot that the batch lies in; None if it lies elsewhere."""
        at = batch.waveform.ctypes.data - self._begin - self._place.first
        return at // self._place.slot_bytes if 0 <= at < self._place.total - self._place.first else None


class Place(grain.transforms.Map):
    """In a worker, the last step: Batch to Placed, or to itself where no slot is free or the file cannot be opened."""

    def __init__(self, path: str, name: str, *, total: int, first: int, slots: int, slot_bytes: int):
        self.path, self.name, self.total, self.first = path, name, total, first
        self.slots, self.slot_bytes = slots, slot_bytes

    def map(self, element: Batch) -> Batch | Placed:
        """Where the batch lies, after it was copied there if it was not made there (see `batch_arrays`)."""
        slots = _opened(self)
        if slots is None:
            return element
        arrays = tuple(Wanted(array.dtype.str, array.shape) for array in element)
        slot = slots.slot_of(element)
        if slot is None:
            slot = slots.take() if bytes_of(element) <= self.slot_bytes else None
            if slot is None:
                return element
            for to, array in zip(slots.arrays(slot, arrays), element, strict=True):
                to[...] = array
        return Placed(slot, arrays)


def be_worker(number: int, place: Place | None = None) -> None:
    """In a worker process, once: whose slots are its own, and where batches are made from now on."""
    global _worker, _making
    _worker, _making = number, place


def batch_arrays(wanted: Sequence[Wanted]) -> list[np.ndarray]:
    """Arrays for a new batch, with anything in them: in a free slot if this is a worker that has one, else in memory.

    What is made in a slot need not be copied there.
    """
    slots = None if _making is None else _opened(_making)
    if slots is not None and _bytes(wanted) <= _making.slot_bytes:
        slot = slots.take()
        if slot is not None:
            return slots.arrays(slot, wanted)
    return [np.empty(shape, dtype) for dtype, shape in wanted]


def _opened(place: Place) -> _Slots | None:
    with _opening:
        key = (place.name, _worker)
        if key not in _open:
            _open[key] = None  # somebody else's /proc: Grain's way then
            with contextlib.suppress(OSError):
                _open[key] = _Slots(place)
        return _open[key]


def bytes_of(batch: Batch) -> int:
    """What a slot needs for it."""
    return _bytes([Wanted(array.dtype.str, array.shape) for array in batch])


def _bytes(wanted: Sequence[Wanted]) -> int:
    return sum(_aligned(np.dtype(dtype).itemsize * math.prod(shape)) for dtype, shape in wanted)


def own_copy(batch: Batch) -> Batch:
    """The batch in memory of its own."""
    return Batch(*(np.array(array) for array in batch))


def supported() -> bool:
    """Whether this system has what it takes (Linux has); Grain's way serves elsewhere."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


def _aligned(count: int) -> int:
    return math.ceil(count / ALIGNMENT) * ALIGNMENT
