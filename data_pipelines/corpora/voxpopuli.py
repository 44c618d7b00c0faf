"""VoxPopuli as its own scripts cut it: unlabelled_data/<lang>/<year>/*.ogg and transcribed_data/<lang>/asr_<split>.tsv.

Layout: the README of github.com/facebookresearch/voxpopuli and its get_unlabelled_data.py and get_asr_data.py. A
segment of unlabelled speech is <event>_<number>.ogg, with <event> as 20180113-0900-PLENARY-10_hu. The table of
transcribed speech has a header (id, raw_text, normalized_text, speaker_id, split, gender; later is_gold_transcript and
accent), its audio is <lang>/<year>/<id>.ogg with the year in the id's first four digits. <lang> may be en_accented.
"""

from pathlib import Path

from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.collector import Collector, audio_below, folders_in, table_of, wrong_layout
from data_pipelines.corpora.listing import SPLITS, dealt_split

UNLABELLED, TRANSCRIBED = "unlabelled_data", "transcribed_data"
LAYOUT = f"{UNLABELLED}/<lang>/<year>/*.ogg or {TRANSCRIBED}/<lang>/asr_train.tsv"


def read(folder: str | Path, *, unlabelled: bool = True, transcribed: bool = True, split: str | None = None) -> Listing:
    """Lists what is there of both kinds, or of one of them.

    Unlabelled segments have no speaker, and are all of `split`; without one, they are dealt out 80/10/10 by their
    event, so that one sitting of the parliament in one language never sits in two. Sittings of the transcribed dev and
    test sets are part of the unlabelled data too: who tests on these takes `unlabelled=False`, or trains on neither.

    Raises CorpusError: no such layout, no such split, recordings that were not cut yet, a language that ISO 639 does
    not know.
    """
    if split is not None and split not in SPLITS:
        raise CorpusError(f"split is {split!r}; known: {', '.join(SPLITS)}")
    out = Collector(folder, corpus="voxpopuli", licence="CC0-1.0")
    if not (out.folder / UNLABELLED).is_dir() and not (out.folder / TRANSCRIBED).is_dir():
        if (out.folder / "raw_audios").is_dir():
            script = "python -m voxpopuli.get_unlabelled_data (or get_asr_data)"
            raise CorpusError(f"{folder} holds sessions of hours in raw_audios/: cut them first with {script}")
        raise wrong_layout(out.folder, LAYOUT)
    for place in folders_in(out.folder / UNLABELLED) if unlabelled else ():
        code = out.language_of(place.name, where=place)
        for path in audio_below(place):
            event = path.stem.rsplit("_", 1)[0]
            out.take(path, language=code, split=SPLITS[split] if split else dealt_split(code, event))
    for place in folders_in(out.folder / TRANSCRIBED) if transcribed else ():
        code = out.language_of(place.name, where=place)
        for part in ("train", "dev", "test"):
            table = place / f"asr_{part}.tsv"
            if table.is_file():
                _read_table(out, table, code, part)
    return out.listing(LAYOUT)


def _read_table(out: Collector, table: Path, code: str, part: str) -> None:
    for line, row in table_of(table, needed=("id",)):
        if row is None:
            out.reject(table, f"line {line}: another number of fields than the header has")
            continue
        speaker = row.get("speaker_id", "")
        out.take(
            table.parent / row["id"][:4] / f"{row['id']}.ogg",
            language=code,
            split=SPLITS[part],
            speaker="" if speaker == "None" else speaker,
            text=row.get("normalized_text") or row.get("raw_text", ""),
        )
