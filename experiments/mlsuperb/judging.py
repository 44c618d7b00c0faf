"""Hypotheses of a trained downstream model: decoding, and the table of them beside the references."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from data_pipelines.atomic import whole_file
from data_pipelines.batch import NO_UTTERANCE, SAMPLE_RATE
from data_pipelines.mlsuperb.batches import track_batches
from data_pipelines.mlsuperb.layout import Part
from data_pipelines.mlsuperb.texts import SPACE
from data_pipelines.mlsuperb.tracks import Example, Track
from experiments.mlsuperb.scoring import Judged
from experiments.mlsuperb.training import Run, Trained
from wavlab_jax.downstream import greedy

COLUMNS = ("id", "language", "source", "group", "seconds", "tokens", "substitutions", "deletions", "insertions", "said",
           "reference", "hypothesis")  # fmt: skip


def decode(run: Run, trained: Trained, *, part: Part = "test") -> dict[str, str]:
    """By utterance, what the model writes: of each frame the best token, every utterance as if it were alone."""
    examples = run.track.parts[part]
    predict, said = run.steps().predict, {}
    with (
        track_batches(run.track, part, run.cfg.batches) as batches,
        tqdm(total=len(examples), desc=f"decode {part}", unit="utt", dynamic_ncols=True, mininterval=1.0) as bar,
    ):
        for batch in batches:
            found = jax.device_get(predict(trained.params, run.place(batch)))
            rows = [row for row, index in enumerate(batch.utterance) if index != NO_UTTERANCE]
            for row, tokens in zip(rows, greedy(found.best[rows], found.frames[rows]), strict=True):
                said[examples[batch.utterance[row]].utterance.id] = text_of(run.track, tokens)
            bar.update(len(rows))
    return said


def text_of(track: Track, tokens: Sequence[int]) -> str:
    """Classes as text: characters joined, <space> a space; phones and languages a space apart."""
    words = [track.tokens[token] for token in tokens]
    if track.token_kind != "character":
        return " ".join(words)
    return "".join(" " if word == SPACE else word for word in words)


def infeasible(examples: Sequence[Example], frames_of: Callable[[int], int]) -> list[str]:
    """Ids of the utterances whose tokens CTC cannot spell in the frames that they have, each alone.

    A token needs a frame, and another one between two that are the same. `frames_of`: samples -> frames of the head.
    """
    found = []
    for each in examples:
        repeats = sum(one == other for one, other in zip(each.tokens, each.tokens[1:], strict=False))
        if len(each.tokens) + repeats > frames_of(round(each.utterance.seconds * SAMPLE_RATE)):
            found.append(each.utterance.id)
    return found


def write_hypotheses(path: Path, judged: Sequence[Judged]) -> None:
    """A tab-separated line an utterance: `COLUMNS`; counts and `said` are empty where they were not asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("\t".join(COLUMNS) + "\n")
        for each in judged:
            utterance = each.example.utterance
            counts = ("",) * 4 if each.errors is None else each.errors
            row = (utterance.id, utterance.language, utterance.source, each.group, f"{utterance.seconds:.3f}", *counts,
                   each.said or "", each.example.text, each.hypothesis)  # fmt: skip
            file.write("\t".join(" ".join(str(value).split()) if value else str(value) for value in row) + "\n")
