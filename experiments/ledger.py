"""Which steps of a recipe are done, by which code and machine, and how long they took: times.json."""

import contextlib
import json
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from data_pipelines.atomic import whole_file

BEAT = 15.0  # seconds between two writes of a running step's time: what a kill -9 can lose of it
COUNTED = (
    "A step's time is that of all processes that worked on it, work that was lost and done again included. Of a killed "
    f"process its last {BEAT:g} s may be missing. Pauses between processes, their start and this page are not counted."
)


class Ledger:
    """An entry a step: made_with, done, seconds, note, and the commits and machines that it was made by."""

    def __init__(self, path: Path):
        self.path = path
        self._entries: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def done(self, name: str, *, made_with: str) -> bool:
        """Whether the step ran to its end with these configurations."""
        entry = self._entries.get(name, {})
        return entry.get("done", False) and entry.get("made_with") == made_with

    def seconds(self, name: str) -> float:
        """Time spent on the step, as `COUNTED` says."""
        return self._entries.get(name, {}).get("seconds", 0.0)

    def rows(self, names: list[str]) -> list[dict]:
        """name, seconds and note of each step, in order."""
        return [
            {"name": n, "seconds": self.seconds(n), "note": self._entries.get(n, {}).get("note", "")} for n in names
        ]

    def origin(self, names: list[str]) -> dict:
        """When the last of these steps was finished, by which commits, on which machine; keys not known are left out.

        Of several machines every fact lists what it was on each.
        """
        entries = [self._entries.get(name, {}) for name in names]
        finished = max((entry["finished"] for entry in entries if "finished" in entry), default=None)
        commits = _distinct(commit for entry in entries for commit in entry.get("commits", []))
        machines = _distinct(machine for entry in entries for machine in entry.get("machines", []))
        facts = {key: _distinct(machine[key] for machine in machines if key in machine) for m in machines for key in m}
        found = {
            "finished": finished,
            "commit": ", then ".join(commits),
            "machine": {k: v[0] if len(v) == 1 else ", then ".join(map(str, v)) for k, v in facts.items()},
        }
        return {key: value for key, value in found.items() if value}

    @contextlib.contextmanager
    def timing(self, name: str, *, made_with: str, commit: str | None = None, machine: dict | None = None):
        """Gives the step's entry, whose note the block sets, and adds the time inside, also if it ends with an error.

        The time so far is written every `BEAT` seconds, so that it outlives a kill. The step is marked done if the
        block ends well.
        """
        before = self._entries.get(name, {})
        entry = {
            "seconds": self.seconds(name),
            "note": "",
            "done": False,
            "made_with": made_with,
            "commits": _distinct([*before.get("commits", []), *filter(None, [commit])]),
            "machines": _distinct([*before.get("machines", []), *filter(None, [machine])]),
        }
        began, ended = time.monotonic(), threading.Event()

        def spent() -> dict:
            return {**entry, "seconds": entry["seconds"] + time.monotonic() - began}

        def beat():
            while not ended.wait(BEAT):
                with contextlib.suppress(OSError):  # a full disk is for the step itself to report
                    self._write(name, spent())

        self._write(name, entry)
        heart = threading.Thread(target=beat, name=f"time of {name}", daemon=True)
        heart.start()
        try:
            yield entry
            entry |= {"done": True, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
        finally:
            ended.set()
            heart.join()
            self._write(name, spent())

    def _write(self, name: str, entry: dict) -> None:
        self._entries[name] = entry
        with whole_file(self.path) as temporary:
            temporary.write_text(json.dumps(self._entries, indent=1, ensure_ascii=False) + "\n")


def _distinct(values) -> list:
    """In the order of their first occurrence; values need not be hashable."""
    found: list = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
