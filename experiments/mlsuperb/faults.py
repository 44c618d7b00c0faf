"""What is wrong with the data of a track, place by place: left_out.tsv. results.json has the counts, and the first."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipelines.atomic import whole_file
from data_pipelines.mlsuperb import challenge
from data_pipelines.mlsuperb.layout import (
    PARTS,
    Duration,
    ignored_folders,
    is_miniature,
    missing_few_shot,
    missing_sources,
    untold_recordings,
)
from data_pipelines.mlsuperb.tracks import Track
from experiments.mlsuperb.judging import infeasible
from experiments.mlsuperb.protocol import incomplete

# Kinds of them, as they stand in left_out.tsv.
LEFT_OUT, UNTOLD, INFEASIBLE = "left out", "recording without text", "more tokens than frames"
EMPTY, UNSEEN = "empty reference", "tokens that training never saw"
NO_SOURCE, NO_FEW_SHOT, IGNORED = "corpus not there", "few-shot utterance not there", "folder not read"
COLUMNS = ("part", "fault", "place", "reason")


class Fault(NamedTuple):
    """One line of left_out.tsv.

    Attributes:
        part: train, dev or test; "" where it is of none.
        kind: one of those above.
        place: a file and line, a recording, a folder, or an utterance's id.
        reason: why, in words; or the tokens.
    """

    part: str
    kind: str
    place: str
    reason: str


class Folder(NamedTuple):
    """What there is to say of the benchmark's folder, whatever the track.

    Attributes:
        root: where it is.
        miniature: whether it is one.
        untold: recordings that no transcript names.
        missing_sources, missing_few_shot: corpora, and utterances to be trained on, that are not there.
        ignored: folders that are none of its corpora.
    """

    root: Path
    miniature: bool = False
    untold: Sequence[Path] = ()
    missing_sources: Sequence[str] = ()
    missing_few_shot: Sequence[str] = ()
    ignored: Sequence[str] = ()

    def lacks(self, track: Track) -> list[str]:
        """What a track lacks of the benchmark as released."""
        return incomplete(track, sources=self.missing_sources, few_shot=self.missing_few_shot)


def read_folder(root: Path, *, duration: Duration) -> Folder:
    """Raises MlSuperbError: the folder is not the benchmark's."""
    few_shot, ignored = missing_few_shot(root, duration=duration), ignored_folders(root)
    return Folder(root, is_miniature(root), list(untold_recordings(root)), missing_sources(root), few_shot, ignored)


def challenge_folder(root: Path, *, judged_on: challenge.Development) -> Folder:
    """Of ML-SUPERB 2.0's challenge. Raises MlSuperbError: a file is missing."""
    return Folder(root, untold=challenge.untold_recordings(root, judged_on=judged_on))


def faults_of(track: Track, folder: Folder, *, frames_of: Callable[[int], int]) -> list[Fault]:
    """Every fault, by kind. `frames_of`: samples -> frames in which tokens are spelled."""
    found = [Fault(part, LEFT_OUT, *each) for part in PARTS for each in track.left_out[part]]
    found += [Fault("", UNTOLD, str(path), "in no transcript") for path in folder.untold]
    found += [Fault("", NO_SOURCE, name, "") for name in folder.missing_sources]
    found += [Fault("train", NO_FEW_SHOT, id, "in no transcript") for id in folder.missing_few_shot]
    found += [Fault("", IGNORED, name, "none of the benchmark's corpora") for name in folder.ignored]
    for part in PARTS:
        found += [Fault(part, INFEASIBLE, id, "") for id in infeasible(track.parts[part], frames_of)]
    for part in PARTS:
        for each, unseen in track.with_unseen(part):
            found.append(Fault(part, UNSEEN, each.utterance.id, " ".join(map(visible, dict.fromkeys(unseen)))))
    return found + [Fault("test", EMPTY, each.utterance.id, "") for each in track.parts["test"] if not each.text]


def visible(token: str) -> str:
    """A token; white space by its number: "U+00A0"."""
    return f"U+{ord(token):04X}" if token.isspace() else token


def write_faults(path: Path, faults: Sequence[Fault]) -> None:
    """left_out.tsv: `COLUMNS`, and a line a fault."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(" ".join(value.split()) for value in each) for each in (COLUMNS, *faults)]
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
