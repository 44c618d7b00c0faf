"""ML-SUPERB 2.0's challenge (Interspeech 2025): its data set as ESPnet's recipe lays it out, and as it is published.

    ROOT/data/{train,dev,dev_dialect}/text       lines `ID [xxx] TEXT`, the language first
    ROOT/data/{train,dev,dev_dialect}/wav.scp    lines `ID PATH`, below ROOT
    ROOT/data/raw_audio/ID.wav

That is ROOT = ESPnet's `egs2/ml_superb2/asr1`, after its `local/download.py`. `unpack` writes the same from a local
copy of the data set (`espnet/ml_superb_hf`: Parquet files `data/SPLIT-*.parquet` with the columns id, language, audio,
text), with the two changes that the script makes of texts. One joint track: train, dev, and as the test part one of the
two development sets, as in the recipe's `run.sh`: the evaluation's own data are not public. The figures are
`experiments.mlsuperb.scoring.challenge_scores`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from tqdm import tqdm

from data_pipelines.atomic import whole_file
from data_pipelines.audio import decode
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.mlsuperb.layout import (
    LONGEST_SECONDS,
    SHORTEST_SECONDS,
    LeftOut,
    MlSuperbError,
    Part,
    Split,
    Utterance,
    lines_of,
)
from data_pipelines.mlsuperb.recordings import examine, examine_all
from data_pipelines.mlsuperb.texts import characters, listed, single_spaced
from data_pipelines.mlsuperb.tracks import BLANK, END, UNKNOWN, Example, Track

Development = Literal["dev", "dev_dialect"]
SPLITS = ("train", "dev", "dev_dialect")
COLUMNS = ("id", "audio", "text")
_SYMBOL = re.compile(r"\[([a-z]{3})\](.*)", re.DOTALL)
_ID = re.compile(r"[\w.-]+", re.ASCII)  # it becomes the name of a file


def matches(root: Path) -> bool:
    """Whether `root` is laid out so."""
    return (Path(root) / "data" / "train" / "text").is_file()


def read_challenge(root: Path, *, judged_on: Development = "dev") -> Track:
    """The challenge's track: its test part is the development set `judged_on`.

    Train and dev utterances outside 0.1 to 20 s are left out (ESPnet `asr.sh`), and lines without language, text or
    recording; each is named with its reason. Raises MlSuperbError: a file is missing, or a part is empty.
    """
    root, splits = Path(root), {}
    names: dict[Part, str] = {"train": "train", "dev": "dev", "test": judged_on}
    for part, name in names.items():
        splits[part] = _read(root, name, limited=part != "test")
        if not splits[part].utterances:
            reasons = ", ".join(f"{count} {reason}" for reason, count in splits[part].reasons().most_common())
            raise MlSuperbError(f"{root}: data/{name} has no utterance{f': {reasons}' if reasons else ''}")
    symbols = sorted({f"[{each.language}]" for each in splits["train"].utterances})
    parts = {
        part: [Example(e, e.text, characters(single_spaced(e.text), symbols=symbols)) for e in split.utterances]
        for part, split in splits.items()
    }
    counts = Counter(token for example in parts["train"] for token in listed(example.tokens))
    known = sorted(counts, key=lambda token: -counts[token])  # a stable sort, as in `tracks.read_track`
    left_out = {part: split.left_out for part, split in splits.items()}
    tokens = [BLANK, UNKNOWN, *known, END]
    return Track(f"challenge {judged_on}", "joint", "1h", parts, left_out, tokens, symbols, "character")


def _folder(root: Path, name: str) -> Path:
    folder = root / "data" / name
    for file in ("text", "wav.scp"):
        if not (folder / file).is_file():
            raise MlSuperbError(
                f"{folder / file} is missing: {root} is not laid out as ESPnet's egs2/ml_superb2/asr1 is after its "
                "local/download.py; `python -m data_pipelines challenge DATASET --out DIR` writes such a folder"
            )
    return folder


def _read(root: Path, name: str, *, limited: bool) -> Split:
    folder, split = _folder(root, name), Split([], [])
    recordings = dict(line.split(maxsplit=1) for _, line in lines_of(folder / "wav.scp") if len(line.split()) > 1)
    examine_all([root / place.strip() for place in recordings.values()], title=f"looking at {name}")  # remembered
    seen: set[str] = set()
    for number, line in lines_of(folder / "text"):
        id, _, text = line.strip().partition(" ")
        found, seconds, path = _SYMBOL.match(text.strip()), 0.0, root / recordings.get(id, "").strip()
        if found is None:
            reason = "no language before the text"
        elif not found.group(2).strip():
            reason = "no text"
        elif id in seen:
            reason = "id stands on an earlier line already"
        elif id not in recordings:
            reason = "not in wav.scp"
        else:
            seconds, reason = examine(path)
            if reason is None and limited and not SHORTEST_SECONDS < seconds < LONGEST_SECONDS:
                reason = f"not between {SHORTEST_SECONDS:g} and {LONGEST_SECONDS:g} s"
        if reason is not None:
            split.left_out.append(LeftOut(f"{folder / 'text'}:{number}", reason))
            continue
        seen.add(id)
        language, source = found.group(1), id.rsplit("_", 2)[0]
        split.utterances.append(Utterance(id, source, language, language, path, seconds, text.strip()))
    return split


def untold_recordings(root: Path, *, judged_on: Development = "dev") -> list[Path]:
    """Recordings of the track's wav.scp files that have no line in the text beside it: audio without text.

    Raises MlSuperbError: a file is missing or not UTF-8.
    """
    found = []
    for name in ("train", "dev") if judged_on == "dev" else ("train", "dev", judged_on):
        folder = _folder(Path(root), name)
        told = {line.split(maxsplit=1)[0] for _, line in lines_of(folder / "text")}
        recordings = (line.split(maxsplit=1) for _, line in lines_of(folder / "wav.scp"))
        found += [Path(root) / row[1].strip() for row in recordings if len(row) > 1 and row[0] not in told]
    return found


class Unpacked(NamedTuple):
    """How many utterances of each split were written, and what was not."""

    counts: dict[str, int]
    left_out: list[LeftOut]


def unpack(dataset: Path, out: Path, *, progress: bool = False) -> Unpacked:
    """Writes a local copy of the published data set as the recipe lays it out; what is there already is kept.

    Recordings become 16 kHz mono WAV; one that is whole is not written again, so that a stopped run goes on. Texts are
    written last. Raises MlSuperbError: no such files, or a column is missing.
    """
    dataset, out, counts, left_out = Path(dataset), Path(out), {}, []
    files = {name: sorted(dataset.glob(f"data/{name}-*.parquet")) for name in SPLITS}
    for name in ("train", "dev"):
        if not files[name]:
            raise MlSuperbError(f"{dataset} has no data/{name}-*.parquet: give a local copy of espnet/ml_superb_hf")
    sound = out / "data" / "raw_audio"
    sound.mkdir(parents=True, exist_ok=True)
    for name, paths in files.items():
        if not paths:
            continue
        texts, places = [], []
        rows = sum(_metadata(path).num_rows for path in paths)
        with tqdm(total=rows, desc=name, unit="clip", disable=not progress, mininterval=1.0) as bar:
            for place, row in _rows(paths):
                bar.update()
                id, audio = str(row["id"]), row["audio"] or {}
                if not _ID.fullmatch(id) or not audio.get("bytes"):
                    reason = "no audio" if _ID.fullmatch(id) else "an id that cannot be the name of a file"
                    left_out.append(LeftOut(place, reason))
                    continue
                path = sound / f"{id}.wav"
                if not path.exists():
                    try:
                        waveform = decode(audio["bytes"], name=place).waveform
                    except ValueError as error:
                        left_out.append(LeftOut(place, str(error)))
                        continue
                    with whole_file(path) as temporary:
                        soundfile.write(temporary, waveform, SAMPLE_RATE, "PCM_16", format="WAV")
                texts.append(f"{id} {published_text(id, row['text'] or '', split=name)}\n")
                places.append(f"{id} data/raw_audio/{id}.wav\n")
        for file, lines in (("text", texts), ("wav.scp", places)):
            (out / "data" / name).mkdir(parents=True, exist_ok=True)
            with whole_file(out / "data" / name / file) as temporary:
                temporary.write_text("".join(lines), "utf-8")
        counts[name] = len(texts)
    return Unpacked(counts, left_out)


def published_text(id: str, text: str, *, split: str) -> str:
    """A text of the data set as the recipe trains on it (`local/download.py`): Japanese has one symbol, and utterances
    of `ms_speech` in the dialects' set, which all say [hin], have that of their id."""
    if split == "dev_dialect" and "ms_speech" in id and len(id.split("_")) > 2:
        text = text.replace("[hin]", f"[{id.split('_')[2]}]")
    return re.sub("[\r\n]+", " ", text.replace("[org_jpn]", "[jpn]").strip())


def _metadata(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise MlSuperbError(f"{path} cannot be read as Parquet: {error}") from error


def _rows(paths: list[Path]) -> Iterator[tuple[str, dict]]:
    """Every row of the files with its place, a row group in memory at a time."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise MlSuperbError(f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
            number = 0
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, columns=list(COLUMNS)).to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
