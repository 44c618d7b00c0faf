"""One reader a corpus: a module whose `read(folder, ...)` lists clips without decoding them.

`folder` reads any folder with a table or with <language>/<corpus> sub-folders. The readers of named corpora, which
`readers.READERS` lists and which share `listing`, give the same `Listing`, and `prepare` takes it from there. A clip is
a file, or a member of a container (a tar, a Parquet file, a TFDS data set), or a stretch of either.
"""

from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.manifest import Split


class CorpusError(ValueError):
    """A corpus that cannot be read at all: no folder, no table, a missing column, nothing in it."""


class Clip(NamedTuple):
    """One source file with what is known about it before it is decoded.

    Attributes:
        id: unique in the corpus. path: relative to the corpus folder, with "/".
        language: ISO 639-3. corpus, speaker: as the source names them; an unknown speaker is "".
        split: what it may be used for. text, licence: "" where unknown.
        samples: what the source says its length is, at 16 kHz or at the file's own rate; None where it does not.
        row: its line in the table (the header is line 1), or its place in the listing.
        size: bytes of the file, or of the member.
        member: which part of the container at `path` this is, as `containers` understands it; "" for a file.
        start, end: seconds of the file or member that are the clip; an `end` of None is its end.
        root: which of a composition's corpora it belongs to, so which folder `path` lies in; readers leave it "".
        modified: when the file was last changed, in nanoseconds since 1970; of a member, when its container was.
    """

    id: str
    path: str
    language: str
    corpus: str
    speaker: str
    split: Split
    text: str
    licence: str
    samples: int | None
    row: int
    size: int
    member: str = ""
    start: float = 0.0
    end: float | None = None
    root: str = ""
    modified: int = 0

    @property
    def where(self) -> str:
        """What to call its audio in messages: path, member and stretch, as far as it has them."""
        name = "/".join(part for part in (self.root, self.path) if part)
        if self.member:
            name += f":{self.member}"
        if self.start or self.end is not None:
            name += f" [{self.start:g} to {'its end' if self.end is None else f'{self.end:g}'} s]"
        return name


class Rejected(NamedTuple):
    """One clip that was left out, and why; `samples` at 16 kHz where it could be decoded, else 0."""

    path: str
    row: int
    reason: str
    samples: int = 0


class Listing(NamedTuple):
    """What a reader found: usable `clips` (`clips.Clips`, which are columns), and what it had to leave out."""

    clips: Sequence[Clip]
    rejected: list[Rejected]
