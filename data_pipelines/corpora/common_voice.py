"""Common Voice, any release: <release>/<locale>/{clips/*.mp3, train.tsv, dev.tsv, test.tsv, ...}.

Layout: Mozilla's release notes (github.com/common-voice/cv-dataset); read in the same way by lhotse
(lhotse/recipes/commonvoice.py). `path` is a file in clips/, without ".mp3" in the first releases (DeepSpeech's
bin/import_cv2.py adds it too); `client_id` is the contributor. All other columns came and went: sentence (always),
sentence_id and sentence_domain (17 on), locale, variant, accents (accent before 8), segment.

The very first release, cv_corpus_v1 of 2017, English alone, has CSV tables in its own folder:
cv-valid-{train,dev,test}, cv-other-{train,dev,test}, cv-invalid; `filename` is a path from there (in Kaggle's copy each
folder lies in another of its name), `text` the sentence (read in the same way by DeepSpeech's bin/import_cv.py).
Contributors are not told.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.collector import Collector, folders_in, table_of, wrong_layout
from data_pipelines.corpora.listing import SPLITS
from data_pipelines.manifest import Split

LAYOUT = "<release>/<locale>/ or <locale>/, a locale with clips/ and train.tsv"
EXTRA = ("validated", "other", "invalidated")
FIRST = "cv-valid-train.csv"  # the first release has it
_FIRST_EXTRA = {"validated": (), "other": ("other-train", "other-dev", "other-test"), "invalidated": ("invalid",)}


def read(
    folder: str | Path, *, language: str | None = None, languages: Sequence[str] = (), extra: Sequence[str] = ()
) -> Listing:
    """Lists train.tsv, dev.tsv and test.tsv of one locale, or of each locale in a release.

    `extra` names further tables to train on: "validated" (which holds the three and all repetitions of a sentence, most
    of the hours of big languages), "other" (not yet voted on), "invalidated" (voted down). A clip that an earlier table
    has is passed over; one whose contributor or sentence is in dev or test is rejected, so that both stay held out.
    `languages` keeps these locales only, as their folders are named. `language` says what one locale's folder speaks
    where its name does not.

    Raises CorpusError: no such layout, no such locale, `extra` of another name, a locale that ISO 639 does not know, a
    table that is not UTF-8 or has no `path` or `client_id`.
    """
    if unknown := [name for name in extra if name not in EXTRA]:
        raise CorpusError(f"extra names {', '.join(unknown)}; known: {', '.join(EXTRA)}")
    out = Collector(folder, corpus="commonvoice", licence="CC0-1.0")  # as the stages and the presets call it
    if (out.folder / FIRST).is_file():
        _read_first(out, out.language_of(language or "en", where=out.folder), extra)
        return out.listing(LAYOUT)
    locales = [out.folder] if _is_locale(out.folder) else [path for path in folders_in(out.folder) if _is_locale(path)]
    if not locales:
        raise wrong_layout(out.folder, LAYOUT)
    if missing := set(languages) - {path.resolve().name for path in locales}:
        raise CorpusError(f"{folder} has no locale {', '.join(sorted(missing))}")
    for locale in locales:
        name = locale.resolve().name
        if not languages or name in languages:
            _read_locale(out, locale, out.language_of(language or name, where=locale), extra)
    return out.listing(LAYOUT)


def _is_locale(folder: Path) -> bool:
    return (folder / "clips").is_dir() and any((folder / f"{name}.tsv").is_file() for name in ("train", *EXTRA))


def _read_locale(out: Collector, locale: Path, code: str, extra: Sequence[str]) -> None:
    listed, held_out = set(), set()
    usual = ("dev", "test", "train")
    if not extra and not any((locale / f"{table}.tsv").is_file() for table in usual):
        out.reject(locale, f"has no train.tsv, as delta releases have none: give extra, of {', '.join(EXTRA)}")
    for table in (*usual, *extra):
        path = locale / f"{table}.tsv"
        if not path.is_file():
            if table in extra:
                raise CorpusError(f"{locale} has no {table}.tsv")
            continue  # locales with little speech have no dev, or no test
        split = SPLITS.get(table, Split.TRAIN)
        for line, row in table_of(path, needed=("client_id", "path")):
            if row is None or not row["path"]:
                out.reject(path, f"line {line}: {'no path' if row else 'another number of fields than the header has'}")
                continue
            clip = row["path"] if Path(row["path"]).suffix else f"{row['path']}.mp3"
            if clip in listed:
                if table not in extra:
                    out.reject(locale / "clips" / clip, f"{path.name} line {line}: is in an earlier table too")
                continue
            listed.add(clip)
            marks = {("speaker", row["client_id"]), ("sentence", row.get("sentence", ""))} - {("sentence", "")}
            if split is not Split.TRAIN:
                held_out |= marks
            elif table in extra and not marks.isdisjoint(held_out):
                out.reject(locale / "clips" / clip, "its contributor or its sentence is in dev or test")
                continue
            out.take(
                locale / "clips" / clip,
                language=code,
                split=split,
                speaker=row["client_id"],
                text=row.get("sentence", ""),
            )


def _read_first(out: Collector, code: str, extra: Sequence[str]) -> None:
    held_out = set()
    more = [table for name in extra for table in _FIRST_EXTRA[name]]
    for table in ("valid-dev", "valid-test", "valid-train", *more):
        path = out.folder / f"cv-{table}.csv"
        split = SPLITS[table.removeprefix("valid-")] if table.startswith("valid-") else Split.TRAIN
        for line, row in _csv(path):
            if not row.get("filename"):
                out.reject(path, f"line {line}: no filename")
                continue
            clip, sentence = out.folder / row["filename"], row.get("text") or ""
            if not clip.is_file():
                clip = out.folder / row["filename"].split("/")[0] / row["filename"]
            if split is not Split.TRAIN:
                held_out.add(sentence)
            elif table in more and sentence in held_out:
                out.reject(clip, "its sentence is in dev or test")
                continue
            out.take(clip, language=code, split=split, text=sentence)


def _csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row by column name). Raises CorpusError: no such file, not UTF-8, no column `filename`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            if "filename" not in (rows.fieldnames or ()):
                raise CorpusError(f"{path} has no column 'filename'; its header is: {', '.join(rows.fieldnames or ())}")
            for row in rows:
                yield rows.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
