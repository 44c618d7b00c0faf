"""YAML of other people: plain values, no aliases, of bounded size.

A few lines of aliases to aliases stand for more values than any memory holds (the "billion laughs"). ESPnet writes none
(`espnet2/utils/yaml_no_alias_safe_dump.py`) and model cards need none, so they are refused where they are read.
"""

from pathlib import Path
from typing import Any

import yaml

from wavlab_jax.convert.names import ConvertError

LARGEST_TEXT = 1 << 22  # characters: ESPnet's token lists of a hundred thousand words are half of it


class _WithoutAliases:
    """A loader that refuses aliases: its values are a tree, as large as its text."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not read; spell the value out", event.start_mark)
        return super().compose_node(parent, index)


class _Values(_WithoutAliases, yaml.SafeLoader):
    """Numbers, truth values, dates and strings."""


class _Strings(_WithoutAliases, yaml.BaseLoader):
    """Every scalar is a string, so that the language `no` stays one."""


def parse_yaml(text: str, *, where: str, strings: bool = False) -> Any:
    """What the text says; with `strings`, every scalar as it is spelled. Raises ConvertError naming `where`."""
    if len(text) > LARGEST_TEXT:
        raise ConvertError(f"{where} has {len(text):,} characters, more than any that is needed here")
    try:
        return yaml.load(text, Loader=_Strings if strings else _Values)
    # PyYAML's constructors of tagged values ("!!int x") fail in as many ways as Python has
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConvertError(f"{where} cannot be read as YAML: {' '.join(str(error).split())[:300]}") from error
    except RecursionError as error:
        raise ConvertError(f"{where} cannot be read as YAML: it is nested too deeply") from error


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a file. Raises ConvertError naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read as YAML: {error}") from error
    content = parse_yaml(text, where=str(path))
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds a {type(content).__name__}, not names and values")
    return content
