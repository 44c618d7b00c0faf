"""Which utterance is drawn when: balance by language and corpus, declared in seconds, without any state.

The r-th row of the k-th step is a pure function of (corpus, configuration, seed, k, r). Utterances lie in leaves: one
leaf holds what one language and one corpus have for one static length. Three maps lead from a row number to a crop:

1. `permute_blocks` shuffles the row numbers inside blocks. Row numbers are dealt to hosts in a fixed pattern, and
   without this step the pattern of the tree below would meet that pattern (two equal leaves, two hosts: each host would
   hear one leaf only). What a whole block holds does not change.
2. `SplitTree` sends each number to a leaf, in exact proportion to integer weights, and numbers the draws of each leaf
   0, 1, 2, ... without a gap.
3. Inside a leaf, `permute` shuffles every epoch anew: no crop comes twice before all came once.

Everything is integer arithmetic of this file: the order of the data does not change when a library does. (Grain's
`index_shuffle` was measured first: it walks a domain of 2^16 whatever the size, 6 ms a number for three utterances.)
"""

import heapq
import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.balance import DrawConfig, SamplingError, declared_rows, leaf_shares
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.crops import check_lengths, length_class
from data_pipelines.manifest import Manifest, Split

ROW_BLOCK = 4096  # rows shuffled among themselves
STEP_BLOCK = 256  # steps whose lengths are shuffled among themselves
FEISTEL_ROUNDS = 6  # of two halves each; with 3, some orders of 5 or 6 things come twice as often as others
WEIGHT_BITS = 52  # shares become integers of about this size: what float64 can tell apart
PARTNER_TRIES = 8  # draws for another utterance before one is picked from all the others
_WORD = (1 << 64) - 1


def hash64(*values: int) -> int:
    """64 well-mixed bits of some integers: SplitMix64's finaliser (Steele, Lea and Flood 2014) folded over them."""
    state = 0
    for value in values:
        state = (state ^ value & _WORD) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state


def permute(index: int, *, size: int, seed: int) -> int:
    """Where `index` goes in a pseudo-random permutation of 0 .. size-1; constant time, no memory.

    A Feistel network over pairs (left < a, right < b) with a * b >= size, applied again while the result lies outside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). a * b exceeds size by less than a, so that it
    hardly ever needs a second round trip.
    """
    a = math.isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)
    while True:
        left, right = divmod(index, b)
        key = seed
        for _ in range(FEISTEL_ROUNDS):
            key = key + 0x9E3779B97F4A7C15 & _WORD
            left = (left + _round(right, key)) % a
            right = (right + _round(left, ~key & _WORD)) % b
        index = left * b + right
        if index < size:
            return index


def _round(half: int, key: int) -> int:
    mixed = ((half ^ key) + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & _WORD
    mixed = (mixed ^ mixed >> 31) * 0x94D049BB133111EB & _WORD
    return mixed >> 24


def permute_blocks(index: int, *, block: int, seed: int) -> int:
    """Shuffles the numbers inside each block of `block` consecutive numbers, every block in its own way."""
    number, inside = divmod(index, block)
    return number * block + permute(inside, size=block, seed=hash64(seed, number))


class Located(NamedTuple):
    """The draw of a `SplitTree`: which leaf, and the how-manyth draw of that leaf it is (0, 1, 2, ...)."""

    leaf: int
    index: int


class SplitTree:
    """Deals the numbers 0, 1, 2, ... to leaves in proportion to their weights, exactly, without state.

    A Huffman tree of two-way integer splits: at a node of weight w whose left child weighs l, number k goes left iff
    (k+1)*l // w > k*l // w; it is then number k*l // w there, or k - k*l // w on the right. Hence every leaf's numbers
    come out in order and without gap, and of the first k numbers a leaf of depth d has received its expectation to
    within d. The expected depth is within one of the entropy of the weights, whatever their number.

    `weights` are integers, taken as they are, or floats, rounded to `WEIGHT_BITS` bits (at least 1). Raises
    SamplingError for none, or for one that is not positive and finite.
    """

    def __init__(self, weights: Sequence[int | float]):
        weights = [w.item() if isinstance(w, np.generic) else w for w in weights]
        if not weights:
            raise SamplingError("a tree needs at least one weight")
        for leaf, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight > 0):
                raise SamplingError(f"weight {weight} of leaf {leaf} is not positive and finite")
        if not all(isinstance(w, int) for w in weights):
            scale = 2.0**WEIGHT_BITS / math.fsum(weights)
            weights = [max(1, round(w * scale)) for w in weights]
        self.leaves = len(weights)
        self._splits = []  # (weight of the left child, own weight, left child, right child); node n is entry n - leaves
        heap = [(weight, node) for node, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            right, left = heapq.heappop(heap), heapq.heappop(heap)
            self._splits.append((left[0], left[0] + right[0], left[1], right[1]))
            heapq.heappush(heap, (left[0] + right[0], self.leaves + len(self._splits) - 1))

    def locate(self, k: int) -> Located:
        """The leaf that receives number k >= 0, and its number there."""
        leaves, splits = self.leaves, self._splits
        node = leaves + len(splits) - 1
        while node >= leaves:
            left_weight, weight, left, right = splits[node - leaves]
            before, rest = divmod(k * left_weight, weight)
            if rest + left_weight >= weight:  # (k+1)*l // w > k*l // w
                node, k = left, before
            else:
                node, k = right, k - before
        return Located(node, k)

    def depth(self) -> int:
        """Number of splits above the deepest leaf."""
        depths = [0] * (self.leaves + len(self._splits))
        for place in reversed(range(len(self._splits))):
            for child in self._splits[place][2:]:
                depths[child] = depths[self.leaves + place] + 1
        return max(depths[: self.leaves])


class Step(NamedTuple):
    """What step k takes: rows `first_row`, `first_row` + 1, ... of static length number `length`."""

    length: int
    first_row: int


class Drawn(NamedTuple):
    """One drawn row: a row of the manifest, how often its leaf was gone through before, and which share of it this is.

    An utterance of n times the static length has n slots, and comes n times in an epoch.
    """

    utterance: int
    epoch: int
    slot: int


class Share(NamedTuple):
    """What one language gets from one corpus.

    `hours` of audio in the split, their share as found (`natural`), the share of what is drawn (`drawn`), and how often
    the audio is heard in the given number of steps (`epochs`).
    """

    language: str
    corpus: str
    hours: float
    natural: float
    drawn: float
    epochs: float


class _Leaf(NamedTuple):
    first: int  # position of its first utterance in the draw's order
    utterances: int
    slots: int
    ends: np.ndarray | None  # [utterances] running sum of slots; None where every utterance has one
    seed: int


class Draw:
    """The stateless draw of one split of a corpus.

    The drawn seconds are shared out as `leaf_shares` says. Inside a language and corpus, every static length gets its
    part of the slots' seconds; steps of one static length come as often as its seconds ask for.

    Args:
        manifest: the corpus.
        lengths: static lengths in samples, ascending. rows: rows of a step of each.
        cfg: exponents and corpora. split: what may be drawn. seed: orders everything.

    Raises SamplingError: an empty split, or a length with fewer crops than a step has rows. Raises CropError: an
    utterance shorter than the smallest length.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        lengths: Sequence[int],
        rows: Sequence[int],
        cfg: DrawConfig,
        split: Split = Split.TRAIN,
        seed: int = 0,
    ):
        self._arguments = dict(manifest=manifest, lengths=lengths, rows=rows, cfg=cfg, split=split, seed=seed)
        self.lengths, self.rows = check_lengths(lengths), tuple(int(n) for n in rows)
        if len(self.rows) != len(self.lengths) or min(self.rows) < 1:
            raise SamplingError(f"rows {self.rows} must be positive, one for each of the lengths {self.lengths}")
        utterances = declared_rows(manifest, split, cfg.corpora)
        if not len(utterances):
            of = f" of {', '.join(cfg.corpora)}" if cfg.corpora else ""
            raise SamplingError(f"the manifest has no {Split(split).name} utterances{of} to draw from")
        samples = manifest.samples[utterances]
        classes = length_class(samples, lengths=self.lengths, describe=lambda i: manifest.describe(utterances[i]))
        pairs = manifest.language[utterances].astype(np.int64) * len(manifest.corpora) + manifest.corpus[utterances]
        key = classes * (len(manifest.languages) * len(manifest.corpora)) + pairs
        order = np.argsort(key, kind="stable")
        slots = samples[order] // np.asarray(self.lengths)[classes[order]]
        self._order = utterances[order]

        self._pairs, inverse = np.unique(pairs, return_inverse=True)
        self._pair_seconds = np.bincount(inverse, weights=samples) / SAMPLE_RATE
        self._names = [
            (manifest.languages[pair // len(manifest.corpora)], manifest.corpora[pair % len(manifest.corpora)])
            for pair in self._pairs.tolist()
        ]
        shares = leaf_shares(dict(zip(self._names, self._pair_seconds.tolist(), strict=True)), cfg=cfg)
        self._pair_shares = [shares[name] for name in self._names]

        keys, firsts, counts = np.unique(key[order], return_index=True, return_counts=True)
        leaf_class, leaf_pair = np.divmod(keys, len(manifest.languages) * len(manifest.corpora))
        pair_number = np.searchsorted(self._pairs, leaf_pair)
        leaf_slots = np.add.reduceat(slots, firsts)
        slot_samples = leaf_slots * np.asarray(self.lengths)[leaf_class]
        # Share of the drawn seconds that each leaf gets: its pair's, split over lengths by the seconds of the slots.
        weights = np.asarray(self._pair_shares)[pair_number] * slot_samples
        weights /= np.bincount(pair_number, weights=slot_samples)[pair_number]

        self._leaves: list[list[_Leaf]] = [[] for _ in self.lengths]
        self._trees: list[SplitTree | None] = [None] * len(self.lengths)
        self._row_seeds = [hash64(seed, zlib.crc32(b"rows"), length) for length in self.lengths]
        for number, (first, count) in enumerate(zip(firsts.tolist(), counts.tolist(), strict=True)):
            length = self.lengths[leaf_class[number]]
            total = int(leaf_slots[number])
            ends = None if total == count else np.cumsum(slots[first : first + count])
            # Seeded by name: another corpus beside it does not reorder what this one gives.
            name = "\0".join(self._names[pair_number[number]]).encode()
            leaf = _Leaf(first, count, total, ends, hash64(seed, zlib.crc32(name), length))
            self._leaves[leaf_class[number]].append(leaf)
        for place, length in enumerate(self.lengths):
            inside = leaf_class == place
            if not inside.any():
                continue  # no utterance fills this length and no longer one: no step has it
            self._trees[place] = SplitTree(np.maximum(weights[inside], np.finfo(float).tiny).tolist())
            if leaf_slots[inside].sum() < self.rows[place]:
                raise SamplingError(
                    f"a step of length {length} ({length / SAMPLE_RATE:g} s) takes {self.rows[place]} rows, but only "
                    f"{leaf_slots[inside].sum()} crops of that length are in the {Split(split).name} split: lower "
                    "seconds_per_step, leave that length out, or add audio"
                )
        step_samples = np.asarray(self.rows) * np.asarray(self.lengths)
        # Steps differ by under a percent in seconds (whole rows): the lengths' shares of steps make up for it.
        steps = np.bincount(leaf_class, weights=weights, minlength=len(self.lengths)) / step_samples
        self.length_shares = tuple((steps / steps.sum()).tolist())  # share of the steps that have each length
        self.seconds_per_step = float(np.dot(self.length_shares, step_samples)) / SAMPLE_RATE  # on average
        self._step_lengths = np.flatnonzero(steps).tolist()
        self._step_tree = SplitTree(steps[self._step_lengths].tolist())
        self._step_seed = hash64(seed, zlib.crc32(b"steps"))

    def __reduce__(self):  # a worker builds its own from the mapped manifest; nothing large is sent
        return _rebuild, (self._arguments,)

    def step(self, k: int) -> Step:
        """The static length of step k, as an index into `lengths`, and the first of its rows for `draw`."""
        located = self._step_tree.locate(permute_blocks(k, block=STEP_BLOCK, seed=self._step_seed))
        length = self._step_lengths[located.leaf]
        return Step(length, located.index * self.rows[length])

    def draw(self, length: int, row: int) -> Drawn:
        """The `row`-th row ever drawn of static length number `length`. Raises SamplingError if no utterance has it."""
        tree = self._trees[length]
        if tree is None:
            raise SamplingError(f"no utterance has static length {self.lengths[length]}")
        located = tree.locate(permute_blocks(row, block=ROW_BLOCK, seed=self._row_seeds[length]))
        leaf = self._leaves[length][located.leaf]
        epoch, position = divmod(located.index, leaf.slots)
        place = permute(position, size=leaf.slots, seed=hash64(leaf.seed, epoch))
        slot = 0
        if leaf.ends is not None:
            place, slot_place = int(leaf.ends.searchsorted(place, side="right")), place
            slot = slot_place - (int(leaf.ends[place - 1]) if place else 0)
        return Drawn(int(self._order[leaf.first + place]), epoch, slot)

    def partner(self, length: int, *, of: int, rng: np.random.Generator) -> int | None:
        """Another utterance than `of`, of static length number `length`, as likely as in `draw`; None if alone."""
        leaves = self._leaves[length]
        first, count = leaves[0].first, leaves[-1].first + leaves[-1].utterances - leaves[0].first
        if count == 1:
            return None
        for _ in range(PARTNER_TRIES):
            found = self.draw(length, int(rng.integers(1 << 40))).utterance
            if found != of:
                return found
        # `of` makes up nearly all that is drawn of this length.
        others = self._order[first : first + count]
        return int(others[others != of][rng.integers(count - 1)])

    def shares(self, *, steps: int = 0) -> list[Share]:
        """Hours, shares and epochs after `steps` steps, by language and corpus, in the order of their names."""
        total, drawn_seconds = self._pair_seconds.sum(), steps * self.seconds_per_step
        return [
            Share(*name, float(seconds) / 3600, float(seconds / total), share, float(share * drawn_seconds / seconds))
            for name, seconds, share in zip(self._names, self._pair_seconds, self._pair_shares, strict=True)
        ]


def _rebuild(arguments: dict) -> Draw:
    return Draw(**arguments)
