"""Static lengths: which one an utterance fills, where it is cropped this time, and how a held-out clip is cut up.

A training row is always one utterance cropped to the largest static length that it fills, so nothing is padded. Crops
start on the 320-sample grid of the frames: the units of a crop are then a slice of the units of the utterance, exact to
the sample, and no label ever belongs to half a frame. They move from epoch to epoch, so that all of an utterance is
heard in `COVERING_EPOCHS` of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.batch import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames
from data_pipelines.permutations import mix64

COVERING_EPOCHS = 4  # in any so many epochs that follow one another, all of every utterance is heard


class CropError(ValueError):
    """Static lengths that cannot be used, or an utterance that does not fill any of them."""


class Window(NamedTuple):
    """One stretch of a held-out clip: `samples` samples from sample `start` on, padded to static length `length`."""

    start: int
    samples: int
    length: int


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The static lengths in samples, as a tuple. Raises CropError unless they ascend strictly and hold a frame each."""
    lengths = tuple(lengths)
    if not lengths:
        raise CropError("no static lengths: give at least one, in samples")
    if any(isinstance(length, bool) or int(length) != length for length in lengths):
        raise CropError(f"static lengths {lengths} must be whole numbers of samples")
    if any(later <= earlier for earlier, later in zip(lengths, lengths[1:], strict=False)):
        raise CropError(f"static lengths {lengths} must ascend, each one once")
    if lengths[0] < RECEPTIVE_FIELD:
        raise CropError(f"static length {lengths[0]} holds no frame: a frame sees {RECEPTIVE_FIELD} samples")
    return tuple(int(length) for length in lengths)


def length_class(samples, *, lengths: Sequence[int], describe: Callable[[int], str] = "utterance {}".format):
    """[utterances] index of the largest static length that each utterance fills; an int for one number of samples.

    `describe` names the utterance at a position, for the message. Raises CropError naming the first utterance that is
    shorter than the smallest static length.
    """
    samples = np.asarray(samples)
    found = np.searchsorted(np.asarray(lengths), samples, side="right") - 1
    short = np.flatnonzero(found < 0)
    if len(short):
        first = int(short[0])
        least = int(min(lengths))
        raise CropError(
            f"{describe(first)} has {int(samples.flat[first])} samples and does not fill the smallest static length, "
            f"{least} samples ({least / SAMPLE_RATE:g} s); {len(short)} of {samples.size} utterances are too short: "
            f"run prepare with --min-seconds {least / SAMPLE_RATE:g} or more, or add a smaller length"
        )
    return int(found) if found.ndim == 0 else found


def crop_start(samples: int, *, length: int, rng: np.random.Generator) -> int:
    """First sample of a crop of `length` samples: uniform over the multiples of `HOP` at which the crop fits.

    Frame t of the crop is then frame `start // HOP + t` of the utterance. Raises CropError if it does not fit at all.
    """
    if samples < length:
        raise CropError(f"a crop of {length} samples does not fit into {samples}")
    return int(rng.integers((samples - length) // HOP + 1)) * HOP


def moving_start(samples, *, length: int, epoch, slot, seed) -> np.ndarray:
    """[rows] int64 first samples of crops of `length` samples, multiples of `HOP`, that move from epoch to epoch.

    An utterance has `samples // length` slots, and is cropped once for each in an epoch; the crops of an epoch lie side
    by side. Of four epochs in a row, one has the first crop at the very beginning, one the last crop at the very end,
    and between those come two with everything moved by a random stretch (up to a whole crop; what then runs over the
    end is laid at the end). Which of the four an utterance begins with depends on its seed. Hence:

    - in any `COVERING_EPOCHS` epochs in a row every hop of the utterance lies in a crop, up to the last grid point at
      which one fits (at most 319 samples before its end);
    - and in any one epoch everything but less than a crop's length at the beginning, and what exceeds whole crops at
      the end, does.

    `samples`, `epoch`, `slot` and `seed` (64 bits, the utterance's own) are [rows]. Raises CropError for a crop that
    does not fit.
    """
    samples, epoch, slot = (np.asarray(each, np.int64) for each in (samples, epoch, slot))
    if (samples < length).any():
        raise CropError(f"a crop of {length} samples does not fit into {int(samples.min())}")
    last = (samples - length) // HOP  # the last start that fits, in hops, as everything here
    stride, slots = length // HOP, samples // length
    anchored = last - (slots - 1) * stride  # where the first crop starts when the last one ends at the end
    turn = (mix64(seed, 0) + epoch.astype(np.uint64)) % np.uint64(COVERING_EPOCHS)
    moved = mix64(seed, epoch + 1) % np.where(slots > 1, stride, last + 1).astype(np.uint64)
    offset = np.select([turn == 0, turn == 2], [0, anchored], moved.astype(np.int64))
    return np.minimum(offset + slot * stride, last) * HOP


def windows(samples: int, *, lengths: Sequence[int]) -> list[Window]:
    """Cuts a clip of `samples` samples into stretches that fit the static lengths and whose frames tile its frames.

    A clip that fits the largest static length is one window. A longer one is cut into windows of the largest length;
    each makes `num_frames(length)` frames, and the next one starts that many hops later (so neighbours share the
    samples between hop and receptive field), until every frame of the clip lies in exactly one window. Each window
    takes the smallest static length that holds it. Raises CropError for a clip without a single frame.
    """
    frames = num_frames(samples)
    if frames == 0:
        raise CropError(f"{samples} samples make no frame; a frame sees {RECEPTIVE_FIELD}")
    largest, cut = max(lengths), []
    start = 0
    while frames > 0:
        held = min(samples - start, largest)
        cut.append(Window(start, held, min(length for length in lengths if length >= held)))
        start += num_frames(held) * HOP
        frames -= num_frames(held)
    return cut
