"""Google's crowdsourced corpora on OpenSLR (Googlei18n): line_index*.tsv (or .csv), utt_spk_text.tsv, audio near it.

Layout: the pages of openslr.org/32, 35 to 37, 41 to 44, 52 to 54, 61 to 80, 83 and 86, and the file lists in Hugging
Face's openslr data set; of 61 and 83 the scripts that download them. Four forms, all without a header:
- <xx>_<yy>_{female,male}/line_index.tsv, "<id> TAB <text>" (some with two tabs, or a field between), with wavs/<id>.wav
- line_index_{female,male}.tsv at the top, and <xx>_<yy>_{female,male}/<id>.wav
- line_index_all.csv at the top of 83, "<line>, <id>, <text>" with commas in texts, and <dialect>_english_male/<id>.wav
- asr_<language>/utt_spk_text.tsv, "<id> TAB <speaker> TAB <text>", with data/<two characters>/<id>.flac
An <id> of the first three is <language and gender>_<speaker>_<number>.
"""

import re
from pathlib import Path

from data_pipelines.audio import AUDIO_SUFFIXES
from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.collector import Collector, lines_of, wrong_layout
from data_pipelines.corpora.listing import dealt_split
from data_pipelines.folders import files_below
from data_pipelines.languages import UnknownLanguage, normalise

LAYOUT = "line_index.tsv, line_index_{female,male}.tsv or utt_spk_text.tsv, with <id>.wav or <id>.flac below the folder"
# One language a resource; 32 and 37 have several, in folders of their codes.
RESOURCES = {
    **{35: "jav", 36: "sun", 41: "jav", 42: "khm", 43: "nep", 44: "sun", 52: "sin", 53: "ben", 54: "nep", 61: "spa"},
    **{63: "mal", 64: "mar", 65: "tam", 66: "tel", 69: "cat", 70: "eng", 71: "spa", 72: "spa", 73: "spa", 74: "spa"},
    **{75: "spa", 76: "eus", 77: "glg", 78: "guj", 79: "kan", 80: "mya", 83: "eng", 86: "yor"},
}
SPOKEN = {"sso": "sot"}  # 32 has Sesotho in st_za/za/sso, and ids to match; in ISO 639-3 sso is Sissano
_TABLE = re.compile(r"(?:\w+_)?line_index(?:_\w+)?\.[tc]sv|utt_spk_text\.tsv")
_LOCALE = re.compile(r"([a-z]{2,3})_(?:[a-z]{2}(?:_(?:fe)?male)?|weather_messages)")
_ENGLISH = re.compile(r"[a-z]+_english(?:_(?:fe)?male)?")
_ASR = re.compile(r"asr_([a-z]+)")
_RESOURCE = re.compile(r"(?:open)?slr[-_]?(\d+)(?:_([a-z]{2,3}))?", re.IGNORECASE)


def read(folder: str | Path, *, language: str | None = None) -> Listing:
    """Lists what the tables below `folder` name: one resource, or a folder of several.

    The language is `language`, or what the nearest folder above the audio says: ml_in_female, asr_javanese, SLR63,
    openslr63_ml, afr. Sentences are dealt out 80/10/10, as in folders without splits. A file that two tables name (the
    site has the table beside the archive, the archive has it again) is one clip. Audio that no table names, and names
    without audio, are rejected.

    Raises CorpusError: no table, one that is not UTF-8, audio of which nothing says the language.
    """
    out = Collector(folder, corpus="openslr", licence="CC-BY-SA-4.0")
    tables, audio = [], {}
    for path in files_below(out.folder):
        if _TABLE.fullmatch(path.name):
            tables.append(path)
        elif path.suffix.lower() in AUDIO_SUFFIXES:
            audio.setdefault(path.stem, []).append(path)
    if not tables:
        raise wrong_layout(out.folder, LAYOUT)
    codes: dict[Path, str] = {}
    taken: set[Path] = set()
    for table in tables:
        for line, content in lines_of(table):
            if table.suffix == ".csv":
                fields = content.split(", ", 2)[1:]
            else:
                fields = [field for field in content.split("\t") if field.strip()]
            if len(fields) < 2:
                out.reject(table, f"line {line}: not an id and a text")
                continue
            name, text = fields[0].strip(), fields[-1]
            found = audio.get(name, [])
            found = [path for path in found if path.is_relative_to(table.parent)] or found
            if len(found) != 1:
                where = f"{table.relative_to(out.folder).as_posix()} line {line}"
                out.reject(table.parent / name, f"{where}: {'no' if not found else 'more than one'} audio file")
                continue
            path = found[0]
            if path in taken:
                continue
            taken.add(path)
            if path.parent not in codes:
                codes[path.parent] = language_of(path.parent, out.folder, language)
            code = codes[path.parent]
            speaker = fields[1] if table.name == "utt_spk_text.tsv" and len(fields) > 2 else _speaker(name)
            out.take(path, language=code, split=dealt_split(code, text), speaker=speaker, text=text)
    for path in (path for paths in audio.values() for path in paths if path not in taken):
        out.reject(path, "no table names it")
    return out.listing(LAYOUT)


def language_of(place: Path, root: Path, given: str | None) -> str:
    """ISO 639-3 of audio in `place`, by the names of the folders from there up to `root`, or as `given`."""
    if given:
        return normalise(given)
    between = [root.resolve().name, *place.relative_to(root).parts]
    for name in reversed(between):
        try:
            if match := _LOCALE.fullmatch(name) or _ASR.fullmatch(name):
                return normalise(match[1])
            if _ENGLISH.fullmatch(name):
                return "eng"
            if (match := _RESOURCE.fullmatch(name)) and (match[2] or int(match[1]) in RESOURCES):
                return normalise(match[2]) if match[2] else RESOURCES[int(match[1])]
            if re.fullmatch("[a-z]{2,3}", name):
                return SPOKEN.get(name) or normalise(name)
        except UnknownLanguage:
            continue
    raise CorpusError(f"{place}: no folder above says the language (as ml_in_female or SLR63 do); give `language`")


def _speaker(name: str) -> str:
    parts = name.split("_")
    return "_".join(parts[:2]) if len(parts) == 3 else ""
