"""Probes of the parameters while they are trained, by the evaluators that judge a finished stage.

    masked     masked accuracy on held-out clips, by language              `evaluate.clip_judge`
    language   language across sources, of a layer's pooled hidden states  `evaluation.language_probe`
    phones     units that k-means makes of that layer, beside phones       `evaluation.unit_quality`

All on few clips, chosen once (`probe_clips`), each with its interval, its chance level, and what has changed since the
first probe, clip by clip: "better" or "worse" where the interval of the difference allows it, else "not
distinguishable". All processes run the encoder together; the first one alone fits, compares and keeps.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines.atomic import whole_file
from data_pipelines.batch import NO_UTTERANCE
from data_pipelines.manifest import Manifest
from experiments.evaluate import beginnings, clip_judge, layer_of, shared_rows
from experiments.hosts import is_first
from experiments.probe_clips import (
    ProbesConfig,
    aligned_rows,
    labels_of,
    language_rows,
    masked_rows,
)
from experiments.stage import StageConfig
from experiments.stage_files import StageFiles
from experiments.targets import Labels
from experiments.unit_quality import utterance_phones
from wavlab_jax.encoder import Encoder
from wavlab_jax.evaluation import intervals, language_probe, masked_accuracy
from wavlab_jax.evaluation.unit_quality import NO_PHONE, joint_counts, phone_of_frame, phone_quality
from wavlab_jax.model import Parameters, assemble
from wavlab_jax.targets import kmeans
from wavlab_jax.train import Probes

ROWS = 16  # utterances whose hidden states are computed at once, at least
KMEANS_PASSES = 30
BETTER, WORSE, UNCLEAR = "better", "worse", "not distinguishable"


class Judgement(NamedTuple):
    """What a part of a probe found: `line` for the file, and `kept`, by which a later one is compared clip by clip."""

    line: dict[str, Any]
    kept: dict[str, np.ndarray]


# Parameters, their encoder, and what the first probe kept (empty in the first one) -> what is found
Part = Callable[[Parameters, Encoder, Mapping[str, np.ndarray]], Judgement]


def make_probes(
    cfg: StageConfig, labels: Labels, manifest: Manifest, mesh: Mesh, *, at_start: bool, files: StageFiles
) -> Probes | None:
    """The probes that `cfg.probes` asks for, for `wavlab_jax.train`; None where it asks for none.

    Raises UnitQualityError where there are too few alignments.
    """
    if not cfg.probes.every:
        return None
    layer = cfg.learner.encoder.layers // 2 if cfg.probes.layer is None else cfg.probes.layer
    parts: dict[str, Part] = {
        "masked": _masked(cfg, labels, manifest, mesh),
        "language": _language(cfg.probes, layer, manifest, mesh),
    }
    if cfg.probes.alignments is not None:
        parts["phones"] = _phones(cfg.probes, layer, labels, manifest, mesh)
    asked = json.dumps({**asdict(cfg.probes), "every": None, "layer": layer})

    def judge(params: Parameters, step: int) -> dict[str, Any]:
        encoder = assemble(params, cfg.learner.encoder, cfg.learner.head).encoder
        first = _first_probe(files, asked=asked, before=step)
        found = {name: part(params, encoder, first) for name, part in parts.items()}
        if is_first() and not first:
            kept = {f"{name}_{key}": value for name, part in found.items() for key, value in part.kept.items()}
            with whole_file(files.first_probe) as temporary, open(temporary, "wb") as file:
                np.savez(file, step=step, asked=asked, **kept)
        lines = {name: part.line for name, part in found.items()}
        if is_first():
            tqdm.write(f"{cfg.name}, probe at step {step:,}: {said(lines)}")
        return lines

    return Probes(cfg.probes.every, at_start, judge)


def said(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """What a probe found, for the console: each number, its interval, and what needs no learning."""
    told = []
    for name, key in (("masked", "accuracy"), ("language", "accuracy"), ("phones", "purity")):
        line = lines.get(name, {})
        if key in line:
            title = "masked accuracy" if name == "masked" else f"{name} {key}"
            level = max(line.get(of) or 0.0 for of in ("chance", "majority", "copy"))
            told.append(
                f"{title} {line[key]:.3f} [{line['low']:.3f}, {line['high']:.3f}], without learning {level:.3f}"
            )
        elif line:
            told.append(f"{name}: {line['note']}")
    return "; ".join(told)


def _first_probe(files: StageFiles, *, asked: str, before: int) -> dict[str, np.ndarray]:
    """What the run's first probe kept; nothing where there is none before this step, or it asked something else."""
    if not (is_first() and files.first_probe.exists()):
        return {}
    with np.load(files.first_probe, allow_pickle=False) as kept:
        first = dict(kept)
    return first if first["step"] < before and first["asked"] == asked else {}


def _masked(cfg: StageConfig, labels: Labels, manifest: Manifest, mesh: Mesh) -> Part:
    rows = masked_rows(manifest, cfg.probes)
    if not len(rows):
        return _says("no held-out data")
    judge = clip_judge(cfg, labels, manifest, mesh, rows, title="probe: masked accuracy", leave=False)
    negatives = getattr(cfg.learner.objective, "negatives", None)

    def part(params, encoder, first) -> Judgement:
        scores = judge(params)
        if not is_first():
            return Judgement({}, {})
        found = masked_accuracy.macro_interval(scores)
        if found is None:
            return Judgement({"note": "no frame of the clips was hidden"}, {})
        languages = masked_accuracy.by_language(scores, manifest.languages)
        trivial = masked_accuracy.against_trivial(scores)
        line = {
            "accuracy": found.difference,
            "low": found.low,
            "high": found.high,
            "clips": found.clips,
            "frames": int(scores.frames.sum()),
            **{key: masked_accuracy.macro(languages)[key] for key in ("majority", "copy", "loss")},
            "chance": None if negatives is None else 1 / (negatives + 1),
            "against_trivial": trivial and _difference(trivial),
            "languages": {
                name: {key: row[key] for key in ("accuracy", "majority", "copy", "clips", "frames")}
                for name, row in languages.items()
                if row["frames"]
            },
        }
        kept = {"utterance": scores.utterance, "frames": scores.frames, "correct": scores.correct}
        before = {name: first.get(f"masked_{name}") for name in kept}
        if all(np.array_equal(before[name], kept[name]) for name in ("utterance", "frames")):
            since = masked_accuracy.compare(scores, scores._replace(correct=before["correct"]))
            line["since_first"] = _difference(since)
        return Judgement(line, kept)

    return part


def _language(cfg: ProbesConfig, layer: int, manifest: Manifest, mesh: Mesh) -> Part:
    try:
        rows = language_rows(manifest, cfg)
    except language_probe.ProbeError as error:
        return _says(str(error))
    labels, pooled = labels_of(manifest, rows), layer_of(mesh, layer=layer, reduce=language_probe.pooled)

    def part(params, encoder, first) -> Judgement:
        vectors = np.concatenate(_of_rows(pooled, encoder, rows, manifest, mesh, title="language"))
        if not is_first():
            return Judgement({}, {})
        try:
            found = language_probe.evaluate(vectors, **labels)
        except language_probe.ProbeError as error:  # hidden states that are not finite; the run goes on
            return Judgement({"note": str(error)}, {})
        line = {
            "accuracy": found.accuracy,
            "low": found.interval.low,
            "high": found.interval.high,
            "chance": found.chance,
            "clips": found.clips,
            "layer": layer,
            "folds": len(found.folds),
            "against_chance": _difference(found.against_chance),
            "languages": {each.language: {"accuracy": each.accuracy, "clips": each.clips} for each in found.languages},
        }
        kept = {"rows": rows[found.rows], "predicted": found.predicted}
        if np.array_equal(first.get("language_rows"), kept["rows"]):
            since = language_probe.compare(found, found._replace(predicted=first["language_predicted"]))
            line["since_first"] = _difference(since)
        return Judgement(line, kept)

    return part


def _phones(cfg: ProbesConfig, layer: int, labels: Labels, manifest: Manifest, mesh: Mesh) -> Part:
    fitted, judged = (aligned_rows(manifest, cfg, training=training) for training in (True, False))
    frames_of = layer_of(mesh, layer=layer, reduce=lambda hidden, valid: hidden)

    def frames(encoder: Encoder, rows: np.ndarray) -> list[np.ndarray]:
        return _of_rows(frames_of, encoder, rows, manifest, mesh, title="phones")

    def part(params, encoder, first) -> Judgement:
        training, held_out = frames(encoder, fitted), frames(encoder, judged)
        if not is_first():
            return Judgement({}, {})
        lengths = [len(values) for values in held_out]
        try:
            features = np.concatenate(training)
            centers = kmeans.fit(features, units=cfg.phone_units, seed=0, iterations=KMEANS_PASSES).centers
            units = kmeans.assign(centers, np.concatenate(held_out)).astype(np.int32)
        except kmeans.KMeansError as error:  # too few frames, or such as are not finite
            return Judgement({"note": str(error)}, {})
        spoken = _spoken(manifest, judged, lengths, Path(cfg.alignments))
        if (spoken == NO_PHONE).all():
            return Judgement({"note": "no frame of the clips has a phone"}, {})
        group = np.repeat(np.arange(len(judged)) % intervals.GROUPS, lengths)
        own = _purities(spoken, units, group)
        shuffled = _purities(spoken, np.random.default_rng(0).permutation(units), group)
        line = {
            **_interval_of(own),
            "chance": shuffled.purity,
            "against_chance": _compared(own, shuffled),
            "cluster_purity": own.cluster_purity,
            "pnmi": own.pnmi,
            "clips": len(judged),
            "frames": int((spoken != NO_PHONE).sum()),
            "phones": int(spoken.max()) + 1,
            "units": cfg.phone_units,
            "layer": layer,
        }
        if labels.stores:
            targets = [labels.stores[0].read(i)[:length] for i, length in zip(judged, lengths, strict=True)]
            of_targets = _purities(spoken, np.concatenate(targets).astype(np.int32), group)
            line["targets"] = {"purity": of_targets.purity, "pnmi": of_targets.pnmi, "units": labels.stores[0].units}
        before = first.get("phones_units")
        if before is not None and np.array_equal(first["phones_rows"], judged):
            line["since_first"] = _compared(own, _purities(spoken, before, group))
        return Judgement(line, {"rows": judged, "units": units})

    return part


def _of_rows(function, encoder: Encoder, rows: np.ndarray, manifest: Manifest, mesh: Mesh, *, title: str):
    """Of each of the utterances `rows`, in order: what `function` gives, [1, width], or its real frames of it."""
    found: dict[int, np.ndarray] = {}
    shown = {"title": f"probe: {title}", "leave": False}
    for batch, placed in beginnings(rows, manifest, mesh, rows_per_batch=shared_rows(ROWS, mesh), **shown):
        values = np.asarray(function(encoder, placed.waveform, placed.samples, placed.valid))
        for row, utterance in enumerate(batch.utterance.tolist()):
            if utterance != NO_UTTERANCE:
                found[utterance] = values[row][batch.valid[row]] if values.ndim == 3 else values[row : row + 1]
    return [found[row] for row in rows.tolist()]


def _spoken(manifest: Manifest, rows: np.ndarray, lengths: list[int], alignments: Path) -> np.ndarray:
    """The phone of each frame [frames] of these utterances, numbered over all of them; `NO_PHONE` where none is."""
    names: dict[str, int] = {}
    every = []
    for row, length in zip(rows.tolist(), lengths, strict=True):
        phones = utterance_phones(manifest, row, alignments)
        codes = np.array([names.setdefault(phone, len(names)) for phone in phones.name], np.int64)
        every.append(np.append(codes, NO_PHONE)[phone_of_frame(phones, length)])  # NO_PHONE is the last one's place
    return np.concatenate(every)


class Purities(NamedTuple):
    """Of units beside phones: phone purity, and `without` each group of clips [GROUPS]; corrected PNMI."""

    purity: float
    without: np.ndarray
    cluster_purity: float
    pnmi: float


def _purities(phones: np.ndarray, units: np.ndarray, group: np.ndarray) -> Purities:
    """Of frames [frames] with their clips' `group`; those without a phone do not count."""
    shape = (int(phones.max()) + 1, int(units.max()) + 1)
    each = [joint_counts(np.where(group == g, phones, NO_PHONE), units, shape=shape) for g in range(intervals.GROUPS)]
    joint = np.sum(each, axis=0)
    whole = phone_quality(joint)
    without = [phone_quality(joint - left).phone_purity if (joint - left).any() else np.nan for left in each]
    return Purities(whole.phone_purity, np.array(without), whole.cluster_purity, whole.information.corrected_normalized)


def _interval_of(found: Purities) -> dict[str, Any]:
    ends = intervals.jackknife(found.purity, found.without)
    return {"purity": found.purity, "low": max(ends.low, 0.0), "high": min(ends.high, 1.0)}


def _compared(found: Purities, other: Purities) -> dict[str, Any]:
    ends = intervals.jackknife(found.purity - other.purity, found.without - other.without)
    return {"difference": found.purity - other.purity, "low": ends.low, "high": ends.high, "verdict": _verdict(ends)}


def _difference(found: masked_accuracy.Difference | language_probe.Comparison) -> dict[str, Any]:
    ends = found.interval if isinstance(found, language_probe.Comparison) else found
    return {"difference": found.difference, "low": ends.low, "high": ends.high, "verdict": found.verdict}


def _verdict(ends: intervals.Interval) -> str:
    return BETTER if ends.low > 0 else WORSE if ends.high < 0 else UNCLEAR


def _says(note: str) -> Part:
    return lambda params, encoder, first: Judgement({"note": note}, {})
