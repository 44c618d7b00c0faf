"""Kaldi's data folders: wav.scp, and perhaps segments, utt2spk, utt2lang and text.

Entries of wav.scp that are commands ("... |") are never run, and archives (data_wav.ark:42) are not read.
"""

import re
from pathlib import Path

from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.keyed_lines import KeyedLines
from data_pipelines.corpora.listing import Lister, existing_folder, inside, needs_language, one_of, split_in


def read(
    folder: str | Path, *, data: str | None = None, language: str | None = None, split: str | None = None
) -> Listing:
    """Lists the utterances of a data folder, or of those in it (data/train, data/dev, ...), without decoding any.

    `folder` holds the audio, and paths in wav.scp are relative to it, or absolute and in it. `data` holds the tables
    (default: `folder`). The language is that of utt2lang, else `language`. The split is `split`, else what the
    data folder's name speaks of, else dealt out. A segment's end of -1 is the recording's.

    Raises CorpusError: no wav.scp, no language.
    """
    folder = existing_folder(folder)
    place = one_of(folder, data, what="data folder")
    tables = [place] if (place / "wav.scp").is_file() else sorted(path.parent for path in place.glob("*/wav.scp"))
    if not tables:
        raise CorpusError(f"{place} has no wav.scp, nor has a folder in it: say where they are with the option data")
    lister = Lister(folder)
    row = 0
    for table in tables:
        recordings, speakers, languages, texts = (
            KeyedLines(table / name) for name in ("wav.scp", "utt2spk", "utt2lang", "text")
        )
        if language is None and not len(languages):
            raise needs_language(table, ("language", "utt2lang"))
        if (table / "segments").is_file():
            utterances = KeyedLines(table / "segments").items()
        else:
            utterances = ((name, None) for name, _ in recordings.items())
        for name, segment in utterances:
            row += 1
            fields = segment.split() if segment is not None else [name, "0", "-1"]
            given = recordings.get(fields[0]) if fields else None
            path = inside(folder, given) if given else ""
            try:
                start, end = float(fields[1]), float(fields[2])
            except (IndexError, ValueError):
                lister.reject(path or name, row, f"segments: {name} {segment!r} is not: recording start end")
                continue
            reason = _unusable(fields[0], given, path)
            if reason:
                lister.reject(path or name, row, reason)
                continue
            lister.add(
                path,
                row=row,
                id=name,
                language=languages.get(name) or language or "",
                speaker=speakers.get(name) or "",
                split=split or split_in(table.name),
                text=texts.get(name) or "",
                start=start,
                end=None if end == -1 else end,
            )
    return lister.listing(source=place)


def _unusable(recording: str, given: str | None, path: str) -> str | None:
    if given is None:
        return f"recording {recording!r} is not in wav.scp"
    if given.endswith("|"):
        return f"a command in wav.scp, which is never run: write its output to a file (wav-copy) and list that: {given}"
    if re.search(r"\.ark:\d+$", given):
        return f"in an archive, which is not read: write files (wav-copy, ESPnet's --audio_format flac): {given}"
    if path.startswith("/"):
        return f"outside of the corpus folder: give a folder that holds {given}"
    return None
