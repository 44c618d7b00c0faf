"""LibriSpeech: LibriSpeech/<subset>/<speaker>/<chapter>/, with <id>.flac and <speaker>-<chapter>.trans.txt.

Layout: Panayotov et al., LibriSpeech (2015), and openslr.org/12; read in the same way by lhotse
(lhotse/recipes/librispeech.py). A line of .trans.txt is "<id> <TEXT>", an <id> is
<speaker>-<chapter>-<number>. Speakers are the numbers of SPEAKERS.TXT.
"""

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.collector import Collector, folders_in, lines_of, wrong_layout
from data_pipelines.corpora.listing import SPLITS
from data_pipelines.folders import files_below

LAYOUT = "LibriSpeech/<subset>/<speaker>/<chapter>/*.flac, with subsets such as train-clean-100 and dev-other"


def read(folder: str | Path, *, subsets: Sequence[str] = ()) -> Listing:
    """Lists the `subsets` (default: all that are there), given LibriSpeech/ or the folder that holds it.

    Audio without a transcript is listed with an empty text, a transcript without audio is rejected.

    Raises CorpusError: no such layout, a subset that is not there.
    """
    out = Collector(folder, corpus="librispeech", licence="CC-BY-4.0")
    root = out.folder / "LibriSpeech" if (out.folder / "LibriSpeech").is_dir() else out.folder
    found = {place.name: place for place in folders_in(root) if place.name.split("-")[0] in SPLITS}
    if not found:
        raise wrong_layout(out.folder, LAYOUT)
    if missing := [name for name in subsets if name not in found]:
        raise CorpusError(f"{root} has no subset {', '.join(missing)}; it has {', '.join(found)}")
    for name in subsets or found:
        texts, audio = {}, []
        for path in files_below(found[name]):
            if path.name.endswith(".trans.txt"):
                for _, line in lines_of(path):
                    utterance, _, text = line.partition(" ")
                    texts[path.parent / f"{utterance}.flac"] = text
            elif path.suffix == ".flac":
                audio.append(path)
        for path in audio:
            out.take(
                path,
                language="eng",
                split=SPLITS[name.split("-")[0]],
                speaker=path.stem.split("-")[0],
                text=texts.pop(path, ""),
            )
        for path in texts:
            out.reject(path, "the chapter's .trans.txt has it, but there is no audio")
    return out.listing(LAYOUT)
