"""FLEURS as on the Hugging Face hub: data/<lang_region>/, with {train,dev,test}.tsv and audio/<split>/*.wav.

Layout: huggingface.co/datasets/google/fleurs; the archives of TFDS's xtreme_s lack only data/. A table has no header;
its fields are sentence id, file name, raw transcription, transcription, the same in characters, samples at 16 kHz,
gender. Speakers are not told. The hub has the audio as audio/<split>.tar.gz, each to be unpacked where it lies.
"""

from pathlib import Path

from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.collector import Collector, folders_in, lines_of, wrong_layout
from data_pipelines.corpora.listing import SPLITS

LAYOUT = "data/<lang_region>/ with train.tsv and audio/train/*.wav"
PARTS = ("train", "dev", "test")
_FIELDS = 6  # up to the samples; the gender behind them is not used


def read(folder: str | Path) -> Listing:
    """Lists every language below data/, below `folder` itself, or the one that `folder` is.

    Raises CorpusError: no such layout, an archive that was not unpacked, a language that ISO 639 does not know.
    """
    out = Collector(folder, corpus="fleurs", licence="CC-BY-4.0")
    if _is_language(out.folder):
        found = [out.folder]
    else:
        root = out.folder / "data" if (out.folder / "data").is_dir() else out.folder
        found = [place for place in folders_in(root) if _is_language(place)]
    if not found:
        raise wrong_layout(out.folder, LAYOUT)
    for place in found:
        code = out.language_of(place.resolve().name, where=place)
        for part in PARTS:
            table, audio = place / f"{part}.tsv", place / "audio" / part
            if not table.is_file():
                continue
            if not audio.is_dir() and audio.with_name(f"{part}.tar.gz").is_file():
                command = f"tar -xzf {part}.tar.gz"
                raise CorpusError(f"{audio}.tar.gz was not unpacked: {command} in {audio.parent}")
            for line, text in lines_of(table):
                fields = text.split("\t")
                if len(fields) < _FIELDS or not fields[5].isdigit():
                    out.reject(table, f"line {line}: not id, file, raw text, text, characters, samples, gender")
                    continue
                out.take(audio / fields[1], language=code, split=SPLITS[part], text=fields[3], samples=int(fields[5]))
    return out.listing(LAYOUT)


def _is_language(folder: Path) -> bool:
    return any((folder / f"{part}.tsv").is_file() and (folder / "audio").is_dir() for part in PARTS)
