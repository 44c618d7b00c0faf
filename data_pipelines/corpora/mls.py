"""Multilingual LibriSpeech: mls_<language>/{train,dev,test}/{audio/<speaker>/<book>/*.flac, transcripts.txt}.

Layout: Pratap et al., MLS (2020), and openslr.org/94; read in the same way by lhotse (lhotse/recipes/mls.py). The .opus
release has folders mls_<language>_opus. transcripts.txt has "<id> TAB <text>", where <id>, the file's name, is
<speaker>_<book>_<number>; segments.txt (id, LibriVox address, start, end in seconds) says where a clip was cut from and
is not needed. Language models lie in mls_lm_<language>.
"""

from pathlib import Path

from data_pipelines.corpora import Listing
from data_pipelines.corpora.collector import Collector, audio_below, folders_in, wrong_layout
from data_pipelines.corpora.keyed_lines import KeyedLines
from data_pipelines.corpora.listing import SPLITS

LAYOUT = "mls_<language>/{train,dev,test}/audio/<speaker>/<book>/, or a folder of several mls_<language>/"
PARTS = ("train", "dev", "test")


def read(folder: str | Path, *, language: str | None = None) -> Listing:
    """Lists one language, or each mls_<language>[_opus] in `folder`.

    `language` says what one language's folder speaks where its name does not.

    Audio without a transcript is listed with an empty text, a transcript without audio is rejected.

    Raises CorpusError: no such layout, a language that ISO 639 does not know, transcripts that are not UTF-8.
    """
    out = Collector(folder, corpus="mls", licence="CC-BY-4.0")
    found = [out.folder] if _is_language(out.folder) else [f for f in folders_in(out.folder) if _is_language(f)]
    if not found:
        raise wrong_layout(out.folder, LAYOUT)
    for place in found:
        name = place.resolve().name.removeprefix("mls_").removesuffix("_opus")
        code = out.language_of(language or name, where=place)
        for part in PARTS:
            if (place / part / "audio").is_dir():
                _read_part(out, place / part, code)
    return out.listing(LAYOUT)


def _is_language(folder: Path) -> bool:
    return any((folder / part / "audio").is_dir() for part in PARTS)


def _read_part(out: Collector, part: Path, code: str) -> None:
    table = part / "transcripts.txt"
    texts = KeyedLines(table, separator="\t")
    for path in audio_below(part / "audio"):
        out.take(
            path,
            language=code,
            split=SPLITS[part.name],
            speaker=path.stem.split("_")[0],
            text=texts.get(path.stem) or "",
        )
    for name in texts.unasked():
        speaker, book = (name.split("_") + [""])[:2]
        out.reject(part / "audio" / speaker / book / name, f"{table.name} has it, but there is no audio")
