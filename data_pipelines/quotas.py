"""Who gets the numbers 0, 1, 2, ...: dealt to leaves in periods, each within one draw of its quota, without any state.

Leaves lie side by side on a line; leaf i takes the stretch from `upper[i - 1]` to `upper[i]`, as long as its quota: its
share of the `period` numbers of a period. In period t the line is laid u_t to the right (0 <= u_t < 1), and a leaf gets
as many numbers as whole numbers lie under its stretch: its quota rounded down or up, never anything else, and all
leaves together exactly `period`. (Systematic sampling: Madow 1949.) u_t moves on by the golden ratio from period to
period, the rotation that spreads most evenly: a quota of 0.3 is rounded up three times in ten, and what a leaf was
given since the start stays within a few draws of its share for ever. How much that was is a sum of floors of a line,
found in O(log t) by the steps of Euclid's algorithm, so that any period can be looked at first.

Inside a period the numbers are shuffled. Rows are dealt to hosts in a fixed pattern, and without the shuffle the order
of the leaves would meet that pattern (two equal leaves, two hosts: each host would hear one leaf only).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.permutations import hash64, permute

# Everything is in whole parts of 1 / CYCLE of a draw; two neighbours of Fibonacci's, so STEP / CYCLE is the golden
# ratio as nearly as can be. After CYCLE periods every leaf had its quota times CYCLE, exactly.
CYCLE, STEP = 102_334_155, 63_245_986
QUOTA_LAG = 6  # draws by which a leaf may be behind its share, or before it, at the end of any period (measured: 3)
REMEMBERED = 16  # periods kept after use: neighbours are asked for together


class QuotaError(ValueError):
    """Weights that nothing can be dealt by."""


class Dealt(NamedTuple):
    """One period [period]: the leaf that each number goes to, and the how-manyth of that leaf it is (0, 1, 2, ...)."""

    leaf: np.ndarray
    index: np.ndarray


class Quotas:
    """Deals 0, 1, 2, ... to leaves by their weights, `period` numbers at a time.

    Of every period [t * period, (t + 1) * period) a leaf gets its quota, weight / sum(weights) * period, rounded down
    or up. Every leaf's draws are numbered 0, 1, 2, ... without a gap; those of one period are consecutive.

    Attributes:
        period: numbers in a period. upper: int64 [leaves], ends of the stretches, in parts of 1 / CYCLE of a draw.

    Raises QuotaError: no weights, one that is not positive and finite, a period out of 1 .. 2^30.
    """

    def __init__(self, weights: Sequence[float], *, period: int, seed: int = 0):
        weights = np.asarray(weights, np.float64)
        if weights.ndim != 1 or not len(weights):
            raise QuotaError("nothing to deal to: give at least one weight")
        wrong = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
        if len(wrong):
            raise QuotaError(f"weight {weights[wrong[0]]} of leaf {wrong[0]} is not positive and finite")
        if not 1 <= period <= 1 << 30:
            raise QuotaError(f"a period of {period} numbers; it must be 1 to 2^30")
        parts = period * CYCLE
        stretch = np.maximum(1, np.rint(weights / math.fsum(weights.tolist()) * parts)).astype(np.int64)
        stretch[np.argmax(stretch)] += parts - int(stretch.sum())  # rounding: a few parts of 10^8 of one draw
        self.period, self.seed, self.upper = int(period), seed, np.cumsum(stretch)
        self._phase = hash64(seed) % CYCLE
        self._remembered: dict[int, Dealt] = {}

    def __len__(self) -> int:
        return len(self.upper)

    @property
    def shares(self) -> np.ndarray:
        """float64 [leaves]: share of the numbers that each leaf gets in the long run."""
        return np.diff(self.upper, prepend=0) / (self.period * CYCLE)

    def given(self, t: int) -> np.ndarray:
        """int64 [leaves]: how many numbers each leaf was given in the first t periods."""
        whole, part = np.divmod(self.upper, CYCLE)
        cycles, rest = divmod(t, CYCLE)
        # How often u_s + part reached 1: floors of two lines, one `part` above the other.
        carried = _sum_of_floors(rest, STEP, self._phase + part) - _sum_of_floors(rest, STEP, self._phase + 0 * part)
        return np.diff(t * whole + cycles * part + carried, prepend=0)

    def dealt(self, t: int) -> Dealt:
        """Period t: where the numbers t * period .. (t + 1) * period - 1 go."""
        found = self._remembered.get(t)
        if found is not None:
            return found
        u = (self._phase + t % CYCLE * STEP) % CYCLE
        ends = (self.upper + u) // CYCLE
        seats = permute(np.arange(self.period), size=self.period, seed=hash64(self.seed, t))
        leaf = np.searchsorted(ends, seats, side="right")
        begins = np.concatenate([[0], ends[:-1]])
        found = Dealt(leaf, self.given(t)[leaf] + seats - begins[leaf])
        return remember(self._remembered, t, found)


def remember(memory: dict, key, value):
    """Puts `value` into a small memory of what was computed lately, and returns it. Threads may share the memory."""
    while len(memory) >= REMEMBERED:
        oldest = next(iter(tuple(memory)), None)
        memory.pop(oldest, None)
    memory[key] = value
    return value


def _sum_of_floors(n: int, slope: int, offset: np.ndarray) -> np.ndarray:
    """int64 [leaves]: the sum over s < n of floor((slope * s + offset) / CYCLE), n <= CYCLE.

    The lattice points under a line, counted by exchanging the axes again and again (as in AtCoder's `floor_sum`).
    """
    total = np.zeros_like(offset)
    count, bottom, top = np.full_like(offset, n), CYCLE, slope
    while True:
        total += count * (count - 1) // 2 * (top // bottom) + count * (offset // bottom)
        top, offset = top % bottom, offset % bottom
        height = top * count + offset
        count, offset = height // bottom, height % bottom
        if not count.any():
            return total
        bottom, top = top, bottom
