"""VoxForge: <language>/<contributor>-<date>-<code>/{wav,flac}/* with etc/PROMPTS or etc/prompts-original.

Layout: the archives of repository.voxforge1.org (<language>/Trunk/Audio/Main/16kHz_16bit/*.tgz), unpacked as ESPnet's
egs2/voxforge does, to <language>/extracted/. A line of PROMPTS is "<contributor>…/mfc/<id> TEXT", one of
prompts-original "<id> text"; <id> is the file's name. Prompts are in UTF-8 or Latin-1 (ESPnet converts what `file`
finds). Languages are named by code (en, de) or in English (Dutch, Russian).
"""

from pathlib import Path

from data_pipelines.corpora import Listing
from data_pipelines.corpora.collector import Collector, audio_below, folders_in, lines_of, wrong_layout
from data_pipelines.corpora.listing import dealt_split

LAYOUT = "<language>/<contributor>-<date>-<code>/{wav,flac}/ with etc/PROMPTS or etc/prompts-original"
_BETWEEN = ("extracted", "Trunk", "Audio", "Main", "16kHz_16bit")  # folders that a download or a recipe leaves


def read(folder: str | Path, *, language: str | None = None) -> Listing:
    """Lists the submissions of every language in `folder`; with `language`, those of one, which `folder` is.

    The speaker is the contributor's name, or the whole submission where that is "anonymous". Sentences are dealt out
    80/10/10, as in folders without splits. Audio without a prompt is listed with an empty text; a submission without
    wav/ and flac/ is rejected.

    Raises CorpusError: no such layout, a language that ISO 639 does not know.
    """
    out = Collector(folder, corpus="voxforge", licence="GPL")
    places = [out.folder] if language else folders_in(out.folder)
    found = [(place, submission) for place in places for submission in _submissions(place)]
    if not found:
        raise wrong_layout(out.folder, LAYOUT)
    for place, submission in found:
        code = out.language_of(language or place.name, where=place)
        audio = next((submission / name for name in ("wav", "flac") if (submission / name).is_dir()), None)
        if audio is None:
            out.reject(submission, "neither wav/ nor flac/ in it")
            continue
        name = submission.name.split("-")[0]
        speaker = submission.name if name.lower() == "anonymous" else name
        texts = _prompts(submission)
        for path in audio_below(audio):
            text = texts.get(path.stem, "")
            sentence = text.lower() or path.relative_to(out.folder).as_posix()
            out.take(path, language=code, split=dealt_split(code, sentence), speaker=speaker, text=text)
    return out.listing(LAYOUT)


def _submissions(place: Path) -> list[Path]:
    found = []
    for child in folders_in(place):
        if child.name in _BETWEEN:
            found += _submissions(child)
        elif any((child / name).is_dir() for name in ("wav", "flac", "etc")):
            found.append(child)
    return found


def _prompts(submission: Path) -> dict[str, str]:
    """File name without suffix -> text; prompts-original, where it is, keeps case and punctuation."""
    for name in ("prompts-original", "PROMPTS"):
        path = submission / "etc" / name
        if path.is_file():
            lines = (line.split(None, 1) for _, line in lines_of(path, otherwise="latin-1"))
            return {words[0].split("/")[-1]: words[1] for words in lines if len(words) == 2}
    return {}
