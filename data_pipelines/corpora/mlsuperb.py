"""ML-SUPERB's folder as released: <corpus>/<language>/wav/*.wav, with transcript_{10min,1h}_train.txt, _dev and _test.

Layout: `data_pipelines.mlsuperb.layout`. The benchmark's rules are not applied: all that a transcript names is listed,
few-shot languages whole, and how long a clip may be says `prepare`. The training split is that of an hour, in which the
ten minutes are. Speakers are not told. Each corpus has a licence of its own, which no file names.
"""

from pathlib import Path

from data_pipelines.corpora import Listing
from data_pipelines.corpora.collector import Collector, audio_below, folders_in, lines_of, wrong_layout
from data_pipelines.corpora.listing import SPLITS
from data_pipelines.mlsuperb.layout import SOURCES

LAYOUT = "<corpus>/<language>/wav/*.wav with transcript_1h_train.txt, where <corpus> is one of " + ", ".join(SOURCES)
# In this order, so that what is also in another part is not trained on.
TABLES = (("test", "10min_test"), ("dev", "10min_dev"), ("train", "1h_train"), ("train", "10min_train"))


def read(folder: str | Path) -> Listing:
    """Lists all languages of all of the benchmark's corpora that are in `folder`; the corpus is the folder's name.

    A folder of two codes (org_jpn) speaks the second. A recording of two parts is listed for test, else for dev.
    Rejected are lines without a recording or of two words, recordings that no transcript names, and folders that are
    none of the benchmark's corpora.

    Raises CorpusError: no such layout, a language that ISO 639 does not know, a transcript that is not UTF-8.
    """
    out = Collector(folder, corpus="mlsuperb")
    found = folders_in(out.folder)
    if not any(place.name in SOURCES for place in found):
        raise wrong_layout(out.folder, LAYOUT)
    for source in found:
        if source.name not in SOURCES:
            out.reject(source, "none of the benchmark's corpora")
            continue
        for place in folders_in(source):
            _read_language(out, place, out.language_of(place.name.split("_")[-1], where=place))
    return out.listing(LAYOUT)


def _read_language(out: Collector, place: Path, code: str) -> None:
    told: dict[Path, str] = {}
    for part, name in TABLES:
        table = place / f"transcript_{name}.txt"
        if not table.is_file():
            continue
        for line, content in lines_of(table):
            fields = content.split(maxsplit=2)
            path = place / "wav" / f"{fields[0]}.wav"
            if len(fields) < 3:
                out.reject(table, f"line {line}: not an id, a name and a text")
            elif path not in told:
                out.take(path, language=code, split=SPLITS[part], text=fields[2], corpus=place.parent.name)
            elif told[path] != part:
                out.reject(path, f"{table.name} line {line}: it is in {told[path]} too, and listed there")
            told.setdefault(path, part)
    for path in audio_below(place / "wav"):
        if path not in told:
            out.reject(path, "no transcript names it")
