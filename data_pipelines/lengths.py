"""Which static lengths suit a corpus, and what cutting and padding would waste of it.

An utterance is cropped to the largest static length that it fills, once for each time it holds that length; what is
over is not heard in that epoch (it is in another one: `crops.moving_start`). Few lengths, and much is cropped off;
many, and every one is a program to compile. `propose` finds the best of a given number, exactly.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.batch import HOP, RECEPTIVE_FIELD, SAMPLE_RATE
from data_pipelines.crops import check_lengths
from data_pipelines.manifest import Manifest, Split

FAIRSEQ_TOKENS, FAIRSEQ_LONGEST = 1_400_000, 250_000  # samples a GPU and of a row: HuBERT Base's pretraining yaml


class LengthsError(ValueError):
    """Lengths that cannot be proposed as asked; the message says what to change."""


class Proposal(NamedTuple):
    """`lengths` in samples, ascending; `rows` of a step of each; `cropped`, the share of the audio (of
    each utterance, as much as the longest row holds) that crops of these lengths leave off."""

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    cropped: float


class Waste(NamedTuple):
    """Shares of what is computed or held, in one epoch; see `waste`."""

    unheard: float
    padded: float
    padded_sorted: float
    cropped: float
    cropped_sorted: float


def candidates(*, seconds_per_step: float, shortest: int, longest: int) -> np.ndarray:
    """int64: lengths of `shortest` .. `longest` samples of which whole rows make a step: seconds_per_step / rows.

    They are rounded down to the grid of frames where a step then keeps its seconds to within half a percent.
    """
    total = seconds_per_step * SAMPLE_RATE
    rows = np.arange(max(1, int(np.ceil(total / longest))), int(total / shortest) + 1)
    exact = (total / rows).astype(np.int64)
    rounded = exact // HOP * HOP
    lengths = np.unique(np.where(rounded * rows >= 0.995 * total, rounded, exact))
    return lengths[(lengths >= max(shortest, RECEPTIVE_FIELD)) & (lengths <= longest)]


def propose(samples: np.ndarray, *, count: int, seconds_per_step: float, longest: int, at_most: int = 400) -> Proposal:
    """The `count` lengths (or fewer) whose crops leave least off utterances of `samples` [utterances].

    An utterance loses what it is longer than the largest length that it fills; one above `longest` counts as that long
    (it is cropped several times an epoch). The smallest length is the largest candidate that the shortest utterance
    fills: every utterance must fill one. By dynamic programming over `candidates`, exact among them (among `at_most` of
    them, spread evenly, where there are more).
    Raises LengthsError: no utterances, or no candidate that the shortest one fills.
    """
    samples = np.asarray(samples, np.int64)
    if not len(samples) or count < 1:
        raise LengthsError("lengths are chosen for at least one utterance, and at least one length")
    least = int(samples.min())
    shortest = max(RECEPTIVE_FIELD, min(least, longest) // 2)
    choice = candidates(seconds_per_step=seconds_per_step, shortest=shortest, longest=longest)
    choice = choice[max(0, int(np.searchsorted(choice, least, side="right")) - 1) :]
    if not len(choice) or choice[0] > least:
        raise LengthsError(
            f"the shortest utterance has {least} samples ({least / SAMPLE_RATE:g} s), and no step of "
            f"{seconds_per_step:g} s is made of rows that short: prepare with a larger --min-seconds, or give a larger "
            "--seconds-per-step"
        )
    if len(choice) > at_most:
        choice = choice[np.unique(np.linspace(0, len(choice) - 1, at_most).astype(np.int64))]
    values, counts = np.unique(np.minimum(samples, longest), return_counts=True)
    # Sums over the utterances below each candidate, and over all: how many, and how many samples.
    edges = np.append(np.searchsorted(values, choice), len(values))
    many = np.concatenate([[0], np.cumsum(counts)])[edges].astype(np.float64)
    held = np.concatenate([[0], np.cumsum(values * counts)])[edges].astype(np.float64)
    # off[a, b]: cropped off where `choice[a]` is a length and `choice[b]` the next one (the last column: none above)
    off = (held[None, :] - held[:-1, None]) - choice[:, None] * (many[None, :] - many[:-1, None])
    off[np.tril_indices(len(choice), m=len(choice) + 1)] = np.inf
    least_off = [np.full(len(choice), np.inf)]  # [last length]: what n lengths that end with it leave off below it
    least_off[0][0] = 0.0
    came = []
    for _ in range(count - 1):
        through = least_off[-1][:, None] + off[:, :-1]
        came.append(through.argmin(0))
        least_off.append(through.min(0))
    totals = [each + off[:, -1] for each in least_off]
    used = int(np.argmin([each.min() for each in totals]))
    chosen = [int(totals[used].argmin())]
    for before in reversed(came[:used]):
        chosen.append(int(before[chosen[-1]]))
    lengths = tuple(int(choice[place]) for place in reversed(chosen))
    rows = tuple(round(seconds_per_step * SAMPLE_RATE / length) for length in lengths)
    return Proposal(lengths, rows, float(totals[used].min() / held[-1]))


def waste(
    samples: np.ndarray, *, lengths: Sequence[int], tokens: int = FAIRSEQ_TOKENS, longest: int = FAIRSEQ_LONGEST
) -> Waste:
    """What one epoch wastes of utterances of `samples` [utterances], five ways.

    - unheard: share of the audio that no crop of an epoch holds, with static `lengths`; nothing is padded.
    - padded: share of the samples that are computed and are padding, when batches of `tokens` samples are padded to
      their longest; utterances in random order. What exceeds `longest` is cropped off first (and not counted).
      padded_sorted: the same with batches of neighbours in length.
    - cropped: share of the audio that is cropped off when batches are cut to their shortest (fairseq, `pad_audio:
      false`), in random order; cropped_sorted: with batches of neighbours in length, as fairseq's sampler makes them.
    """
    samples = np.asarray(samples, np.int64)
    lengths = np.asarray(check_lengths(lengths))
    found = lengths[np.maximum(np.searchsorted(lengths, samples, side="right") - 1, 0)]
    heard = np.where(samples >= found, samples // found * found, 0).sum()
    shuffled = np.random.default_rng(0).permutation(samples)
    shares = []
    for order in (shuffled, np.sort(samples)):
        held, real, kept = 0, 0, 0
        cut = np.minimum(order, longest)
        for batch in _batches(cut, tokens):
            held += int(batch.max()) * len(batch)
            real += int(batch.sum())
            kept += int(batch.min()) * len(batch)
        shares.append((1 - real / held, 1 - kept / float(samples.sum())))
    (padded, cropped), (padded_sorted, cropped_sorted) = shares
    return Waste(1 - float(heard) / float(samples.sum()), padded, padded_sorted, cropped, cropped_sorted)


def _batches(samples: np.ndarray, tokens: int):
    """Neighbours, as many as rows x longest <= tokens allows, as fairseq's `batch_by_size` takes them."""
    first, longest = 0, 0
    for place, one in enumerate(samples.tolist()):
        longest = max(longest, one)
        if place > first and longest * (place - first + 1) > tokens:
            yield samples[first:place]
            first, longest = place, one
    yield samples[first:]


def report(manifest: Manifest, proposal: Proposal, *, split: Split = Split.TRAIN) -> str:
    """A table by language: hours, and `waste` in percent, the largest language first."""
    rows = manifest.rows(split)
    language = manifest.language[rows]
    lines = [
        f"{'language':<10} {'hours':>10} {'unheard':>8} {'padded':>8} {'(sorted)':>8} {'cropped':>8} {'(sorted)':>8}",
    ]
    seconds = np.bincount(language, weights=manifest.samples[rows], minlength=len(manifest.languages)) / SAMPLE_RATE
    for place in np.argsort(-seconds, kind="stable"):
        if seconds[place]:
            wasted = waste(manifest.samples[rows[language == place]], lengths=proposal.lengths)
            cells = " ".join(f"{share:>8.2%}" for share in wasted)
            lines.append(f"{manifest.languages[place]:<10} {seconds[place] / 3600:>10,.3f} {cells}")
    return "\n".join(lines)


def declaration(proposal: Proposal, *, seconds_per_step: float) -> str:
    """What the stage declares, as flags of its command line."""
    lengths = " ".join(map(str, proposal.lengths))
    return f"--data.lengths {lengths} --data.seconds-per-step {seconds_per_step:g}"
