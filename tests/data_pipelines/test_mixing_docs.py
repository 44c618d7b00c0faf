"""docs/mixing.md: every value in its tables is that of the code, and every field is there."""

import dataclasses
from pathlib import Path

import pytest

from data_pipelines.mixing import ESPNET_MIXING, NEST_MIXING, UNISPEECH_MIXING, MixingConfig
from data_pipelines.reverberation import ReverbConfig

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "mixing.md").read_text(encoding="utf-8")


def column(heading):
    """Field name to value of the table that has this column, as texts."""
    lines = TEXT.splitlines()
    top = next(k for k, line in enumerate(lines) if line.startswith("|") and f"`{heading}`" in line)
    at = lines[top].split("|").index(f" `{heading}` ")
    values = {}
    for line in lines[top + 2 :]:
        if not line.startswith("|"):
            return values
        cells = [cell.strip() for cell in line.split("|")]
        if cells[1].startswith("`"):
            values[cells[1].strip("`")] = cells[at]


@pytest.mark.parametrize(
    ("heading", "cfg"),
    [
        ("MixingConfig()", MixingConfig()),
        ("UNISPEECH_MIXING", UNISPEECH_MIXING),
        ("ESPNET_MIXING", ESPNET_MIXING),
        ("NEST_MIXING", NEST_MIXING),
        ("ReverbConfig()", ReverbConfig()),
    ],
)
def test_the_tables_hold(heading, cfg):
    assert column(heading) == {field: str(value) for field, value in dataclasses.asdict(cfg).items()}
