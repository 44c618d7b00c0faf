"""The units of a stage, measured: evenness, language, and phones where alignments exist. A table, and a file beside."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.audio import AUDIO_SUFFIXES
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.manifest import Manifest, Split
from data_pipelines.units import UnitStore
from experiments.stage_files import write_json
from experiments.units import UnitFiles
from wavlab_jax.evaluation.unit_quality import (
    NO_PHONE,
    Information,
    PhoneQuality,
    Phones,
    UnitQualityError,
    information,
    joint_counts,
    phone_of_frame,
    phone_quality,
    read_phones,
)
from wavlab_jax.targets.kmeans import usage

TOLERANCE = 0.02  # s: a frame; alignments may end so much before or after the audio that they belong to


def measure_units(name: str, *, workdir: Path, corpus: Path, alignments: Path | None = None) -> dict:
    """Quality of the unit set `name`, as `units/NAME.quality.json` holds it; see `table` for what is in it.

    `alignments` is a folder that has `<clip>.phn` for clips of the corpus (a clip's name without its audio suffix);
    utterances without, or with one that does not fit their length, are counted and left out of what concerns phones.
    Raises UnitsError, UnitQualityError (an alignment that cannot be read; no frame with a phone).
    """
    files, manifest = UnitFiles(workdir, name), Manifest.load(corpus)
    store = UnitStore.load(files.store, manifest)
    present = np.unique(manifest.language)
    rows = {manifest.languages[code]: np.flatnonzero(manifest.language == code) for code in present}
    joint = np.stack([store.counts(of) for of in rows.values()])
    held_out = np.flatnonzero(np.asarray(manifest.split) != Split.TRAIN)
    result = {
        "unit_set": name,
        "units": store.units,
        "all": _usage(joint.sum(axis=0)),
        "train": _usage(store.counts(manifest.rows(Split.TRAIN))),
        "held_out": _usage(store.counts(held_out)),
        "language_information": _information(information(joint)),
        "languages": {
            language: _usage(counts) | {"share": float(counts.sum() / joint.sum())}
            for language, counts in zip(rows, joint, strict=True)
        },
    }
    if alignments is not None:
        result["phones"] = _phones(store, manifest, rows, Path(alignments))
    write_json(files.quality, result)
    return result


def _usage(counts: np.ndarray) -> dict | None:
    return {"frames": int(counts.sum()), **usage(counts)._asdict()} if counts.sum() else None


def _information(found: Information) -> dict:
    return found._asdict()


def _phone_row(found: PhoneQuality) -> dict:
    return {**found._asdict(), "information": _information(found.information)}


def _phones(store: UnitStore, manifest: Manifest, rows: dict[str, np.ndarray], folder: Path) -> dict:
    """Phone quality of all frames together, where a phone is its name in any language, and by language."""
    names: dict[str, int] = {}
    total, by_language = np.zeros((0, store.units), np.int64), {}
    aligned, left_out = 0, []
    with tqdm(total=len(manifest), desc="phones", unit="utterance", dynamic_ncols=True, mininterval=1.0) as bar:
        for language, utterances in rows.items():
            joint = np.zeros_like(total)
            for i in utterances.tolist():
                bar.update()
                phones = utterance_phones(manifest, i, folder)
                if phones is None:
                    left_out.append(i)
                    continue
                aligned += 1
                codes = np.array([names.setdefault(phone, len(names)) for phone in phones.name], np.int64)
                units = store.read(i)
                place = phone_of_frame(phones, len(units))
                spoken = np.append(codes, NO_PHONE)[place]  # NO_PHONE is the last one's place
                joint = _grown(joint, len(names))
                present = np.unique(spoken[spoken >= 0])
                within = np.where(spoken >= 0, np.searchsorted(present, spoken), NO_PHONE)
                joint[present] += joint_counts(within, units, shape=(len(present), store.units))
            total = _grown(total, len(names)) + _grown(joint, len(names))
            by_language[language] = _phone_row(phone_quality(joint)) if joint.any() else None
    if not total.any():
        expected = folder / alignment_name(manifest.clip_names(0)[0])
        raise UnitQualityError(
            f"{folder} has no alignment that fits an utterance of the corpus (the first one's would be {expected}; "
            f"{aligned} fit but name no phone, {len(left_out)} are not there or of another length)"
        )
    found = {"aligned": aligned, "left_out": len(left_out), "languages": by_language}
    return found | {"all": _phone_row(phone_quality(total))}


def _grown(counts: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([counts, np.zeros((rows - len(counts), counts.shape[1]), counts.dtype)])


def alignment_name(clip: str) -> Path:
    """Where a clip's alignment lies, below their folder."""
    path = Path(clip)
    return path.with_suffix(".phn") if path.suffix.lower() in AUDIO_SUFFIXES else Path(f"{clip}.phn")


class _Clip(NamedTuple):
    phones: Phones
    seconds: float


def utterance_phones(manifest: Manifest, i: int, folder: Path) -> Phones | None:
    """The phones of an utterance, its clips' one after another; None if one has none, or if lengths do not fit.

    A clip is as long as its alignment says: of several clips the manifest knows only the sum, which must agree.
    """
    clips = []
    for name in manifest.clip_names(i):
        path = folder / alignment_name(name)
        if not path.exists():
            return None
        phones = read_phones(path)
        clips.append(_Clip(phones, float(phones.end[-1]) if len(phones.end) else 0.0))
    starts = np.cumsum([0.0] + [clip.seconds for clip in clips])
    over = starts[-1] - manifest.samples[i] / SAMPLE_RATE
    if over > TOLERANCE or (len(clips) > 1 and over < -TOLERANCE):
        return None
    return Phones(
        np.concatenate([clip.phones.start + start for clip, start in zip(clips, starts[:-1], strict=True)]),
        np.concatenate([clip.phones.end + start for clip, start in zip(clips, starts[:-1], strict=True)]),
        tuple(phone for clip in clips for phone in clip.phones.name),
    )


def table(result: dict) -> str:
    """What `measure_units` returned, as text: a line a language, then all together, then what is shared."""
    phones = result.get("phones")
    head = f"{'':<9} {'frames':>12} {'share':>7} {'entropy':>8} {'perplexity':>11} {'unused':>7}"
    lines = [head + (f" {'phones':>7} {'PNMI':>6} {'phone purity':>13} {'cluster purity':>15}" if phones else "")]
    total = result["all"]["frames"]
    rows = dict(result["languages"]) | {"train": result["train"], "held out": result["held_out"], "all": result["all"]}
    for name, row in rows.items():
        if row is None:
            lines.append(f"{name:<9} {'nothing':>12}")
            continue
        line = (
            f"{name:<9} {row['frames']:>12,} {row['frames'] / total:>7.3f} {row['entropy_bits']:>8.2f} "
            f"{row['perplexity']:>11.1f} {row['dead']:>7,}"
        )
        found = phones and (phones["all"] if name == "all" else phones["languages"].get(name))
        if found:
            line += (
                f" {found['phones']:>7,} {found['information']['normalized']:>6.3f} {found['phone_purity']:>13.3f} "
                f"{found['cluster_purity']:>15.3f}"
            )
        lines.append(line)
    of = result["language_information"]
    lines.append(
        f"\nunits and languages share {of['corrected_bits']:.3f} bits ({of['corrected_normalized']:.1%} of what there "
        f"is to know of the language; {of['bits']:.3f} as counted, before Miller and Madow's correction)"
    )
    if phones:
        lines.append(
            f"phones: {phones['aligned']:,} utterances with alignments, {phones['left_out']:,} without, or of another "
            f"length; PNMI {phones['all']['information']['corrected_normalized']:.3f} after the same correction"
        )
    return "\n".join(lines)
