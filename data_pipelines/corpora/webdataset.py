"""WebDataset: tar files in which files of one name but for their suffixes belong together.

Audio beside .json (fields named by options), .txt (the transcript), .lang or .spk. Only the tars' headers and the small
siblings are read; audio is read from its place in the tar later. Compressed tars have no such places and are rejected.
"""

import json
import posixpath
import tarfile
from pathlib import Path

from data_pipelines.audio import AUDIO_SUFFIXES
from data_pipelines.containers import tar_member
from data_pipelines.corpora import Listing
from data_pipelines.corpora.listing import Lister, existing_folder, folder_name, found, needs_language, split_in

SIBLINGS = ("json", "txt", "lang", "spk")


def read(
    folder: str | Path,
    *,
    files: str = "**/*.tar*",
    language: str | None = None,
    language_folder: int | None = None,
    language_field: str = "language",
    speaker_field: str = "speaker",
    text_field: str = "text",
) -> Listing:
    """Lists the audio in all tars of the folder (glob `files`). The id is "tar/name", the name less its suffix.

    The language is `language`, else .lang, else the .json's `language_field`, else part number `language_folder` (from
    0) of the tar's folders. The split is what the tar's path speaks of, else dealt out.

    Raises CorpusError: no tar, no clip, languages unknown in more than half.
    """
    folder = existing_folder(folder)
    lister = Lister(folder)
    row = 0
    for path in found(folder, files, what="tar files"):
        if not path.endswith(".tar"):
            row += 1
            lister.reject(path, row, "a compressed tar, in which nothing can be found again: decompress it first")
            continue
        groups, problem = _groups(folder / path)
        for key, group in groups.items():
            audio = [suffix for suffix in group if f".{suffix.rpartition('.')[2]}" in AUDIO_SUFFIXES]
            if not audio:
                continue
            row += 1
            info = group.get("json", {})
            known = language or group.get("lang") or info.get(language_field) or folder_name(path, language_folder)
            if not known and not len(lister):
                raise needs_language(folder / path, ("language", "language_field", "language_folder"))
            if len(audio) > 1:
                lister.reject(f"{path}/{key}", row, f"several audio files of one name: {', '.join(sorted(audio))}")
                continue
            member = group[audio[0]]
            lister.add(
                path,
                row=row,
                id=f"{path.removesuffix('.tar')}/{key}",
                language=str(known or ""),
                speaker=str(group.get("spk") or info.get(speaker_field) or ""),
                split=split_in(path),
                text=str(group.get("txt") or info.get(text_field) or ""),
                size=member.size,
                member=tar_member(member.name, offset=member.offset_data, size=member.size),
            )
        if problem:
            row += 1
            lister.reject(path, row, problem)
    return lister.listing(source=folder)


def _groups(path: Path) -> tuple[dict[str, dict], str]:
    """Name less suffixes -> suffix -> what it holds (audio: its tarfile.TarInfo), and what is wrong with the tar."""
    groups: dict[str, dict] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parent, base = posixpath.split(member.name)
                name, _, suffix = base.partition(".")  # at the first dot, as WebDataset does
                suffix = suffix.lower()
                if not name or not member.isreg() or member.sparse is not None:
                    continue
                group = groups.setdefault(posixpath.join(parent, name), {})
                if suffix in SIBLINGS:
                    text = tar.extractfile(member).read().decode(errors="replace").strip()
                    group[suffix] = _object(text) if suffix == "json" else text
                else:
                    group[suffix] = member
    except (tarfile.TarError, OSError, EOFError) as error:
        return groups, f"a damaged tar, read as far as it is whole: {error}"
    return groups, ""


def _object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
