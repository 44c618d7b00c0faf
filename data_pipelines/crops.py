"""Static lengths: which one an utterance fills, where it is cropped this time, and how a held-out clip is cut up.

A training row is always one utterance cropped to the largest static length that it fills, so nothing is padded. Crops
start on the 320-sample grid of the frames: the units of a crop are then a slice of the units of the utterance, exact to
the sample, and no label ever belongs to half a frame.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.batch import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames


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
