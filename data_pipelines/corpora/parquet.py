"""Parquet files with the audio in them, as Hugging Face's `datasets` writes: a column {bytes, path}, and others.

Rows are read by row group, so files with row groups of about a hundred rows (what `datasets` writes for audio) are
prepared fastest. Speakers that lie scattered over many row groups cost a read of one for almost every clip.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.containers import parquet_member
from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.listing import Lister, existing_folder, folder_name, found, needs_language, split_in


def read(
    folder: str | Path,
    *,
    files: str = "**/*.parquet",
    audio: str = "audio",
    language: str | None = None,
    language_column: str | None = None,
    language_folder: int | None = None,
    text_column: str | None = None,
    speaker_column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
) -> Listing:
    """Lists the rows of all Parquet files of the folder (glob `files`) whose audio is in the column `audio`.

    The language is `language`, else `language_column`'s (class labels by their names), else part number
    `language_folder` (from 0) of the file's folders. Without `id_column` the id is file, row group and row. The split
    is `split`, else what the file's path speaks of, else dealt out.

    Raises CorpusError: no file, no such column, no language, a file that is not Parquet.
    """
    folder = existing_folder(folder)
    if language is None and language_column is None and language_folder is None:
        raise needs_language(folder, ("language", "language_column", "language_folder"))
    columns = {"language": language_column, "text": text_column, "speaker": speaker_column, "id": id_column}
    columns = {what: name for what, name in columns.items() if name is not None}
    lister = Lister(folder)
    row = 0
    for path in found(folder, files, what="Parquet files"):
        try:
            with pq.ParquetFile(folder / path) as file:
                schema = file.schema_arrow
                for name in (audio, *columns.values()):
                    if name not in schema.names:
                        raise CorpusError(f"{folder / path} has no column {name!r}; it has: {', '.join(schema.names)}")
                labels = {what: _labels(schema, name) for what, name in columns.items()}
                for group in range(file.num_row_groups):
                    facts = file.metadata.row_group(group)
                    size = sum(
                        facts.column(k).total_compressed_size
                        for k in range(facts.num_columns)
                        if facts.column(k).path_in_schema.split(".")[0] == audio
                    )
                    table = file.read_row_group(group, columns=list(columns.values()))
                    values = {what: table.column(name).to_pylist() for what, name in columns.items()}
                    for k in range(facts.num_rows):
                        row += 1
                        fields = {what: _text(values[what][k], labels[what]) for what in values}
                        lister.add(
                            path,
                            row=row,
                            id=fields.get("id") or f"{path.removesuffix('.parquet')}/{group}/{k}",
                            language=language or fields.get("language") or folder_name(path, language_folder),
                            speaker=fields.get("speaker", ""),
                            split=split or split_in(path),
                            text=fields.get("text", ""),
                            size=size // facts.num_rows,
                            member=parquet_member(audio, group=group, row=k),
                        )
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(f"{folder / path} cannot be read as Parquet: {error}") from error
    return lister.listing(source=folder)


def _labels(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of a column's class labels, which Hugging Face keeps beside the schema; None if it has none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def _text(value: object, labels: list[str] | None) -> str:
    if value is None:
        return ""
    return labels[value] if labels and isinstance(value, int) and 0 <= value < len(labels) else str(value)
