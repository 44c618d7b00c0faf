"""A miniature in exactly the benchmark's layout, from a small corpus with texts, so that every track runs on a laptop.

What is heard and written is real, but for two things, both said in the folder's README: languages that the small
corpus lacks are filled with recordings of others (`SUBSTITUTES`), and the texts of the two phone tracks are made-up
phones. Its figures say that the code runs, and nothing about a model's standing in the benchmark.
"""

import csv
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import soundfile
from tqdm import tqdm

from data_pipelines.atomic import whole_file
from data_pipelines.audio import decode
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.mlsuperb.layout import FEW_SHOT, MINIATURE_TITLE, PHONES_MARK, MlSuperbError, few_shot_utterances


class Place(NamedTuple):
    """A corpus and a language of the benchmark."""

    source: str
    language: str


# Corpora of the demo collection -> those of the benchmark.
SOURCE_OF = {"asterisk-core-sounds": "mls", "klettres": "fleurs", "tuxpaint-stamps": "commonvoice"}
# (language, corpus) of the demo collection -> where the monolingual tracks look for it, beside or in place of its own.
MOVED = {
    ("eng", "klettres"): Place("nchlt", "eng"),
    ("eng", "tuxpaint-stamps"): Place("voxpopuli", "eng"),
    ("fra", "asterisk-core-sounds"): Place("voxforge", "fra"),
    ("fra", "tuxpaint-stamps"): Place("voxpopuli", "fra"),
    ("deu", "klettres"): Place("swc", "deu"),
    ("rus", "asterisk-core-sounds"): Place("M-AILABS", "rus"),
}
# Of languages that it has not: recordings and texts of another, under the name of the one that is missing.
SUBSTITUTES = {
    ("nld", "tuxpaint-stamps"): Place("voxpopuli", "deu"),
    ("nds", "klettres"): Place("ALFFA", "swa"),
    ("bel", "tuxpaint-stamps"): Place("NST", "swe"),
    ("hun", "klettres"): Place("mexico-el", "xty"),
    ("mal", "klettres"): Place("commonvoice", "jpn"),
    ("ell", "tuxpaint-stamps"): Place("fleurs", "cmn"),
}
PHONE_FIXTURES = {"jpn": "a i u e o k s t n h m r".split(), "cmn": "b p m f a1 o2 e3 i4 u1 ang2 sh zh".split()}
PREFIX = {"commonvoice": "cv", "googlei18n_asr": "googlei18n-asr", "googlei18n_tts": "googlei18n-tts"}


class _Row(NamedTuple):
    """A recording of the small corpus on its way: where it goes, as what, with which text, in which split."""

    path: Path
    place: Place
    id: str
    text: str
    split: str


def write_miniature(audio: Path, out: Path, *, progress: bool = False) -> int:
    """Writes the miniature of the folder `audio` (a table `manifest.tsv` with texts) to `out`; returns its utterances.

    The first half of each training split is the set of ten minutes, all of it that of an hour. Recordings without text
    are left out. Raises MlSuperbError if the table lacks a column or `out` holds something already.
    """
    audio, out = Path(audio), Path(out)
    if out.exists() and any(out.iterdir()):
        raise MlSuperbError(f"{out} is not empty: give a new folder, or delete it")
    rows = _planned(audio)
    transcripts: dict[Path, list[str]] = defaultdict(list)
    for row in tqdm(rows, desc="miniature", unit="clip", disable=not progress, mininterval=1.0):
        folder = out / row.place.source / row.place.language
        (folder / "wav").mkdir(parents=True, exist_ok=True)
        waveform = decode(row.path, name=str(row.path)).waveform
        soundfile.write(folder / "wav" / f"{row.id}.wav", waveform, SAMPLE_RATE, "PCM_16")
        for name in ("10min_train", "1h_train", "10min_dev", "10min_test"):
            transcripts[folder / f"transcript_{name}.txt"] += []
        line = f"{row.id} {row.path.stem} {row.text}\n"
        transcripts[folder / f"transcript_{'1h' if row.split == 'train' else '10min'}_{row.split}.txt"].append(line)
    for path, lines in transcripts.items():
        if path.name == "transcript_10min_train.txt":
            every = transcripts[path.with_name("transcript_1h_train.txt")]
            named = few_shot_utterances()
            lines = [line for n, line in enumerate(every) if n % 2 == 0 or line.split(" ", 1)[0] in named]
        path.write_text("".join(lines), "utf-8")
    for language in PHONE_FIXTURES:
        for folder in out.glob(f"*/{language}"):
            (folder / PHONES_MARK).write_text("The texts here are phones, separated by spaces, and made up.\n")
    with whole_file(out / "README.md") as temporary:
        temporary.write_text(_readme(rows))
    return len(rows)


def _planned(audio: Path) -> list[_Row]:
    table = audio / "manifest.tsv"
    if not table.is_file():
        raise MlSuperbError(f"{table} does not exist: a miniature is made of a folder with such a table")
    with open(table, encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for column in ("path", "language", "source", "split", "text"):
        if found and column not in found[0]:
            raise MlSuperbError(f"{table} has no column {column!r}")
    rows: list[_Row] = []
    named = {language: sorted(i for i in few_shot_utterances() if f"_{language}_" in i) for language in FEW_SHOT}
    numbers: dict[Place, int] = defaultdict(int)
    for row in found:
        key, text = (row["language"], row["source"]), " ".join(row["text"].split())
        if not text or row["source"] not in SOURCE_OF:
            continue
        place = SUBSTITUTES.get(key) or MOVED.get(key) or Place(SOURCE_OF[row["source"]], row["language"])
        if row["split"] == "train" and named.get(place.language):  # one of the five that few-shot training names
            id = named[place.language].pop(0)
            prefix = id.split("_")[0]
            source = next((name for name, short in PREFIX.items() if short == prefix), prefix)
            place = place._replace(source=source)
        else:
            numbers[place] += 1
            id = f"{PREFIX.get(place.source, place.source)}_{place.language}_{900_000 + numbers[place]:06d}"
        if place.language in PHONE_FIXTURES:
            phones = PHONE_FIXTURES[place.language]
            text = " ".join(phones[ord(character) % len(phones)] for character in text if not character.isspace())
        rows.append(_Row(audio / row["path"], place, id, text, row["split"]))
    return rows


def _readme(rows: list[_Row]) -> str:
    languages = sorted({row.place.language for row in rows})
    lines = [
        MINIATURE_TITLE,
        "",
        f"{len(rows):,} utterances, {len(languages)} languages. It is for trying the code: its figures say nothing",
        "about a model's standing in the benchmark. Recordings keep the licences of the corpus that it was made of.",
        "",
        "Recordings that stand in for another language:",
        "",
        *(
            f"- {place.source}/{place.language}: {language} ({source})"
            for (language, source), place in SUBSTITUTES.items()
        ),
        "",
        f"Made-up phones in place of texts: {', '.join(sorted(PHONE_FIXTURES))}.",
        "",
    ]
    return "\n".join(lines)
