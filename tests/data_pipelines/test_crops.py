import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.batch import HOP, num_frames
from data_pipelines.crops import CropError, check_lengths, crop_start, length_class, windows

LENGTHS = (32_000, 64_000, 128_000)
static_lengths = st.lists(st.integers(400, 20_000), min_size=1, max_size=4, unique=True).map(sorted).map(tuple)


@given(st.lists(st.integers(32_000, 400_000), min_size=1, max_size=20))
def test_length_class_is_the_largest_that_is_filled(samples):
    found = length_class(np.array(samples), lengths=LENGTHS)
    for n, place in zip(samples, found, strict=True):
        assert LENGTHS[place] == max(length for length in LENGTHS if length <= n)
        assert length_class(n, lengths=LENGTHS) == place


def test_length_class_at_the_edges():
    samples = np.array([32_000, 63_999, 64_000, 127_999, 128_000])
    assert length_class(samples, lengths=LENGTHS).tolist() == [0, 0, 1, 1, 2]


def test_too_short_an_utterance_is_named_with_the_remedy():
    names = ["fra/x utterance a", "fra/x utterance b", "fra/x utterance c"]
    with pytest.raises(CropError, match=r"utterance b has 31999 samples.*2 of 3.*--min-seconds 2 "):
        length_class(np.array([40_000, 31_999, 100]), lengths=LENGTHS, describe=names.__getitem__)


@given(st.integers(400, 5000), st.integers(0, 5000), st.integers(0, 2**32))
def test_crops_start_on_the_grid_inside_and_take_whole_frames(length, more, seed):
    samples = length + more
    start = crop_start(samples, length=length, rng=np.random.default_rng(seed))
    assert start % HOP == 0
    assert 0 <= start and start + length <= samples
    # The units of the crop are a slice of the units of the utterance.
    assert start // HOP + num_frames(length) <= num_frames(samples)


def test_every_start_is_equally_likely():
    rng = np.random.default_rng(0)
    starts = [crop_start(16_000 + 9 * HOP + 319, length=16_000, rng=rng) for _ in range(10_000)]
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == [k * HOP for k in range(10)]
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_a_crop_that_does_not_fit_is_refused():
    with pytest.raises(CropError, match="16000 samples does not fit into 15999"):
        crop_start(15_999, length=16_000, rng=np.random.default_rng(0))


@given(st.integers(400, 200_000), static_lengths)
def test_windows_tile_the_frames_of_a_clip(samples, lengths):
    cut = windows(samples, lengths=lengths)
    seen = []
    for window in cut:
        assert window.start % HOP == 0
        assert window.length in lengths and window.samples <= window.length
        assert not any(window.samples <= shorter < window.length for shorter in lengths)
        assert window.start + window.samples <= samples
        first = window.start // HOP
        seen += range(first, first + num_frames(window.samples))
    assert seen == list(range(num_frames(samples)))


@given(static_lengths, st.data())
def test_a_clip_that_fits_is_one_window(lengths, data):
    samples = data.draw(st.integers(400, max(lengths)))
    (window,) = windows(samples, lengths=lengths)
    assert (window.start, window.samples) == (0, samples)


def test_a_clip_without_a_frame_is_refused():
    with pytest.raises(CropError, match="399 samples make no frame"):
        windows(399, lengths=LENGTHS)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((), "no static lengths"),
        ((64_000, 32_000), "ascend"),
        ((32_000, 32_000), "ascend"),
        ((399,), "holds no frame"),
        ((1600.5,), "whole numbers"),
    ],
)
def test_lengths_that_cannot_be_used(lengths, message):
    with pytest.raises(CropError, match=message):
        check_lengths(lengths)
