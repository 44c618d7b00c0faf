"""What the card beside a model says of it, carried over when the model is converted: licence, languages, data, stages.

A card begins with YAML between two lines of "---". Only strings, lists of strings and tables of strings of bounded size
are taken from there, whoever wrote it. Cards of ours have an entry more, `wavlab_jax`: the rows of the tables in their
sections (stages, hours by language), so that they survive the next conversion.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from wavlab_jax.convert.names import ConvertError
from wavlab_jax.convert.plain_yaml import parse_yaml

OURS = "wavlab_jax"
_LARGEST_CARD = 1 << 18  # characters of the YAML; the widest has some hundred languages
_LARGEST_STRING, _MOST, _COLUMNS = 200, 1000, 20  # characters; entries of a list; columns of a table

Rows = tuple[Mapping[str, str], ...]  # of a table: column -> text


class SourceCard(NamedTuple):
    """What a card says; empty where it says nothing.

    Attributes:
        name: of the folder that it lies in, without the folders above it.
        licence, languages, datasets, tags: as Hugging Face's cards spell them.
        licence_name, licence_link: where the licence is "other".
        tables: heading -> rows, of a card of ours: "Training" (the stages that led to the model), "Data" (its hours by
            language).
    """

    name: str
    licence: str = ""
    licence_name: str = ""
    licence_link: str = ""
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    tables: Mapping[str, Rows] = MappingProxyType({})


def read_source_card(path: Path) -> SourceCard | None:
    """Of the README.md in a model's folder, or beside a model's file; None if there is none that begins with YAML.

    A card is no part of a model: what in it cannot be read is passed over.
    """
    folder = path if path.is_dir() else path.parent
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            text = file.read(_LARGEST_CARD)
    except OSError:
        return None
    first, _, rest = text.partition("\n")
    front, end, _ = rest.partition("\n---")
    if first.strip() != "---" or not end:
        return None
    try:
        said = parse_yaml(front, where=str(folder / "README.md"), strings=True)
    except ConvertError:
        return None
    if not isinstance(said, dict):
        return None
    ours = said.get(OURS)
    tables = ours.get("tables") if isinstance(ours, dict) else None
    tables = list(tables.items())[:_COLUMNS] if isinstance(tables, dict) else []
    return SourceCard(
        name=_plain(folder.absolute().name) or "the source",
        licence=_plain(said.get("license")),
        licence_name=_plain(said.get("license_name")),
        licence_link=_plain(said.get("license_link")),
        languages=_strings(said.get("language")),
        datasets=_strings(said.get("datasets")),
        tags=_strings(said.get("tags")),
        tables={_plain(name): rows for name, value in tables if _plain(name) and (rows := _rows(value))},
    )


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown; its columns are the keys of the first row, those of numbers to the right."""
    columns = list(rows[0])
    numeric = [all(_is_number(row.get(column, "")) for row in rows) for column in columns]
    lines = [columns, ["---:" if right else "---" for right in numeric]]
    lines += [[row.get(column, "").replace("|", "/") for column in columns] for row in rows]
    head, rule, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, rule.replace(" ", ""), *body])


def table_rows(markdown: str) -> Rows:
    """The inverse of `table`: the rows of the first table in a section's text; () if there is none."""
    lines = [line.strip() for line in markdown.splitlines()]
    start = next((i for i, line in enumerate(lines) if line.startswith("|---")), 0)
    if not start:
        return ()
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start - 1 : end])
    return tuple(dict(zip(head, cells, strict=False)) for cells in body)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix("%"))
    except ValueError:
        return False
    return True


def _plain(value: Any) -> str:
    """A string of one line that means nothing in Markdown or HTML; "" for anything else."""
    if not isinstance(value, str) or len(value) > _LARGEST_STRING:
        return ""
    return value.strip() if value.isprintable() and not set(value) & set("<>`[]") else ""


def _strings(value: Any) -> tuple[str, ...]:
    found = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(filter(None, map(_plain, found[:_MOST]))))


def _rows(value: Any) -> Rows:
    rows = value[:_MOST] if isinstance(value, list) else []
    found = []
    for row in rows:
        items = list(row.items())[:_COLUMNS] if isinstance(row, dict) else []
        found.append({_plain(name): _plain(cell) for name, cell in items if _plain(name)})
    return tuple(row for row in found if row)
