"""fairseq's manifests: a line with the audio's root, then `path<TAB>frames` a clip (wav2vec_manifest.py).

Beside NAME.tsv may lie, line by line, NAME.lang (languages) and NAME.wrd (transcripts).
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.listing import (
    Lister,
    existing_folder,
    folder_name,
    found,
    inside,
    lines_of,
    needs_language,
    one_of,
    split_in,
)


def read(
    folder: str | Path,
    *,
    manifests: str | None = None,
    language: str | None = None,
    language_folder: int | None = None,
    ignore_root: bool = False,
    split: str | None = None,
) -> Listing:
    """Lists the clips of every *.tsv in `manifests` (a folder or one file; default: `folder`, where the audio lies).

    The language is `language`, or a line of NAME.lang, or part number `language_folder` (from 0) of a clip's folders.
    The split is `split`, else what the manifest's name speaks of (train, valid, dev, test), else dealt out.
    `ignore_root`: paths are relative to `folder`, whatever the first line says (the audio was moved).

    Raises CorpusError: no manifests, a root outside of `folder`, no language, files of different lengths.
    """
    folder = existing_folder(folder)
    place = one_of(folder, manifests, what="manifests")
    names = [place.name] if place.is_file() else found(place, "*.tsv", what="fairseq manifests")
    place = place.parent if place.is_file() else place
    lister = Lister(folder)
    row = 0
    for name in names:
        lines = lines_of(place / name)
        first = next(lines, None)
        if first is None or "\t" in first:
            raise CorpusError(f"{place / name} is no fairseq manifest: its first line is the audio's root")
        root = "" if ignore_root else inside(folder, str((place / first).resolve()))
        if root.startswith("/"):
            raise CorpusError(
                f"{place / name} has the root {first}, outside of {folder}: give that as the folder, with "
                f"the option manifests={place}; or ignore_root=true where the audio was moved to {folder}"
            )
        has_languages = (place / name).with_suffix(".lang").is_file()
        if language is None and not has_languages and language_folder is None:
            raise needs_language(place / name, ("language", "language_folder", f"{Path(name).stem}.lang beside it"))
        for line, said, text in zip(lines, _beside(place / name, ".lang"), _beside(place / name, ".wrd"), strict=False):
            row += 1
            path, _, frames = line.partition("\t")
            if not frames.isdigit():
                lister.reject(path, row, f"no number of frames in {name}: {line!r}")
                continue
            lister.add(
                f"{root}/{path}" if root and root != "." else path,
                row=row,
                language=said if has_languages else language or folder_name(path, language_folder),
                split=split or split_in(Path(name).stem),
                text=text,
                samples=int(frames),
            )
    return lister.listing(source=place)


def _beside(manifest: Path, suffix: str) -> Iterator[str]:
    """The lines of the file beside it; "" without end where there is none. Raises CorpusError: of another length."""
    path = manifest.with_suffix(suffix)
    if not path.is_file():
        return itertools.repeat("")
    count, clips = (sum(1 for _ in lines_of(each)) for each in (path, manifest))
    if count != clips - 1:
        raise CorpusError(f"{path} has {count} lines for {clips - 1} clips of {manifest.name}")
    return lines_of(path)
