"""Libri-Light: {small,medium,large,duplicate}/<speaker>/<book>/*.flac, each with a .json beside it.

Layout: Kahn et al., Libri-Light (2020), and data_preparation/README.md of github.com/facebookresearch/libri-light. The
.json has "speaker", "book_meta" and "voice_activity", a list of [start, end] in seconds. Recordings last up to hours;
the corpus's own cut_by_vad.py cuts them to about 60 s, by concatenation of the stretches with voice.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.collector import Collector, Span, audio_below, folders_in, wrong_layout
from data_pipelines.manifest import Split

SUBSETS = ("small", "medium", "large", "duplicate")
LAYOUT = "{small,medium,large}/<speaker>/<book>/*.flac with a .json each"


def read(
    folder: str | Path,
    *,
    subsets: Sequence[str] = SUBSETS[:3],
    clip_seconds: float = 60.0,
    pause_seconds: float = 1.0,
) -> Listing:
    """Lists the stretches with voice as clips, given the folder of the subsets, or one subset.

    Neighbouring stretches no more than `pause_seconds` apart make one clip, the pause included, up to `clip_seconds`
    (60, as cut_by_vad.py). A stretch that is longer by itself stays whole. The books that may be there twice
    ("duplicate") are left out unless `subsets` says so. All is for training: the corpus's held-out sets are those of
    LibriSpeech. Recordings without a .json, or with one that does not list voice in order, are rejected.

    Raises CorpusError: no such layout, a subset of another name.
    """
    if unknown := [name for name in subsets if name not in SUBSETS]:
        raise CorpusError(f"subsets names {', '.join(unknown)}; known: {', '.join(SUBSETS)}")
    out = Collector(folder, corpus="librilight", licence="public domain")
    if out.folder.resolve().name in SUBSETS:
        found = [out.folder]
    else:
        found = [place for place in folders_in(out.folder) if place.name in subsets]
    if not found:
        raise wrong_layout(out.folder, LAYOUT)
    for path in (path for place in found for path in audio_below(place, suffixes=(".flac",))):
        try:
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            speaker, voice = str(about["speaker"]), [Span(float(s), float(e)) for s, e in about["voice_activity"]]
        except OSError as error:
            out.reject(path, f"no .json beside it ({error.strerror})")
            continue
        except (ValueError, KeyError, TypeError) as error:
            out.reject(path, f"its .json has no speaker and voice_activity ({type(error).__name__}: {error})")
            continue
        if any(not 0 <= span.start < span.end for span in voice) or voice != sorted(voice):
            out.reject(path, "its .json does not list voice_activity in order")
            continue
        if not voice:
            out.reject(path, "its .json lists no voice_activity")
        for span in joined(voice, clip_seconds=clip_seconds, pause_seconds=pause_seconds):
            out.take(path, language="eng", split=Split.TRAIN, speaker=speaker, span=span)
    return out.listing(LAYOUT)


def joined(voice: Iterable[Span], *, clip_seconds: float, pause_seconds: float) -> Iterator[Span]:
    """Stretches in order to clips: a stretch joins the one before it if the pause and the whole are short enough."""
    current = None
    for span in voice:
        if current is None:
            current = span
        elif span.start - current.end <= pause_seconds and span.end - current.start <= clip_seconds:
            current = Span(current.start, max(current.end, span.end))
        else:
            yield current
            current = span
    if current is not None:
        yield current
