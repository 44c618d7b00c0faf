"""What is probed while a stage trains: how often, and which clips, the same ones each time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.manifest import Manifest, Split
from experiments.unit_quality import alignment_name, utterance_phones
from wavlab_jax.evaluation.intervals import GROUPS
from wavlab_jax.evaluation.unit_quality import UnitQualityError

SEED = 0  # of the order in which clips of a group are taken
LOOKED_AT = 20  # times as many utterances as are wanted, at most, are looked at for alignments


class ProbesError(ValueError):
    """Probes that cannot be made as asked; the message names the field and what to give."""


@dataclass(frozen=True)
class ProbesConfig:
    """Probes of the parameters while they are trained: masked accuracy by language, language across sources, phones.

    Attributes:
        every: steps between two probes. One comes before the first step and one after the last, too; 0: no probes.
        clips: held-out utterances on which masked accuracy is judged, as evenly over languages as they are there.
        language_clips: utterances that the language probe learns from and is tested on, together, as evenly over
            (language, source, split) as they are there.
        layer: whose hidden states languages and phones are read off; None: the middle one.
        alignments: a folder of .phn files as `quality --alignments` takes it; None: no phones are probed.
        phone_clips: utterances with alignments that units are fitted on, and as many held-out ones that are judged.
        phone_units: of that k-means.
    """

    every: int = 0
    clips: int = 256
    language_clips: int = 1024
    layer: int | None = None
    alignments: str | None = None
    phone_clips: int = 128
    phone_units: int = 100

    def __post_init__(self):
        for name, least in (
            ("every", 0),
            ("clips", 1),
            ("language_clips", 1),
            ("phone_clips", GROUPS),
            ("phone_units", 2),
        ):
            if getattr(self, name) < least:
                raise ProbesError(f"probes.{name} is {getattr(self, name)}; it must be at least {least}")


def spread(groups: np.ndarray, limit: int) -> np.ndarray:
    """Places of at most `limit` of the members of `groups` int [members], ascending: as many of each as there are.

    Every group gives one before any gives two, and so on; which of its members come first is drawn once, from `SEED`.
    """
    drawn = np.random.default_rng(SEED).permutation(len(groups))
    inside = drawn[np.argsort(groups[drawn], kind="stable")]  # group by group, in the drawn order
    _, first = np.unique(groups[inside], return_index=True)
    turn = np.arange(len(groups)) - np.repeat(first, np.diff([*first, len(groups)]))
    return np.sort(inside[np.argsort(turn, kind="stable")[:limit]])


def masked_rows(manifest: Manifest, cfg: ProbesConfig) -> np.ndarray:
    """Held-out utterances on which masked accuracy is judged; none where nothing is held out."""
    rows = np.flatnonzero(np.asarray(manifest.split) != Split.TRAIN)
    return rows[spread(manifest.language[rows], cfg.clips)]


def language_rows(manifest: Manifest, cfg: ProbesConfig) -> np.ndarray:
    """Utterances that the language probe hears. Raises language_probe.ProbeError where there is nothing to ask."""
    # brings scikit-learn: a second that the command line need not wait
    from wavlab_jax.evaluation import language_probe

    training = np.asarray(manifest.split) == Split.TRAIN
    cell = (manifest.language.astype(np.int64) * len(manifest.corpora) + manifest.corpus) * 2 + training
    # whether an utterance takes part follows from its cell: one of each is asked
    _, example, cell = np.unique(cell, return_index=True, return_inverse=True)
    rows = np.flatnonzero(language_probe.taking_part(**labels_of(manifest, example))[cell])
    rows = rows[spread(cell[rows], cfg.language_clips)]
    return rows[language_probe.taking_part(**labels_of(manifest, rows))]


def labels_of(manifest: Manifest, rows: np.ndarray) -> dict:
    """What the language probe must know of these utterances."""
    return {
        "languages": np.asarray(manifest.languages)[manifest.language[rows]],
        "sources": np.asarray(manifest.corpora)[manifest.corpus[rows]],
        "train": np.asarray(manifest.split)[rows] == Split.TRAIN,
    }


def aligned_rows(manifest: Manifest, cfg: ProbesConfig, *, training: bool) -> np.ndarray:
    """At most `cfg.phone_clips` utterances of the training split, or of the others, that have alignments.

    Raises UnitQualityError where fewer than `GROUPS` of those looked at have one: no interval could be given.
    """
    folder = Path(cfg.alignments)
    rows = np.flatnonzero((np.asarray(manifest.split) == Split.TRAIN) == training)
    rows = rows[spread(manifest.language[rows], LOOKED_AT * cfg.phone_clips)]
    found = np.array([i for i in rows.tolist() if utterance_phones(manifest, i, folder) is not None], np.int64)
    found = found[spread(manifest.language[found], cfg.phone_clips)]
    if len(found) < GROUPS:
        side = "training" if training else "held-out"
        names = [f"; the first one's would be {folder / alignment_name(manifest.clip_names(i)[0])}" for i in rows[:1]]
        raise UnitQualityError(
            f"probes.alignments {folder}: of {len(rows):,} {side} utterances that were looked at, {len(found)} have an "
            f"alignment that fits; at least {GROUPS} must{''.join(names)}"
        )
    return found


def check_alignments(manifest: Manifest, cfg: ProbesConfig) -> None:
    """Before any long work: raises UnitQualityError where phones are to be probed and cannot be."""
    if cfg.every and cfg.alignments is not None:
        for training in (True, False):
            aligned_rows(manifest, cfg, training=training)
