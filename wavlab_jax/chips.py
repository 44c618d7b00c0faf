"""What devices can do."""

from typing import NamedTuple


class Chip(NamedTuple):
    """`peak_flops`: bfloat16 operations a second of one device."""

    peak_flops: float


def chip_of(device) -> Chip | None:
    """What is known of a device; None if nothing is."""
    return None
