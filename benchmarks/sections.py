"""Sections of a document that a benchmark writes: the title, and all up to the next one, are replaced."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_section(document: str, title: str, text: str) -> None:
    """Puts `text` under the heading `## title` of a document of the repository; at its end if there is none yet."""
    path = ROOT / document
    before = path.read_text() if path.exists() else "# The data, measured\n"
    section = f"## {title}\n\n{text.strip()}\n"
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", before, re.S | re.M)
    if found:
        rest = before[found.end() :]
        after = before[: found.start()] + section + ("\n" + rest if rest else "")
    else:
        after = before.rstrip("\n") + "\n\n" + section
    path.write_text(after)
