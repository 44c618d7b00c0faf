import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.batch import HOP, RECEPTIVE_FIELD, Batch, BatchError, check_batch, num_frames

KERNELS_AND_STRIDES = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]  # HuBERT, wav2vec 2.0, WavLM


def frames_by_layers(samples: int) -> int:
    for kernel, stride in KERNELS_AND_STRIDES:
        samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
    return samples


def test_num_frames_is_what_the_seven_convolutions_make():
    samples = np.arange(0, 6000)
    assert num_frames(samples).tolist() == [frames_by_layers(int(n)) for n in samples]


@given(st.integers(0, 10**9))
def test_num_frames_of_one_number_is_an_int_and_agrees(samples):
    assert type(num_frames(samples)) is int
    assert num_frames(samples) == frames_by_layers(samples) == num_frames(np.array([samples]))[0]


def test_hop_and_receptive_field_are_those_of_the_convolutions():
    hop, field = 1, 1
    for kernel, stride in KERNELS_AND_STRIDES:
        field += (kernel - 1) * hop
        hop *= stride
    assert (hop, field) == (HOP, RECEPTIVE_FIELD)


def good_batch() -> Batch:
    return Batch(
        waveform=np.zeros((3, 1600), np.float32),
        clean=np.zeros((3, 1600), np.float32),
        units=np.zeros((3, 4, 2), np.int32),
        valid=np.ones((3, 4), np.bool_),
        samples=np.full(3, 1600, np.int32),
        language=np.zeros(3, np.int32),
        utterance=np.zeros(3, np.int32),
        partner=np.full(3, -1, np.int32),
        start=np.zeros(3, np.int32),
        seed=np.zeros(3, np.uint32),
    )


def test_a_good_batch_passes():
    batch = good_batch()
    assert check_batch(batch) is batch
    bare = batch._replace(clean=np.zeros((3, 0), np.float32), units=np.zeros((3, 4, 0), np.int32))
    assert check_batch(bare) is bare


@pytest.mark.parametrize("name", Batch._fields)
def test_wrong_dtype_is_named(name):
    batch = good_batch()
    wrong = batch._replace(**{name: getattr(batch, name).astype(np.float64)})
    with pytest.raises(BatchError, match=rf"batch\.{name} is float64"):
        check_batch(wrong)


@pytest.mark.parametrize("name", [name for name in Batch._fields if name != "waveform"])
def test_wrong_shape_is_named(name):
    batch = good_batch()
    wrong = batch._replace(**{name: getattr(batch, name)[:2]})
    with pytest.raises(BatchError, match=rf"batch\.{name} is .*, expected"):
        check_batch(wrong)
