"""IARPA BABEL: BABEL_BP_<number>/conversational/{training,dev,eval}/{audio/*.sph, transcription/*.txt}.

Layout: the LDC's packages (LDC2016S02 and on); read in the same way by lhotse (lhotse/recipes/babel.py) and ESPnet
(egs2/babel). A file is BABEL_<period>_<language>_<speaker>_<date>_<time>_<side>, one side of a telephone call: inLine
and outLine are two people. A transcription has "[seconds]" lines, and between two of them what was said, if anything.
Most audio is 8 kHz A-law SPHERE, some 48 kHz WAV.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.collector import Collector, Span, audio_below, lines_of, wrong_layout
from data_pipelines.corpora.listing import SPLITS
from data_pipelines.folders import walk

LAYOUT = "…/conversational/{training,dev,eval}/audio/BABEL_BP_<number>_…"
# The LDC's titles "IARPA Babel <language> Language Pack"; kmr is what the title calls Kurmanji Kurdish.
LANGUAGES = {
    **{"101": "yue", "102": "asm", "103": "ben", "104": "pus", "105": "tur", "106": "tgl", "107": "vie"},
    **{"201": "hat", "202": "swa", "203": "lao", "204": "tam", "205": "kmr", "206": "zul", "207": "tpi"},
    **{"301": "ceb", "302": "kaz", "303": "tel", "304": "lit", "305": "grn", "306": "ibo", "307": "amh"},
    **{"401": "mon", "402": "jav", "403": "luo", "404": "kat"},
}
_NAME = re.compile(r"BABEL_[A-Za-z0-9]+_(?P<number>\d{3})_(?P<speaker>\d+)_\d{8}_\d{6}_(?P<side>\w+)")
_TIME = re.compile(r"\[\s*(\d+(?:\.\d+)?)\s*\]")
_NO_SPEECH = "<no-speech>"


def read(folder: str | Path, *, parts: Sequence[str] = ("conversational",), whole: bool = False) -> Listing:
    """Lists the language packs in `folder`, at any depth, each segment of a transcription as one clip of its call side.

    `parts` may name "scripted" too. `whole` gives each call side (about ten minutes, half of it silence) as one clip,
    as do sides without a transcription (the eval sets). Stretches that are transcribed as nothing or as <no-speech> are
    no clips. Texts are as transcribed, with tags such as <hes> and (()).

    Raises CorpusError: no such layout.
    """
    out = Collector(folder, corpus="babel", licence="LDC")
    below = sorted(inside.folder / name for inside in walk(out.folder) for name in inside.folders if name in parts)
    found = [place for part in parts for place in below if place.name == part]
    if out.folder.resolve().name in parts:
        found.append(out.folder)
    sides = [
        (path, SPLITS[name]) for place in found for name in ("training", "dev", "eval")
        for path in audio_below(place / name / "audio")
    ]  # fmt: skip
    if not sides:
        raise wrong_layout(out.folder, LAYOUT)
    for path, split in sides:
        name = _NAME.fullmatch(path.stem)
        language = LANGUAGES.get(name["number"]) if name else None
        if language is None:
            wanted = "BABEL_<period>_<number>_<speaker>_<date>_<time>_<side>"
            out.reject(path, f"no known language number ({name['number']})" if name else f"not named {wanted}")
            continue
        facts = {"language": language, "split": split, "speaker": "_".join(name.group("number", "speaker", "side"))}
        transcription = path.parents[1] / "transcription" / f"{path.stem}.txt"
        if whole or not transcription.is_file():
            out.take(path, **facts)
            continue
        try:
            segments = list(_segments(transcription))
        except CorpusError as error:
            out.reject(path, str(error))
            continue
        for span, text in segments:
            out.take(path, text=text, span=span, **facts)
        if not segments:
            out.reject(path, "its transcription has no speech")
    return out.listing(LAYOUT)


def _segments(transcription: Path) -> Iterator[tuple[Span, str]]:
    """What was said, and when. Raises CorpusError: times that are not in order, or text before the first."""
    start, words = None, []
    for number, line in lines_of(transcription):
        time = _TIME.fullmatch(line.strip())
        if time is None:
            if start is None:
                raise CorpusError(f"{transcription.name} line {number}: text before the first [seconds]")
            words.append(line.strip())
            continue
        end = float(time[1])
        if start is not None and end < start:
            raise CorpusError(f"{transcription.name} line {number}: {end} s comes after {start} s")
        text = " ".join(words)
        if start is not None and end > start and text.replace(_NO_SPEECH, "").strip():
            yield Span(start, end), text
        start, words = end, []
