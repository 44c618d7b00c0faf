"""The benchmark's folder, as it is released, and what its protocol leaves out of it.

    ROOT/SOURCE/LANGUAGE/wav/ID.wav
    ROOT/SOURCE/LANGUAGE/transcript_10min_train.txt      transcript_1h_train.txt
    ROOT/SOURCE/LANGUAGE/transcript_10min_dev.txt        transcript_10min_test.txt      (of both sets)

A line of a transcript is `ID ANYTHING TEXT`, and an ID ends in `_LANGUAGE_NUMBER`. Constants are those of ESPnet
`egs2/ml_superb/asr1/local`: sources, few-shot languages and their utterances in `data_prep.py`, recordings without
sound in `zero_utt_eng.txt` and `zero_utt_nld.txt`, lengths in `data_prep.py` and `asr.sh`.

Everything that is left out is named with its reason and counted (`Split.left_out`). Where ESPnet's script stops (a line
without text, a file that is not there), the row is left out as well.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from data_pipelines.mlsuperb.recordings import examine_all
from data_pipelines.mlsuperb.texts import can_be_said, reference

Duration = Literal["10min", "1h"]
Part = Literal["train", "dev", "test"]
DURATIONS: tuple[Duration, ...] = ("10min", "1h")
PARTS: tuple[Part, ...] = ("train", "dev", "test")

SOURCES = (
    *("ALFFA", "LAD", "M-AILABS", "NST", "commonvoice", "fleurs", "googlei18n_asr", "googlei18n_tts", "mls", "nchlt"),
    *("swc", "voxforge", "mexico-el", "voxpopuli"),
)
# Twenty languages of which only five utterances are trained on: `few_shot.txt` names them.
FEW_SHOT = frozenset("dan lit tur srp vie kaz zul tsn epo frr tok umb bos ful ceb luo kea sun tso tos".split())
MINIATURE_TITLE = "# A miniature in ML-SUPERB's layout"  # the first line of a miniature's README.md
PHONES_MARK = "TEXTS_ARE_PHONES"  # a file in a language's folder whose texts are phones already: the miniature has such
LONGEST_SECONDS, SHORTEST_SECONDS = 20.0, 0.1  # of training and dev utterances


class MlSuperbError(ValueError):
    """A folder that is not the benchmark's; the message names the file or folder and what was expected."""


class Utterance(NamedTuple):
    """One line of a transcript.

    Attributes:
        id: as in the transcript.
        source: folder of the corpus.
        language: folder of the language: an ISO 639-3 code, or "org_jpn". What is to be identified.
        group_language: the language by the ID, by which the figures are grouped ("jpn" for "org_jpn").
        path: of the recording.
        seconds: its length.
        text: as written in the transcript.
        phones: whether that is phones already (`PHONES_MARK`).
    """

    id: str
    source: str
    language: str
    group_language: str
    path: Path
    seconds: float
    text: str
    phones: bool = False

    @property
    def few_shot(self) -> bool:
        """Whether the language counts among the few-shot ones ("reserved" in ESPnet, else "trained")."""
        return self.group_language in FEW_SHOT


class LeftOut(NamedTuple):
    """A row that is not used, and why; `place` is a file and line, or a recording."""

    place: str
    reason: str


class Split(NamedTuple):
    """What is used of one part, in the order of sources, languages and lines, and what is not."""

    utterances: list[Utterance]
    left_out: list[LeftOut]

    def reasons(self) -> Counter:
        """How many rows were left out for each reason."""
        return Counter(each.reason for each in self.left_out)


def read_split(
    root: Path,
    part: Part,
    *,
    duration: Duration,
    languages: Collection[str] | None = None,
    sources: Collection[str] | None = None,
    few_shot_rule: bool = True,
    brackets: bool = True,
    text_needed: bool = True,
) -> Split:
    """The utterances of `part` of the set of `duration`, of some languages and sources or of all.

    Args:
        root: the unpacked folder.
        part, duration: dev and test are those of ten minutes in either set.
        languages, sources: folder names; None for all that are there.
        few_shot_rule: train few-shot languages on the five named utterances only (the multilingual tracks do).
        brackets: bracketed remarks are taken out of the text before it counts as empty (the multilingual tracks do).
        text_needed: leave out train and dev lines whose text is then empty (ESPnet `asr.sh`, "Remove empty text").
            Where a reference begins with its language, none is empty, and such a line counts as its language alone.

    Raises:
        MlSuperbError: the folder has no corpus of the benchmark; a language lacks its transcript, or it is not UTF-8.
    """
    limited = part != "test"

    def unusable(row: _Row) -> str | None:
        if row.reason is not None or not (limited and text_needed):
            return row.reason
        return None if reference(row.text, brackets=brackets) else "no text but punctuation"

    rows = _rows(Path(root), part, duration, languages, sources, few_shot_rule)
    rows = [row._replace(reason=unusable(row)) for row in rows]
    recordings = iter(examine_all([row.path for row in rows if row.reason is None], title=f"looking at {part}"))
    split = Split([], [])
    heard: dict[str, Path] = {}  # id -> folder: over all of the part, which is judged by ids
    for row in rows:
        seconds, reason, first = 0.0, row.reason, heard.get(row.id)
        if reason is None:
            seconds, reason = next(recordings)
        if first is not None:
            where = "on an earlier line" if first == row.folder else f"in {first.parent.name}/{first.name}"
            reason = f"id stands {where} already"
        elif reason is None and limited and not SHORTEST_SECONDS < seconds < LONGEST_SECONDS:
            reason = f"not between {SHORTEST_SECONDS:g} and {LONGEST_SECONDS:g} s"
        if reason is not None:
            split.left_out.append(LeftOut(row.place, reason))
            continue
        heard[row.id] = row.folder
        split.utterances.append(row.utterance(seconds))
    return split


class _Row(NamedTuple):
    """A transcript's line that counts, of the language's `folder`; `reason`: why it is not used, as far as it tells."""

    place: str
    folder: Path
    id: str
    text: str
    reason: str | None

    @property
    def path(self) -> Path:
        return self.folder / "wav" / f"{self.id}.wav"

    def utterance(self, seconds: float) -> Utterance:
        group, phones = self.id.split("_")[-2], (self.folder / PHONES_MARK).exists()
        source, language = self.folder.parent.name, self.folder.name
        return Utterance(self.id, source, language, group, self.path, seconds, self.text, phones)


def _rows(
    root: Path,
    part: Part,
    duration: Duration,
    languages: Collection[str] | None,
    sources: Collection[str] | None,
    few_shot_rule: bool,
) -> Iterator[_Row]:
    """All lines that the rules do not take away, in order."""
    skipped, few_shot = _listed("silent.txt"), few_shot_utterances()
    for folder in _language_folders(root, languages, sources):
        transcript = folder / f"transcript_{duration if part == 'train' else '10min'}_{part}.txt"
        if not transcript.is_file():
            raise MlSuperbError(f"{transcript} is missing: is {root} the whole benchmark, as unpacked?")
        for number, line in lines_of(transcript):
            id, *rest = line.split(maxsplit=2)
            reason = None
            if id in skipped:
                reason = "listed as without sound"
            elif part == "train" and few_shot_rule and folder.name in FEW_SHOT and id not in few_shot:
                continue  # by the rules of the benchmark, nothing to report
            elif len(rest) < 2:
                reason = "no text"
            elif len(id.split("_")) < 3:
                reason = "id does not end in _LANGUAGE_NUMBER"
            yield _Row(f"{transcript}:{number}", folder, id, rest[1].rstrip() if len(rest) > 1 else "", reason)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a table with their numbers, from 1; empty ones are left out. Raises MlSuperbError: it is not UTF-8."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise MlSuperbError(
                f"{path}, line {number} is not UTF-8 (byte {line[error.start]:#04x}): unpack it anew, or convert it"
            ) from error
        if text.strip():
            yield number, text


def missing_sources(root: Path) -> list[str]:
    """Those of the benchmark's corpora (`SOURCES`) of which the folder has no language: without them it is not whole.

    Raises MlSuperbError: it has none at all.
    """
    there = {folder.parent.name for folder in _language_folders(Path(root), None, None)}
    return [source for source in SOURCES if source not in there]


def ignored_folders(root: Path) -> list[str]:
    """Visible folders of `root` that are none of the benchmark's corpora: nothing in them is read.

    Raises MlSuperbError: the folder has no corpus of the benchmark.
    """
    _language_folders(Path(root), None, None)
    names = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
    return [name for name in names if name not in SOURCES and not name.startswith(".")]


def unsayable_languages(root: Path) -> list[str]:
    """SOURCE/LANGUAGE of the folders whose language no hypothesis can name: neither xxx nor xxx_xxx (`said_language`).

    Raises MlSuperbError: the folder has no corpus of the benchmark.
    """
    folders = _language_folders(Path(root), None, None)
    return [f"{folder.parent.name}/{folder.name}" for folder in folders if not can_be_said(folder.name)]


def missing_few_shot(root: Path, *, duration: Duration) -> list[str]:
    """Utterances that few-shot languages are to be trained on (`few_shot_utterances`) and that no transcript names.

    Of the languages that the folder has, in the order of their names. One that a transcript names, but that cannot be
    used, is in `Split.left_out`. Raises MlSuperbError: the folder has no corpus of the benchmark.
    """
    folders = _language_folders(Path(root), FEW_SHOT, None)
    there = {folder.name for folder in folders}
    told: set[str] = set()
    for folder in folders:
        transcript = folder / f"transcript_{duration}_train.txt"
        if transcript.is_file():
            told.update(line.split(maxsplit=1)[0] for _, line in lines_of(transcript))
    return sorted(id for id in few_shot_utterances() - told if id.split("_")[-2] in there)


def untold_recordings(root: Path) -> Iterator[Path]:
    """Recordings that no transcript of their folder names: audio without text."""
    for folder in _language_folders(Path(root), None, None):
        told = {
            line.split(maxsplit=1)[0]
            for transcript in folder.glob("transcript_*.txt")
            for _, line in lines_of(transcript)
        }
        yield from (path for path in sorted((folder / "wav").glob("*.wav")) if path.stem not in told)


def _language_folders(root: Path, languages: Collection[str] | None, sources: Collection[str] | None) -> list[Path]:
    if not root.is_dir():
        raise MlSuperbError(f"{root} is no folder: give the benchmark as unpacked")
    there = [source for source in SOURCES if (root / source).is_dir()]
    if not there:
        raise MlSuperbError(f"{root} has none of the benchmark's folders ({', '.join(SOURCES)}): is it one level off?")
    return [
        folder
        for source in there
        if sources is None or source in sources
        for folder in sorted((root / source).iterdir())
        if folder.is_dir() and (languages is None or folder.name in languages)
    ]


def is_miniature(root: Path) -> bool:
    """Whether the folder was written by `data_pipelines.mlsuperb.miniature`."""
    readme = Path(root) / "README.md"
    return readme.is_file() and readme.read_text("utf-8", errors="replace").startswith(MINIATURE_TITLE)


def few_shot_utterances() -> frozenset[str]:
    """The utterances that few-shot languages are trained on, five of each."""
    return _listed("few_shot.txt")


def _listed(name: str) -> frozenset[str]:
    """The utterances of a list beside this file."""
    return frozenset((Path(__file__).parent / name).read_text("utf-8").split())
