"""A composition file: the corpora whose clips become one manifest, with how each is read.

    [[corpus]]
    name = "mls"                  # the corpus' name in the manifest, and the first part of its utterances' ids
    reader = "mls"                # a name of `corpora.readers.READERS`
    folder = "$CORPORA/mls"       # relative to this file; ~ and $VARIABLES are filled in
    language = "fra"              # optional: for readers with an option `language`
    licence = "CC-BY-4.0"         # optional: of clips whose source names none
    options = { split = "train" } # optional: the reader's own

A name may come again with another folder (a release a language, say): the ids then begin with name-2, name-3, ...
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_pipelines import storage
from data_pipelines.corpora import CorpusError, Listing, Rejected
from data_pipelines.corpora.listing import clip_writer, shown_progress
from data_pipelines.corpora.readers import option_names, read
from data_pipelines.storage import StorageError

SUFFIX = ".toml"


class Corpus(NamedTuple):
    """One [[corpus]] table. `root` tells it from all others of the file: its name, numbered from the second on."""

    root: str
    name: str
    reader: str
    folder: Path
    options: dict[str, object]
    licence: str


class Listed(NamedTuple):
    """The `folders` of all `Clip.root`, in the file's order, and the `listing` of their clips together."""

    folders: dict[str, str]
    listing: Listing


def list_corpora(path: str | Path, *, reader: str, options: Mapping[str, object], progress: bool = False) -> Listed:
    """Lists a composition file's corpora, or, where `path` is a folder, that one with `reader` and its `options`.

    In a composition, ids get their corpus' root and "/" before them, and the corpus is called what the file calls it.

    Raises CorpusError: an unknown key, reader or option (with the nearest names), a corpus of a composition without a
    usable clip, and whatever a reader raises, with the corpus' name before it.
    """
    if Path(path).suffix != SUFFIX or Path(path).is_dir():
        with shown_progress(progress):
            return Listed({"": str(path)}, read(reader, path, options))
    if options or reader != "folder":
        raise CorpusError(f"{path} says itself how its corpora are read: give no reader, table or options beside it")
    corpora = read_composition(path)
    writer = clip_writer()
    rejected: list[Rejected] = []
    for corpus in tqdm(corpora, desc="listing", unit="corpus", disable=not progress):
        try:
            with shown_progress(progress):
                listing = read(corpus.reader, corpus.folder, corpus.options)
        except CorpusError as error:
            raise CorpusError(f"corpus {corpus.root!r}: {error}") from error
        if not len(listing.clips):  # seen now, not when all the others are decoded
            first = listing.rejected[0]
            raise CorpusError(
                f"corpus {corpus.root!r}: none of its {len(listing.rejected)} clips is usable; the first: {first.path} "
                f"(row {first.row}): {first.reason}. Mend it, or take it out of {path}"
            )
        writer.extend(listing.clips, root=corpus.root, corpus=corpus.name, licence=corpus.licence)
        rejected += (entry._replace(path=f"{corpus.root}/{entry.path}") for entry in listing.rejected)
    return Listed({corpus.root: str(corpus.folder) for corpus in corpora}, Listing(writer.clips(), rejected))


def read_composition(path: str | Path) -> list[Corpus]:
    """The corpora of a composition file, in its order. Raises CorpusError naming the file, the table and the key."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CorpusError(f"composition {path} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(f"composition {path} is not TOML: {error}") from error
    _known(content, ("corpus",), where=str(path))
    tables = content.get("corpus")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise CorpusError(f"composition {path} has no [[corpus]] tables")
    corpora: list[Corpus] = []
    for number, table in enumerate(tables, start=1):
        where = f"{path}, corpus {table.get('name', number)!r}"
        _known(table, ("name", "reader", "folder", "language", "licence", "options"), where=where)
        for key in ("name", "reader", "folder"):
            if key not in table:
                raise CorpusError(f"{where} has no {key!r}")
        options = table.get("options", {})
        for key, value in table.items():
            if not isinstance(value, dict if key == "options" else str):
                raise CorpusError(f"{where}: {key} is {value!r}, not {'a table' if key == 'options' else 'a string'}")
        name, reader = table["name"], table["reader"]
        if not re.fullmatch(r"[^\s/]+", name):
            raise CorpusError(f"{where}: a name has neither spaces nor '/'")
        try:
            known = option_names(reader)
        except CorpusError as error:
            raise CorpusError(f"{where}: {error}") from error
        if "language" in table:
            if "language" not in known:
                raise CorpusError(f"{where}: the reader {reader!r} knows the languages itself: leave out 'language'")
            options = {"language": table["language"], **options}
        _known(options, known, where=f"{where}, options of the reader {reader!r}")
        again = sum(corpus.name == name for corpus in corpora)
        root = f"{name}-{again + 1}" if again else name
        if any(corpus.root == root for corpus in corpora):
            raise CorpusError(f"{where}: another corpus is called {root!r}; rename one")
        folder = os.path.expanduser(os.path.expandvars(table["folder"]))
        if "$" in folder:
            raise CorpusError(f"{where}: folder {folder} names a variable that is not set")
        try:
            folder = storage.local(folder, what="a corpus")
        except StorageError as error:
            raise CorpusError(f"{where}: {error}") from error
        corpora.append(Corpus(root, name, reader, Path(path).parent / folder, options, table.get("licence", "")))
    return corpora


def _known(table: Mapping[str, object], known: Iterable[str], *, where: str) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
            raise CorpusError(f"{where}: unknown key {key!r}; {hint}")
