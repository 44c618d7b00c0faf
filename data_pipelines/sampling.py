"""Which utterance is drawn when, and which crop of it: balance by language and corpus, without any state.

The r-th row of the k-th step is a pure function of (corpus, configuration, seed, k, r). Utterances lie in leaves: one
leaf holds what one language and one corpus have for one static length. Three maps lead from a row number to a crop:

1. `Quotas` deals row numbers to leaves, in periods of `ROW_PERIOD` of which each leaf gets its quota, and numbers the
   draws of each leaf 0, 1, 2, ... without a gap.
2. Inside a leaf, `permute` shuffles every epoch anew: no crop comes twice in an epoch, none is left out.
3. `moving_start` says where the crop begins in that epoch.

They are worked out for a whole period at once, and the last few periods are remembered: a row then costs a look-up.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.balance import DrawConfig, SamplingError, leaf_shares
from data_pipelines.batch import NO_UTTERANCE, SAMPLE_RATE
from data_pipelines.crops import COVERING_EPOCHS, check_lengths, moving_start
from data_pipelines.manifest import Manifest, Split
from data_pipelines.permutations import hash64, mix64, permute
from data_pipelines.plan import load_plan
from data_pipelines.quotas import QUOTA_LAG, Quotas, remember

ORDER_VERSION = 2  # of the rules in this file and those it calls; another one draws other data from the same seed
ROW_PERIOD = 4096  # rows of one static length, of which every leaf gets its quota
STEP_PERIOD = 256  # steps, of which every static length gets its quota
PARTNER_TRIES = 8  # draws for another utterance before one is picked from all the others


class Step(NamedTuple):
    """What step k takes: rows `first_row`, `first_row` + 1, ... of static length number `length`."""

    length: int
    first_row: int


class Drawn(NamedTuple):
    """Drawn rows: int64 [rows] each, or one number each.

    `utterance`: row of the manifest. `epoch`: how often its leaf was gone through before. `slot`: an utterance of n
    times the static length has n slots, and comes n times in an epoch. `start`: first sample of the crop.
    """

    utterance: np.ndarray
    epoch: np.ndarray
    slot: np.ndarray
    start: np.ndarray


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


class _Length(NamedTuple):
    """The leaves of one static length: arrays are [leaves], but `ends` [utterances of this length]."""

    quotas: Quotas
    order: np.ndarray  # [utterances of this length] rows of the manifest
    ends: np.ndarray | None  # running sum of slots; None where every utterance has one
    first_slot: np.ndarray  # slots before each leaf; where there are no `ends`, utterances
    slots: np.ndarray
    seeds: np.ndarray
    pairs: np.ndarray
    partner_seed: np.uint64
    remembered: dict
    remembered_partners: dict


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
        plan = load_plan(manifest, lengths=self.lengths, cfg=cfg, split=split)
        self._samples = manifest.samples
        self._names = [(manifest.languages[language], manifest.corpora[corpus]) for language, corpus in plan.pairs]
        self._pair_seconds = plan.pair_samples / SAMPLE_RATE
        slot_samples = plan.leaf_slots * np.asarray(self.lengths)[plan.leaf_class]
        pair_slots = np.bincount(plan.leaf_pair, weights=slot_samples)
        shares = leaf_shares(
            dict(zip(self._names, self._pair_seconds.tolist(), strict=True)),
            cfg=cfg,
            utterances=dict(zip(self._names, plan.pair_utterances.tolist(), strict=True)),
        )
        drawn = np.array([shares[name] for name in self._names])
        if cfg.counted == "utterances":  # of rows: in seconds, a pair of longer rows gets more
            drawn *= pair_slots / np.bincount(plan.leaf_pair, weights=plan.leaf_slots)
            drawn /= drawn.sum()
        self._pair_shares = drawn
        # Share of the drawn seconds that each leaf gets: its pair's, split over lengths by the seconds of the slots.
        weights = np.maximum(drawn[plan.leaf_pair] * slot_samples / pair_slots[plan.leaf_pair], np.finfo(float).tiny)

        self._of_length: list[_Length | None] = [None] * len(self.lengths)
        for place, length in enumerate(self.lengths):
            inside = np.flatnonzero(plan.leaf_class == place)
            if not len(inside):
                continue  # no utterance fills this length and no longer one: no step has it
            slots = plan.leaf_slots[inside]
            if slots.sum() < self.rows[place]:
                raise SamplingError(
                    f"a step of length {length} ({length / SAMPLE_RATE:g} s) takes {self.rows[place]} rows, but only "
                    f"{slots.sum()} crops of that length are in the {Split(split).name} split: lower "
                    "seconds_per_step, leave that length out, or add audio"
                )
            names = ["\0".join(self._names[pair]).encode() for pair in plan.leaf_pair[inside]]
            self._of_length[place] = _Length(
                quotas=Quotas(weights[inside], period=ROW_PERIOD, seed=hash64(seed, zlib.crc32(b"rows"), length)),
                order=plan.order[plan.classes[place] : plan.classes[place + 1]],
                ends=plan.ends_of(place),
                first_slot=np.cumsum(slots) - slots,
                slots=slots,
                # Seeded by name: another corpus beside it does not reorder what this one gives.
                seeds=np.array([hash64(seed, zlib.crc32(name), length) for name in names], np.uint64),
                pairs=plan.leaf_pair[inside],
                partner_seed=np.uint64(hash64(seed, zlib.crc32(b"partners"), length)),
                remembered={},
                remembered_partners={},
            )
        step_samples = np.asarray(self.rows) * np.asarray(self.lengths)
        # Steps differ by under a percent in seconds (whole rows): the lengths' shares of steps make up for it.
        steps = np.bincount(plan.leaf_class, weights=weights, minlength=len(self.lengths)) / step_samples
        self.length_shares = tuple((steps / steps.sum()).tolist())  # share of the steps that have each length
        self.seconds_per_step = float(np.dot(self.length_shares, step_samples)) / SAMPLE_RATE  # on average
        self._step_lengths = np.flatnonzero(steps).tolist()
        step_seed = hash64(seed, zlib.crc32(b"steps"))
        self._step_quotas = Quotas(steps[self._step_lengths], period=STEP_PERIOD, seed=step_seed)

    def __reduce__(self):  # a worker builds its own from the mapped manifest and plan; nothing large is sent
        return _rebuild, (self._arguments,)

    def step(self, k: int) -> Step:
        """The static length of step k, as an index into `lengths`, and the first of its rows for `take`."""
        period, place = divmod(int(k), STEP_PERIOD)
        dealt = self._step_quotas.dealt(period)
        length = self._step_lengths[dealt.leaf[place]]
        return Step(length, int(dealt.index[place]) * self.rows[length])

    def take(self, length: int, first: int, count: int) -> Drawn:
        """Rows `first` .. `first + count - 1` ever drawn of static length number `length`: arrays [count].

        Raises SamplingError if no utterance has that length.
        """
        if self._of_length[length] is None:
            raise SamplingError(f"no utterance has static length {self.lengths[length]}")
        pieces, end = [], first + count
        while first < end:
            period, begin = divmod(first, ROW_PERIOD)
            stop = min(ROW_PERIOD, begin + end - first)
            drawn = self._of_length[length].remembered.get(period) or self._period(length, period)
            pieces.append(Drawn(*(each[begin:stop] for each in drawn)))
            first += stop - begin
        return pieces[0] if len(pieces) == 1 else Drawn(*(np.concatenate(each) for each in zip(*pieces, strict=True)))

    def draw(self, length: int, row: int) -> Drawn:
        """The `row`-th row ever drawn of static length number `length`, as `take` finds it, in plain numbers."""
        return Drawn(*(int(each[0]) for each in self.take(length, row, 1)))

    def _period(self, length: int, period: int) -> Drawn:
        """All rows of one period [ROW_PERIOD]."""
        of = self._of_length[length]
        leaf, index = of.quotas.dealt(period)
        epoch, position = np.divmod(index, of.slots[leaf])
        seeds = of.seeds[leaf]
        place = permute(position, size=of.slots[leaf], seed=mix64(seeds, epoch))
        at, slot = self._utterance_at(of, place + of.first_slot[leaf])
        utterance = of.order[at].astype(np.int64)
        start = moving_start(
            self._samples[utterance],
            length=self.lengths[length],
            epoch=epoch,
            slot=slot,
            seed=mix64(~seeds, place - slot),  # the utterance's own: its first slot's place in the leaf
        )
        return remember(of.remembered, period, Drawn(utterance, epoch, slot, start))

    @staticmethod
    def _utterance_at(of: _Length, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For slots, numbered through the length: places in its order, and the slot of the utterance there."""
        if of.ends is None:
            return numbers, np.zeros_like(numbers)
        at = np.searchsorted(of.ends, numbers, side="right")
        return at, numbers - np.where(at, of.ends[at - 1], 0)

    def partners(self, length: int, first: int, count: int, *, voice: int = 0) -> np.ndarray:
        """int64 [count]: for each of these rows another utterance, of that static length and as likely as in `take`.

        `voice` numbers several of one row. `NO_UTTERANCE` where nothing else has this length. Raises SamplingError if
        no utterance has that length.
        """
        drawn = self.take(length, first, count).utterance
        here = self._of_length[length]
        if len(here.order) == 1:
            return np.full(count, NO_UTTERANCE, np.int64)
        seeds = mix64(mix64(here.partner_seed, np.arange(first, first + count)), voice)
        found, open_rows = np.empty(count, np.int64), np.arange(count)
        parts = np.uint64(here.quotas.upper[-1])
        for attempt in range(PARTNER_TRIES):
            leaf_bits, slot_bits = mix64(seeds[open_rows], 2 * attempt), mix64(seeds[open_rows], 2 * attempt + 1)
            leaf = here.quotas.upper.searchsorted((leaf_bits % parts).astype(np.int64), side="right")
            number = here.first_slot[leaf] + (slot_bits % here.slots[leaf].astype(np.uint64)).astype(np.int64)
            found[open_rows] = here.order[self._utterance_at(here, number)[0]]
            open_rows = open_rows[found[open_rows] == drawn[open_rows]]
            if not len(open_rows):
                return found
        for row in open_rows.tolist():  # its utterance makes up nearly all that is drawn of this length
            others = here.order[here.order != drawn[row]]
            found[row] = others[int(seeds[row]) % len(others)]
        return found

    def partner(self, length: int, row: int, *, voice: int = 0) -> int | None:
        """The partner of one row, as `partners` finds it; None if there is none."""
        key = (row // ROW_PERIOD, voice)
        memory = self._of_length[length].remembered_partners
        whole = memory.get(key)
        if whole is None:
            whole = remember(memory, key, self.partners(length, key[0] * ROW_PERIOD, ROW_PERIOD, voice=voice))
        found = int(whole[row % ROW_PERIOD])
        return None if found == NO_UTTERANCE else found

    def shares(self, *, steps: int = 0) -> list[Share]:
        """Hours, shares and epochs after `steps` steps, by language and corpus, in the order of their names."""
        total, drawn_seconds = self._pair_seconds.sum(), steps * self.seconds_per_step
        return [
            Share(*name, float(seconds) / 3600, float(seconds / total), share, float(share * drawn_seconds / seconds))
            for name, seconds, share in zip(self._names, self._pair_seconds, self._pair_shares.tolist(), strict=True)
        ]

    def steps_to_hear_all(self) -> dict[str, int]:
        """{language: steps after which every second of it was drawn}: after `COVERING_EPOCHS` of its slowest leaf.

        A bound, up to the end of a period (see `crops.moving_start` for what "every second" is).
        """
        needed: dict[str, int] = {}
        for place, share in enumerate(self.length_shares):
            here = self._of_length[place]
            if here is None:
                continue
            draws = COVERING_EPOCHS * here.slots + QUOTA_LAG
            rows = np.ceil(draws / (here.quotas.shares * ROW_PERIOD)) * ROW_PERIOD
            each = np.ceil((rows / self.rows[place] + QUOTA_LAG) / (share * STEP_PERIOD)).astype(np.int64) * STEP_PERIOD
            for pair, steps in zip(here.pairs.tolist(), each.tolist(), strict=True):
                language = self._names[pair][0]
                needed[language] = max(steps, needed.get(language, 0))
        return needed


def _rebuild(arguments: dict) -> Draw:
    return Draw(**arguments)
