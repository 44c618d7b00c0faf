"""VoxLingua107: <code>/*.wav, one folder a language, and dev/<code>/*.wav.

Layout: Valk and Alumäe, VoxLingua107 (2021), and bark.phon.ioc.ee/voxlingua107; SpeechBrain's recipe unpacks the zips
into train/ and dev/. A file is <YouTube id>__U__S<number>---<start>-<end>.wav, of 16 kHz mono. There is no text.
"""

from pathlib import Path

from data_pipelines.corpora import Listing
from data_pipelines.corpora.collector import Collector, audio_below, folders_in, wrong_layout
from data_pipelines.languages import UnknownLanguage, normalise
from data_pipelines.manifest import Split

LAYOUT = "<code>/*.wav (or train/<code>/*.wav), and dev/<code>/*.wav"
SPOKEN = {"zh": "cmn"}  # "Mandarin Chinese" in the corpus's list of languages; elsewhere zh may be any Chinese


def read(folder: str | Path) -> Listing:
    """Lists the languages' folders for training, those of dev/ as the dev set. The speaker is the video.

    A training clip from a video that is in dev/ of the same language is rejected (ESPnet's recipe clears them too).
    Folders that are no language are rejected once each, with their name.

    Raises CorpusError: no folder with audio that is a language.
    """
    out = Collector(folder, corpus="voxlingua107", licence="CC-BY-4.0")
    videos: dict[str, set[str]] = {}
    dev = out.folder / "dev"
    train = out.folder / "train" if (out.folder / "train").is_dir() else out.folder
    taken = 0
    for root, split in ((dev, Split.DEV), (train, Split.TRAIN)):
        for place in folders_in(root):
            if place in (dev, train):
                continue
            try:
                code = SPOKEN.get(place.name) or normalise(place.name)
            except UnknownLanguage as error:
                out.reject(place, str(error))
                continue
            for path in audio_below(place):
                taken += 1
                video = path.stem.split("__U__")[0]
                if split is Split.DEV:
                    videos.setdefault(code, set()).add(video)
                elif video in videos.get(code, ()):
                    out.reject(path, "its video is in the dev set")
                    continue
                out.take(path, language=code, split=split, speaker=video)
    if not taken:
        raise wrong_layout(out.folder, LAYOUT)
    return out.listing(LAYOUT)
