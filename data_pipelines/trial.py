"""Some training batches made for real, and what of each language was in them beside what the draw declares."""

import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import DataConfig, LoadBatch, train_batches
from data_pipelines.sampling import Draw


class LanguageTrial(NamedTuple):
    """One language: `hours` to draw from, its share as `declared` and as `drawn`, `epochs` heard, `utterances` met."""

    language: str
    hours: float
    declared: float
    drawn: float
    epochs: float
    utterances: int


class Trial(NamedTuple):
    """`languages` by hours, `audio_hours` in the batches, `seconds` that making them took, and their draw."""

    languages: tuple[LanguageTrial, ...]
    audio_hours: float
    seconds: float
    draw: Draw


def try_steps(cfg: DataConfig, manifest: Manifest, *, steps: int, progress: bool = True) -> Trial:
    """Makes batches 0 .. steps-1 (audio decoded, mixed, without units) and counts their seconds by language.

    Raises what `train_batches` raises for a configuration that this corpus cannot serve.
    """
    samples, met = np.zeros(len(manifest.languages), np.int64), [set() for _ in manifest.languages]
    draw = LoadBatch(cfg, manifest, ()).draw
    with train_batches(cfg, manifest, ()) as batches:
        begin = time.perf_counter()
        for _ in tqdm(range(steps), unit="step", disable=not progress):
            batch = next(batches)
            np.add.at(samples, batch.language, batch.samples)
            for language, utterance in zip(batch.language.tolist(), batch.utterance.tolist(), strict=True):
                met[language].add(utterance)
        seconds = time.perf_counter() - begin
    hours, declared = {}, {}
    for share in draw.shares():
        hours[share.language] = hours.get(share.language, 0.0) + share.hours
        declared[share.language] = declared.get(share.language, 0.0) + share.drawn
    total = max(1, int(samples.sum()))
    found = [
        LanguageTrial(
            language=name,
            hours=hours[name],
            declared=declared[name],
            drawn=int(samples[code]) / total,
            epochs=int(samples[code]) / SAMPLE_RATE / 3600 / hours[name],
            utterances=len(met[code]),
        )
        for code, name in enumerate(manifest.languages)
        if name in hours
    ]
    found.sort(key=lambda row: -row.hours)
    return Trial(tuple(found), int(samples.sum()) / SAMPLE_RATE / 3600, seconds, draw)
