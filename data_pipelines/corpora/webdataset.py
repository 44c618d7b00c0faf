"""WebDataset: tar files in which files of one name but for their suffixes belong together.

Audio beside .json (fields named by options), .txt (the transcript), .lang or .spk. Only the tars' headers and the small
siblings are read; audio is read from its place in the tar later. Compressed tars have no such places and are rejected.
A tar ends with a block of zeros: where none stands after the last member, it was cut or is damaged there, and where
something follows it, that is another tar, whose members nobody would see.
"""

import json
import posixpath
import tarfile
from pathlib import Path

from data_pipelines.audio import AUDIO_SUFFIXES, UNDECODED_SUFFIXES
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
    split: str | None = None,
) -> Listing:
    """Lists the audio in all tars of the folder (glob `files`). The id is "tar/name", the name less its suffix.

    The language is `language`, else .lang, else the .json's `language_field`, else part number `language_folder` (from
    0) of the tar's folders. The split is `split`, else what the tar's path speaks of, else dealt out.

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
        groups, problems = _groups(folder / path)
        for key, group in groups.items():
            audio = [suffix for suffix in group if _last(suffix) in AUDIO_SUFFIXES | UNDECODED_SUFFIXES]
            if not audio:
                continue
            row += 1
            info = group.get("json", {})
            if info is None:
                lister.reject(f"{path}/{key}", row, "its .json is damaged, so that nothing is known of it")
                continue
            known = language or group.get("lang") or info.get(language_field) or folder_name(path, language_folder)
            if not known and not len(lister):
                raise needs_language(folder / path, ("language", "language_field", "language_folder"))
            if len(audio) > 1:
                lister.reject(f"{path}/{key}", row, f"several audio files of one name: {', '.join(sorted(audio))}")
                continue
            if _last(audio[0]) in UNDECODED_SUFFIXES:
                lister.reject(f"{path}/{key}", row, f".{audio[0]} is not decoded here: convert it to FLAC")
                continue
            member = group[audio[0]]
            lister.add(
                path,
                row=row,
                id=f"{path.removesuffix('.tar')}/{key}",
                language=str(known or ""),
                speaker=str(group.get("spk") or info.get(speaker_field) or ""),
                split=split or split_in(path),
                text=str(group.get("txt") or info.get(text_field) or ""),
                size=member.size,
                member=tar_member(member.name, offset=member.offset_data, size=member.size),
            )
        for problem in problems:
            row += 1
            lister.reject(path, row, problem)
    return lister.listing(source=folder)


def _groups(path: Path) -> tuple[dict[str, dict], list[str]]:
    """Name less suffixes -> suffix -> what it holds (audio: its tarfile.TarInfo), and what is wrong with the tar."""
    groups: dict[str, dict] = {}
    problems = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parent, base = posixpath.split(member.name)
                name, _, suffix = base.partition(".")  # at the first dot, as WebDataset does
                suffix = suffix.lower()
                if not name or not member.isreg() or member.sparse is not None:
                    continue
                group = groups.setdefault(posixpath.join(parent, name), {})
                if suffix in group:
                    problems.append(f"{member.name} is there twice: the last is taken, as tar does")
                if suffix in SIBLINGS:
                    text = tar.extractfile(member).read().decode(errors="replace").strip()
                    group[suffix] = _object(text) if suffix == "json" else text
                else:
                    group[suffix] = member
            problems += _wrong_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(f"a damaged tar, read as far as it is whole: {error}")
    return groups, problems


def _wrong_end(path: Path, end: int) -> list[str]:
    """What is wrong with a tar from byte `end` on, where its members end: there should be zeros, and only zeros."""
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
            return [f"a damaged tar, read as far as it is whole: no end of the archive at byte {end}"]
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                return [f"something follows the end of the archive at byte {end}: join tars with `tar -A`, not `cat`"]
    return []


def _last(suffix: str) -> str:
    return f".{suffix.rpartition('.')[2]}"


def _object(text: str) -> dict | None:
    """What a .json says, {} where it is no object; None where it is no JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else {}
