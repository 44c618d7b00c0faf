"""Lhotse's manifests, read without Lhotse: cuts, or recordings and supervisions, as .jsonl or .jsonl.gz."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.listing import Lister, Unusable, existing_folder, inside, needs_language, one_of, split_in

ENDS = 1e-3  # seconds by which a stretch may differ from the whole recording and be it


def read(
    folder: str | Path, *, manifests: str | None = None, language: str | None = None, split: str | None = None
) -> Listing:
    """Lists one clip a cut, or, where `manifests` has no cuts, one a supervision (a recording, if it has none).

    `folder` holds the audio, and paths are relative to it, or absolute and in it; `manifests` is a folder or one file
    (default: `folder`): *cuts*, else *recordings* with the *supervisions* of the same name. Language and speaker are
    the supervisions', else `language`. The split is `split`, else what the manifest's name speaks of, else
    dealt out.

    Mixed, padding and multi-channel cuts, augmented recordings and sources that are no files are rejected.

    Raises CorpusError: no manifest, not JSON lines, no language.
    """
    folder = existing_folder(folder)
    place = one_of(folder, manifests, what="manifests")
    paths = [place] if place.is_file() else sorted(p for p in place.iterdir() if re.search(r"\.jsonl(\.gz)?$", p.name))
    cuts = [path for path in paths if "cuts" in path.name]
    lister = Lister(folder)
    row = 0
    if not cuts and not any("recordings" in path.name for path in paths):
        raise CorpusError(f"{place} has neither *cuts*.jsonl(.gz) nor *recordings*.jsonl(.gz)")
    for path in cuts or [path for path in paths if "recordings" in path.name]:
        for cut in _lines(path) if cuts else _as_cuts(path):
            row += 1
            name = str(cut.get("id", ""))
            try:
                fields = _fields(folder, cut)
            except Unusable as error:
                lister.reject(name, row, str(error))
                continue
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                lister.reject(name, row, f"not what Lhotse writes: {type(error).__name__} {error}")
                continue
            fields["language"] = fields["language"] or language or ""
            if not fields["language"] and not len(lister):
                raise needs_language(path, ("language",))
            of = split or split_in(path.name.split(".")[0])
            lister.add(fields.pop("path"), row=row, id=name, split=of, **fields)
    return lister.listing(source=place)


def _lines(path: Path) -> Iterator[dict]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007
                if line.strip():
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise ValueError("not an object")
                    yield entry
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise CorpusError(f"{path}, after line {number}: {error}") from error


def _as_cuts(path: Path) -> Iterator[dict]:
    """The supervisions of a recordings manifest, each as the cut that Lhotse would trim to it."""
    beside = path.with_name(path.name.replace("recordings", "supervisions"))
    recordings = {recording["id"]: recording for recording in _lines(path)}
    if not beside.is_file():
        for name, recording in recordings.items():
            yield {"id": name, "start": 0, "duration": recording.get("duration"), "recording": recording}
        return
    for supervision in _lines(beside):
        yield {
            **{key: supervision.get(key) for key in ("id", "start", "duration", "channel")},
            "recording": recordings.get(supervision.get("recording_id")),
            "supervisions": [supervision],
        }


def _fields(folder: Path, cut: dict) -> dict:
    kind = cut.get("type", "MonoCut")
    if kind != "MonoCut":
        raise Unusable(f"a {kind}: only cuts of one channel are read")
    recording = cut.get("recording")
    if not recording:
        raise Unusable("no recording of that id")
    if recording.get("transforms"):
        raise Unusable("an augmented recording: give the manifest before augmentation")
    if len(recording["sources"]) != 1 or recording["sources"][0]["type"] != "file":
        raise Unusable(f"the audio is no file, but: {', '.join(s['type'] for s in recording['sources'])}")
    source = recording["sources"][0]
    if len(source["channels"]) > 1:
        raise Unusable(f"channel {cut.get('channel')} of {len(source['channels'])}: write channels to files first")
    path = inside(folder, source["source"])
    if path.startswith("/"):
        raise Unusable(f"outside of the corpus folder: give a folder that holds {path}")
    start, duration = float(cut["start"]), float(cut["duration"])
    whole = start < ENDS and duration > float(recording["duration"]) - ENDS
    supervisions = cut.get("supervisions") or []
    languages = {s.get("language") for s in supervisions} - {None}
    speakers = {s.get("speaker") for s in supervisions} - {None}
    if len(languages) > 1:
        raise Unusable(f"several languages in one cut: {', '.join(sorted(languages))}")
    return {
        "path": path,
        "language": languages.pop() if languages else "",
        "speaker": str(speakers.pop()) if len(speakers) == 1 else "",
        "text": " ".join(s["text"] for s in supervisions if s.get("text")),
        # At 16 kHz: Lhotse counts Opus at 48 kHz, libsndfile at the rate that went into it.
        "samples": round(recording["num_samples"] * SAMPLE_RATE / recording["sampling_rate"]) if whole else None,
        "start": 0.0 if whole else start,
        "end": None if whole else start + duration,
    }
