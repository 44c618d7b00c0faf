"""Batches made ahead, in threads and in processes, by Grain."""

import contextlib
import functools
import signal
from collections.abc import Iterator

import grain
from absl import flags

from data_pipelines.batch import Batch
from data_pipelines.shared_batches import Place, SharedBatches, be_worker, own_copy, supported
from data_pipelines.stalls import STALL_SECONDS, StallError, next_in_time
from data_pipelines.worker_processes import follow_parent, interrupts_blocked

# A scheduler that ends an allocation may send these to every process of it; the trainer answers them, and needs batches
# until it has.
STOPS = (signal.SIGTERM, signal.SIGUSR1)


class Batches(Iterator[Batch]):
    """An iterator over the batches of a dataset, made ahead in threads and, with `workers`, in processes.

    The arrays belong to the caller. `close` stops threads and processes, and may be called more than once. `first` is
    the number of the first batch, for messages; `batch_bytes` what the largest takes (`bytes_of`), for memory that
    processes share: without it, they use Grain's. Raises StallError when no batch comes for `stall_seconds`, or when a
    process that makes them was killed; the batches are exhausted then.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        *,
        workers: int = 0,
        threads: int = 2,
        prefetch: int = 4,
        first: int = 0,
        batch_bytes: int = 0,
        stall_seconds: float = STALL_SECONDS,
    ):
        self._step, self._stall_seconds = first, stall_seconds
        self._shared: SharedBatches | None = None
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
        stream = dataset.to_iter_dataset(ahead)
        if workers:
            # Grain reads an absl flag when it starts a process, and fails in any program whose flags absl did not parse
            # (grain issue #1355).
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            share = max(1, prefetch // workers)
            if batch_bytes and supported():
                # Of each worker Grain holds `share` batches in a queue and as many here; one waits on either side of
                # the queue, one is being copied out, and in the worker itself some are being made or are ahead.
                slots = 2 * share + 3 + (threads + prefetch if threads else 1)
                self._shared = SharedBatches(workers=workers, slots=slots, slot_bytes=batch_bytes)
                stream = stream.map(self._shared.place)
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=share)
            start = functools.partial(_start_worker, place=self._shared.place if self._shared else None)
            stream = stream.mp_prefetch(options, worker_init_fn=start)
        self._workers, self._started = workers, False
        with interrupts_blocked(*STOPS) if workers else contextlib.nullcontext():
            self._iterator = iter(stream)

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        # The first batch starts the processes; the trainer decides what signals mean, and they make batches until then.
        with interrupts_blocked(*STOPS) if self._workers and not self._started else contextlib.nullcontext():
            try:
                batch = next_in_time(self._iterator, step=self._step, seconds=self._stall_seconds)
            except StallError as error:
                if error.hangs:
                    self._iterator = None  # closing it would wait for what hangs
                raise
        self._started = True
        self._step += 1
        if not self._workers:
            return batch
        # Arrays from a worker lie in memory that it shares and takes back.
        return own_copy(batch) if self._shared is None else self._shared.take(batch)

    def close(self) -> None:
        """Stops threads and processes; the iterator is exhausted from then on."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _start_worker(index: int, count: int, *, place: Place | None) -> None:
    be_worker(index, place)
    follow_parent()
