"""How good units are, without a human: how evenly they are used, what they say of the language and of the phone.

All of it follows from counts of frames: `joint` [rows, units], where a row is a language or a phone. In float64.

Of phones z beside units y (HuBERT, arXiv:2106.07447, section IV; fairseq, examples/hubert/measure_teacher_quality.py):

    phone purity    sum_y max_z p(z, y)     frames right if every unit is read as its most frequent phone
    cluster purity  sum_z max_y p(z, y)     frames right if every phone is written as its most frequent unit
    PNMI            I(z; y) / H(z)          the share of the phone's entropy that the unit takes away

Phone purity and PNMI grow with the number of units by themselves (one unit a frame has both at 1), cluster purity
falls: compare unit sets of one size, on the same frames.

Entropies of counts are too small, by about (cells - 1) / (2 frames) nats, and the mutual information of the counts of
independent things is positive, therefore. Miller and Madow's correction (Miller 1955) adds that term to each entropy,
with the cells that occur. It takes frames for independent, and neighbours are not: where the correction is not small
beside the value, there are too few frames.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.batch import HOP, RECEPTIVE_FIELD, SAMPLE_RATE

NO_PHONE = -1  # of a frame that no phone covers


class UnitQualityError(ValueError):
    """Counts or an alignment that nothing can be measured by; names the file and line where there is one."""


class Entropy(NamedTuple):
    """Bits: of the shares as counted, and with Miller and Madow's correction."""

    bits: float
    corrected_bits: float


class Information(NamedTuple):
    """I(row; unit) in bits.

    Attributes:
        bits: of the shares as counted; never negative, too large by about (rows - 1)(units - 1) / (2 N ln 2).
        corrected_bits: from corrected entropies; about 0 where there is nothing to find, perhaps a little below.
        normalized: bits / H(row), the share of the row's entropy that the unit takes away: PNMI where rows are phones.
            0 where there is a single row.
        corrected_normalized: the same of the corrected values.
    """

    bits: float
    corrected_bits: float
    normalized: float
    corrected_normalized: float


class PhoneQuality(NamedTuple):
    """See the module. `frames` with a phone, `phones` that occur, and `information` whose `normalized` is PNMI."""

    frames: int
    phones: int
    phone_purity: float
    cluster_purity: float
    information: Information


class Phones(NamedTuple):
    """What a recording says: `start` and `end` of each phone, seconds, ascending, float64 [phones], and its `name`."""

    start: np.ndarray
    end: np.ndarray
    name: tuple[str, ...]


def entropy(counts: np.ndarray) -> Entropy:
    """Of counts of any shape. Raises UnitQualityError if they are negative, not finite, or all zero."""
    counts = _checked(np.asarray(counts, np.float64).ravel())
    counts = counts[counts > 0]
    total = counts.sum()
    bits = float(max(0.0, -np.sum(counts / total * np.log2(counts / total))))
    return Entropy(bits, bits + (len(counts) - 1) / (2.0 * total * np.log(2.0)))


def information(joint: np.ndarray) -> Information:
    """Of counts [rows, units]. Raises UnitQualityError as `entropy`."""
    joint = np.asarray(joint, np.float64)
    if joint.ndim != 2:
        raise UnitQualityError(f"counts have shape {list(joint.shape)}, expected [rows, units]")
    rows, units, both = entropy(joint.sum(axis=1)), entropy(joint.sum(axis=0)), entropy(joint)
    bits = max(0.0, rows.bits + units.bits - both.bits)
    corrected = rows.corrected_bits + units.corrected_bits - both.corrected_bits
    return Information(
        bits,
        corrected,
        bits / rows.bits if rows.bits else 0.0,
        corrected / rows.corrected_bits if rows.bits else 0.0,
    )


def phone_quality(joint: np.ndarray) -> PhoneQuality:
    """Purities and PNMI of counts [phones, units]. Raises UnitQualityError as `information`."""
    found = information(joint)
    joint = np.asarray(joint, np.float64)
    total = joint.sum()
    return PhoneQuality(
        frames=int(total),
        phones=int((joint.sum(axis=1) > 0).sum()),
        phone_purity=float(joint.max(axis=0).sum() / total),
        cluster_purity=float(joint.max(axis=1).sum() / total),
        information=found,
    )


def joint_counts(rows: np.ndarray, units: np.ndarray, *, shape: tuple[int, int]) -> np.ndarray:
    """int64 `shape` = [rows, units]: how often each pair occurs in two int arrays [frames], without negative rows."""
    rows, units = np.asarray(rows, np.int64), np.asarray(units, np.int64)
    real = rows >= 0
    return np.bincount(rows[real] * shape[1] + units[real], minlength=shape[0] * shape[1]).reshape(shape)


def read_phones(path: str | Path) -> Phones:
    """A `.phn` file: a line a phone, `start<TAB>end<TAB>phone`, in seconds, ascending, without overlap; UTF-8.

    Gaps are allowed, and phones that rounding has left without length. Raises UnitQualityError naming the line.
    """
    path, start, end, name = Path(path), [], [], []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UnitQualityError(f"{path} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        try:
            first, last, phone = float(fields[0]), float(fields[1]), fields[2]
        except (ValueError, IndexError):
            raise UnitQualityError(f"{path} line {number} is {line!r}, expected start, end and phone") from None
        if len(fields) != 3 or not phone or not (end[-1] if end else 0.0) <= first <= last < np.inf:
            raise UnitQualityError(
                f"{path} line {number} is {line!r}: a phone begins where the last one ended or later"
            )
        start.append(first), end.append(last), name.append(phone)
    return Phones(np.array(start, np.float64), np.array(end, np.float64), tuple(name))


def phone_of_frame(phones: Phones, frames: int) -> np.ndarray:
    """int64 [frames]: index into `phones` of the phone at the centre of each frame; `NO_PHONE` where there is none.

    Frame t hears samples 320 t to 320 t + 400; its centre is at 320 t + 200: 12.5 ms, 32.5 ms, ... A phone lasts from
    its start up to, not including, its end.
    """
    centre = (np.arange(frames) * HOP + RECEPTIVE_FIELD // 2) / SAMPLE_RATE
    if not len(phones.start):
        return np.full(frames, NO_PHONE)
    found = np.searchsorted(phones.start, centre, side="right") - 1
    inside = (found >= 0) & (centre < phones.end[found])
    return np.where(inside, found, NO_PHONE)


def _checked(counts: np.ndarray) -> np.ndarray:
    if not np.isfinite(counts).all() or (counts < 0).any() or not counts.sum() > 0:
        raise UnitQualityError("counts must be finite, not negative, and not all zero: no frames, no measure")
    return counts
