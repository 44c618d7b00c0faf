"""Batches through slots of shared memory: what comes out is what went in, and nothing is overwritten."""

import os
import pickle

import numpy as np
import pytest

from data_pipelines.batch import Batch
from data_pipelines.shared_batches import Placed, SharedBatches, Wanted, batch_arrays, be_worker, bytes_of


def batch_of(seed: int, rows: int = 2) -> Batch:
    rng = np.random.default_rng(seed)
    rest = [rng.integers(100, size=rows).astype(np.int32) for _ in range(5)]
    return Batch(
        rng.standard_normal((rows, 1001), np.float32),
        np.zeros((rows, 0), np.float32),
        rng.integers(9, size=(rows, 3, 2)).astype(np.int32),
        np.ones((rows, 3), np.bool_),
        *rest,
        rng.integers(9, size=rows).astype(np.uint32),
    )


def assert_same(batch: Batch, again: Batch) -> None:
    for name, one, other in zip(Batch._fields, batch, again, strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other), name


@pytest.fixture
def shared():
    memory = SharedBatches(workers=2, slots=2, slot_bytes=bytes_of(batch_of(0)))
    yield memory
    be_worker(0)
    memory.close()


def test_slots_are_used_again_only_once_they_were_copied_out(shared):
    place = pickle.loads(pickle.dumps(shared.place))  # as a worker gets it
    be_worker(1)
    batches = [batch_of(seed) for seed in range(6)]
    first, second = place.map(batches[0]), place.map(batches[1])
    assert isinstance(first, Placed) and isinstance(second, Placed) and first.slot != second.slot
    assert place.map(batches[2]) is batches[2]  # both are full: Grain carries it, nothing is overwritten
    out = shared.take(first)
    third = place.map(batches[3])
    assert third.slot == first.slot
    assert_same(out, batches[0])  # a copy, so not what lies there now
    for element, expected in ((batches[2], batches[2]), (second, batches[1]), (third, batches[3])):
        assert_same(shared.take(element), expected)
    assert all(array.flags.owndata for array in shared.take(place.map(batches[4])))


def test_what_a_worker_makes_in_a_slot_stays_there(shared):
    place = pickle.loads(pickle.dumps(shared.place))
    be_worker(1, pickle.loads(pickle.dumps(shared.place)))
    like = batch_of(0)
    wanted = [Wanted(array.dtype, array.shape) for array in like]
    made = [Batch(*batch_arrays(wanted)) for _ in range(3)]
    assert [batch.waveform.flags.owndata for batch in made] == [False, False, True]  # two slots, then memory
    for seed, batch in enumerate(made):
        for array, value in zip(batch, batch_of(seed), strict=True):
            array[...] = value
    first, second, third = (place.map(batch) for batch in made)
    assert third is made[2] and (first.slot, second.slot) == (2, 3)
    assert_same(shared.take(second), batch_of(1))
    again = Batch(*batch_arrays(wanted))  # in the slot that is free, whichever that is
    assert place.map(again).slot == second.slot
    assert_same(shared.take(first), batch_of(0))
    large = [Wanted(np.float32, (1 << 20,)), *wanted[1:]]
    assert batch_arrays(large)[0].flags.owndata
    be_worker(0)
    assert batch_arrays(wanted)[0].flags.owndata


def test_workers_have_slots_of_their_own_and_large_batches_go_another_way(shared):
    slots = []
    for number in (0, 1):
        be_worker(number)
        place = pickle.loads(pickle.dumps(shared.place))
        slots += [place.map(batch_of(seed)).slot for seed in (0, 1)]
        large = batch_of(2, rows=3)
        assert place.map(large) is large
    assert len(set(slots)) == 4


def test_a_closed_file_is_not_taken_for_another(tmp_path):
    memory = SharedBatches(workers=1, slots=1, slot_bytes=bytes_of(batch_of(0)))
    place = pickle.loads(pickle.dumps(memory.place))
    memory.close()
    other = tmp_path / "checkpoint"
    other.write_bytes(bytes(1 << 20))
    with open(other, "rb+") as file:
        assert place.path.endswith(f"/{file.fileno()}")  # the number is given again
        batch = batch_of(1)
        assert place.map(batch) is batch
    assert other.read_bytes() == bytes(1 << 20)


def test_nothing_is_left_behind():
    before = os.listdir("/proc/self/fd")
    SharedBatches(workers=1, slots=1, slot_bytes=64).close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
