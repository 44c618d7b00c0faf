"""Batches from worker processes through memory that stays: mapped once, written again and again.

Grain puts every array of every element into a new block of shared memory, which this process maps, reads and unmaps:
the kernel clears and maps each page anew, twice, which costs as much as a third of decoding (docs/data.md). Here each
worker has a few slots in one anonymous file (`memfd_create`), so that there is no name to clean up however either side
ends, and no limit of /dev/shm's. A batch lies in a slot from when the worker has made it until it was copied out here.
A worker whose slots are all full hands its batch to Grain instead: nothing waits for a slot, and nothing is ever
overwritten.
"""

import contextlib
import math
import mmap
import os
import uuid
from typing import NamedTuple

import grain
import numpy as np

from data_pipelines.batch import Batch

ALIGNMENT = 64  # bytes: numpy's loops like arrays to begin on a cache line
_worker = 0  # which of the workers this process is; see `be_worker`


class _Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class Placed(NamedTuple):
    """Where a batch lies: its slot, and its arrays one after another in it."""

    slot: int
    arrays: tuple[_Array, ...]


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


class Place(grain.transforms.Map):
    """In a worker, the last step: Batch to Placed, or to itself where no slot is free or the file cannot be opened."""

    def __init__(self, path: str, name: str, *, total: int, first: int, slots: int, slot_bytes: int):
        self._path, self._name, self._total, self._first = path, name, total, first
        self._slots, self._slot_bytes = slots, slot_bytes
        self._map: mmap.mmap | None = None
        self._next = 0

    def map(self, element: Batch) -> Batch | Placed:
        """Copies the batch's arrays into the next slot of this worker."""
        if self._map is None:
            with contextlib.suppress(OSError):  # somebody else's /proc: Grain's way then
                file = os.open(self._path, os.O_RDWR)
                try:
                    # The parent may have closed it, and have another file under that number by now.
                    if self._name in os.readlink(f"/proc/self/fd/{file}"):
                        self._map = mmap.mmap(file, self._total)
                finally:
                    os.close(file)
        slot = _worker * self._slots + self._next
        if self._map is None or self._map[slot] or bytes_of(element) > self._slot_bytes:
            return element
        at = self._first + slot * self._slot_bytes
        for array in element:
            np.ndarray(array.shape, array.dtype, buffer=self._map, offset=at)[...] = array
            at += _aligned(array.nbytes)
        self._map[slot] = 1
        self._next = (self._next + 1) % self._slots
        return Placed(slot, tuple(_Array(array.dtype.str, array.shape) for array in element))


def be_worker(number: int) -> None:
    """In a worker process, once: whose slots are its own."""
    global _worker
    _worker = number


def bytes_of(batch: Batch) -> int:
    """What a slot needs for it."""
    return sum(_aligned(array.nbytes) for array in batch)


def own_copy(batch: Batch) -> Batch:
    """The batch in memory of its own."""
    return Batch(*(np.array(array) for array in batch))


def supported() -> bool:
    """Whether this system has what it takes (Linux has); Grain's way serves elsewhere."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


def _aligned(count: int) -> int:
    return math.ceil(count / ALIGNMENT) * ALIGNMENT
