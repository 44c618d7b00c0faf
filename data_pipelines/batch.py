"""The contract between the data side and the device side: what a batch holds, and how samples become frames."""

from typing import NamedTuple

import numpy as np

SAMPLE_RATE = 16_000  # Hz, everywhere
HOP = 320  # samples between two frames: the product of the extractor's strides (5, 2, 2, 2, 2, 2, 2)
RECEPTIVE_FIELD = 400  # samples that one frame sees: 25 ms
NO_UNIT = -1  # the label of a frame that has none; such a frame is never scored
NO_UTTERANCE = -1  # the utterance of a filler row, and the partner of a row that was not mixed


def num_frames(samples):
    """Number of 20 ms frames that `samples` samples make: floor((samples - 400) / 320) + 1, and 0 under 400 samples.

    Works on integers and integer arrays. The extractor's convolutions (kernels 10,3,3,3,3,2,2; strides 5,2,2,2,2,2,2;
    no padding) give exactly this length, and 39-d MFCC at 100 Hz with snipped edges gives it when every second
    frame is kept.
    """
    frames = (np.asarray(samples) - RECEPTIVE_FIELD) // HOP + 1
    frames = np.maximum(frames, 0)
    return int(frames) if frames.ndim == 0 else frames


class Batch(NamedTuple):
    """Rows of one static length: `waveform` [rows, samples], `units` [rows, frames, sets], `valid` [rows, frames], the
    rest [rows].

    Attributes:
        waveform: float32, 16 kHz, roughly in [-1, 1]; what the encoder hears, interference mixed in.
        clean: float32, the same samples without interference, for targets that are computed in the step; [rows, 0]
            where nobody asked for them (`DataConfig.keep_clean`).
        units: int32 targets of each frame, one for each set of units, taken from the clean utterance; `NO_UNIT` where
            there is none. Sets that are computed in the step are missing until the step has put them in their places.
        valid: bool, True where a frame is real. All True in training (no padding); evaluation pads.
        samples: int32 number of real samples of each row, leading ones; `valid` holds the frames that they make.
        language: int32 index into the manifest's `languages`.
        utterance: int32 row of the manifest this row was cropped from; `NO_UTTERANCE` for a filler row.
        partner: int32 row of the manifest that was mixed in, of several speakers the first that can be heard;
            `NO_UTTERANCE` if none, or if noise was.
        start: int32 first sample of the crop inside the utterance; a multiple of `HOP`.
        seed: uint32, the row's own seed for what is drawn on the device (masks, dropout). A function of
            (configured seed, step, row) alone, so it does not depend on hosts, devices or workers.
    """

    waveform: np.ndarray
    clean: np.ndarray
    units: np.ndarray
    valid: np.ndarray
    samples: np.ndarray
    language: np.ndarray
    utterance: np.ndarray
    partner: np.ndarray
    start: np.ndarray
    seed: np.ndarray


class BatchError(ValueError):
    """A batch does not keep the contract of this module."""


def check_batch(batch: Batch) -> Batch:
    """The batch itself, if dtypes and shapes keep the contract. Raises BatchError naming the field that does not."""
    rows, samples = np.shape(batch.waveform)
    frames, sets = num_frames(samples), np.shape(batch.units)[-1]
    expected = {
        "waveform": (np.float32, (rows, samples)),
        "clean": (np.float32, (rows, samples if np.size(batch.clean) else 0)),
        "units": (np.int32, (rows, frames, sets)),
        "valid": (np.bool_, (rows, frames)),
        "samples": (np.int32, (rows,)),
        "language": (np.int32, (rows,)),
        "utterance": (np.int32, (rows,)),
        "partner": (np.int32, (rows,)),
        "start": (np.int32, (rows,)),
        "seed": (np.uint32, (rows,)),
    }
    for name, (dtype, shape) in expected.items():
        field = getattr(batch, name)
        if field.dtype != dtype or field.shape != shape:
            raise BatchError(
                f"batch.{name} is {field.dtype}{list(field.shape)}, expected {np.dtype(dtype)}{list(shape)}"
            )
    return batch
