"""How results are read, how numbers are written, and what counts as better.

Everything reads through what is missing: a key that is not there is an empty dict, no rows, NaN, or a dash. A
comparison counts as better or worse only if its interval leaves out zero and its own verdict does not deny it.
"""

import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from experiments.report.page import Look, swatch

FIRST, BALANCED, CONTROL = "wavlab_mk", "wavlab_ms", "wavlab_mk_continued"
LOOKS = {  # one colour and one mark a stage, the same in every chart
    FIRST: Look("green", "s"),
    BALANCED: Look("vermillion", "o"),
    CONTROL: Look("blue", "^"),
    "hubert_base_it1": Look("purple", "D"),
    "hubert_base_it2": Look("amber", "v"),
}
OTHER = Look("muted", "o")  # what is no stage of the run: a log-mel baseline, say
BETTER, WORSE, UNCLEAR = "better", "worse", "not distinguishable"
SIGNS = {BETTER: "▲", WORSE: "▼", UNCLEAR: "○"}


def pick(data: Any, *keys: str) -> Any:
    """data[key][key]..., or None where one is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def mapped(data: Any, *keys: str) -> dict:
    """The dict at data[key][key]..., empty where there is none."""
    value = pick(data, *keys)
    return value if isinstance(value, dict) else {}


def items(data: Any, *keys: str) -> list:
    """The list at data[key][key]..., empty where there is none."""
    value = pick(data, *keys)
    return list(value) if isinstance(value, list | tuple) else []


def listed(data: Any, *keys: str) -> list[dict]:
    """The dicts of the list at data[key][key]..., none where there is no list."""
    return [entry for entry in items(data, *keys) if isinstance(entry, dict)]


def number(value: Any) -> float:
    """A finite number as float; NaN for everything else."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else math.nan


def largest(candidates: Iterable[Any]) -> float:
    """The largest of the finite numbers among the candidates; NaN if there is none."""
    return max((value for value in map(number, candidates) if math.isfinite(value)), default=math.nan)


def text(value: Any) -> str:
    """A value as str; empty for None."""
    return "" if value is None else str(value)


def count(value: Any) -> str:
    """A number without decimals: 1234 to "1,234"; a dash where there is none."""
    return f"{number(value):,.0f}" if math.isfinite(number(value)) else "–"


def hours(value: Any) -> str:
    """Hours with fewer decimals the more there are: "0.123", "1.23", "12.3", "1,234"; a dash where there are none."""
    value = number(value)
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 10 else 3 if value < 1 else 2}f}" if value >= 0 else "–"


def percent(value: Any, *, digits: int = 1) -> str:
    """0.31 to "31.0%"."""
    return f"{100 * number(value):.{digits}f}%" if math.isfinite(number(value)) else "–"


def signed(value: Any) -> str:
    """A difference of shares in percentage points, with its sign: 0.021 to "+2.1"."""
    return f"{100 * number(value):+.1f}".replace("-", "−") if math.isfinite(number(value)) else "–"


def interval(row: dict, *, points: bool = True) -> str:
    """An interval in points, "[1.0, 3.2]", or of shares, "[10.0%, 13.2%]"."""
    ends = [number(row.get(key)) for key in ("low", "high")]
    if not all(map(math.isfinite, ends)):
        return "no interval"
    shown = [f"{100 * end:.1f}".replace("-", "−") + ("" if points else "%") for end in ends]
    return f"[{', '.join(shown)}]"


def duration(seconds: float) -> str:
    """Seconds as "4.2 s", "31 s", "2 min 11 s", "1 h 05 min" or "3 d 04 h"."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if 0 < seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 3599.5:
        (whole, rest), large, small = divmod(round(seconds), 60), "min", "s"
    elif seconds < 86370:
        (whole, rest), large, small = divmod(round(seconds / 60), 60), "h", "min"
    else:
        (whole, rest), large, small = divmod(round(seconds / 3600), 24), "d", "h"
    return f"{whole} {large} {rest:02d} {small}" if rest else f"{whole} {large}"


def times(row: dict) -> float:
    """Accuracy over that of the better of the two trivial predictors; NaN where it is missing."""
    return number(row.get("times_trivial"))


def ratio(row: dict) -> str:
    """`times` as text: 1.5 to "1.50×"; a dash where there is none."""
    return f"{times(row):.2f}×" if math.isfinite(times(row)) else "–"


def verdict(row: dict) -> str:
    """better, worse or not distinguishable: the cautious one of the given verdict and what the interval allows."""
    low, high, given = number(row.get("low")), number(row.get("high")), row.get("verdict")
    if low > 0 and given in (BETTER, None):
        return BETTER
    if high < 0 and given in (WORSE, None):
        return WORSE
    return UNCLEAR


def above_chance(row: dict) -> bool:
    """Whether a probe's interval lies above chance and its own verdict does not deny it."""
    return number(row.get("low")) > number(row.get("chance")) and row.get("verdict_against_chance") in (BETTER, None)


def pill(said: str, suffix: str = "") -> Markup:
    """A verdict for a table cell, with a sign, so that it does not rest on colour alone."""
    return Markup('<span class="pill {}">{} {}{}</span>').format(tone(said), SIGNS[said], said, suffix)


def joined(parts: Sequence[str]) -> str:
    """Words in a row: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(words: str) -> str:
    """With a capital at the start, whatever else is in it."""
    return words[:1].upper() + words[1:]


def on_clips(row: dict, *, languages: Any = None) -> str:
    """ "2,509 clips", "412 clips of 12 languages": what a figure rests on; empty where it is not known."""
    if not number(row.get("clips")) > 0:
        return ""
    return f"{count(row['clips'])} clips" + (f" of {count(languages)} languages" if number(languages) > 0 else "")


def tone(said: str) -> str:
    """The tone in which a verdict is shown: better, worse or unclear."""
    return "unclear" if said == UNCLEAR else said


class Results:
    """The results with what several sections ask of them: names, order of languages, labels of stages."""

    def __init__(self, data: dict):
        self.data = data
        self.name_of_run = text(pick(data, "title")) or "WavLab-JAX recipe"
        self.corpus = {text(row.get("language")): row for row in listed(data, "corpus", "languages")}
        self.shares = listed(data, "shares")
        self.accuracy = listed(data, "accuracy")
        self.low_resource = [text(language) for language in items(data, "low_resource", "languages")]
        self.low_resource_means = text(pick(data, "low_resource", "definition"))
        self.not_judged = [row for row in self.accuracy if row.get("note")]  # stages without held-out data
        self.total_seconds = sum(max(0.0, number(step.get("seconds"))) for step in listed(data, "steps"))
        self.labels = {}
        for row in (*self.shares, *self.accuracy, *listed(data, "curves")):
            if row.get("label"):
                self.labels[text(row.get("stage"))] = text(row["label"])
        rows = [row for key in ("curves", "accuracy", "shares", "units") for row in listed(data, key)]
        stages = list(dict.fromkeys(text(row.get("stage")) for row in rows if row.get("stage")))
        spare = [look for stage, look in LOOKS.items() if stage not in stages] or list(LOOKS.values())
        new = [stage for stage in stages if stage not in LOOKS]
        self.looks = LOOKS | {stage: spare[place % len(spare)] for place, stage in enumerate(new)}
        curves = {text(entry.get("stage")): listed(entry, "points") for entry in listed(data, "curves")}
        self.curves = {stage: points for stage, points in curves.items() if points}
        every = (number(point.get("hours")) for points in self.curves.values() for point in points)
        self.curve_unit = "hours" if all(map(math.isfinite, every)) else "step"  # what all curves are drawn over
        self.continues: dict[str, str] = {}  # stage: the one before it in the results that it goes on from
        seen: set[str] = set()
        for row in listed(data, "curves"):
            before = text(row.get("continues"))
            if before and before in seen:
                self.continues[text(row.get("stage"))] = before
            seen.add(text(row.get("stage")))
        # The last stages that predict the same units are the ones that compare.
        last = self.accuracy[-1].get("unit_set") if self.accuracy else None
        self.compared = [row for row in self.accuracy if row.get("unit_set") == last] if last else self.accuracy[-1:]
        found = dict.fromkeys(self.corpus)
        for row in (*self.shares, *self.compared):
            found |= dict.fromkeys(sorted(mapped(row, "languages")))
        self.languages = sorted(found, key=lambda language: -max(-1.0, self.hours(language)))

    def facts(self) -> list[str]:
        """When, from which code, how long and on what, for the line under the title."""
        finished = text(pick(self.data, "finished")).replace("T", " ").replace("Z", " UTC")
        parts = {"finished {}": finished, "commit {}": text(pick(self.data, "commit"))}
        parts["{}"] = duration(self.total_seconds) if self.total_seconds else ""
        parts["on {}"] = text(pick(self.data, "machine", "devices"))
        parts["jax {}"] = text(pick(self.data, "machine", "jax"))
        return [form.format(value) for form, value in parts.items() if value]

    def hours(self, language: str) -> float:
        """Hours of a language in the corpus; NaN where they are not known."""
        return number(pick(self.corpus.get(language), "hours"))

    def natural_share(self, language: str) -> float:
        """A language's share of the training audio as found, 0 to 1, from the first row of `shares`; else NaN."""
        return next((number(pick(row, "languages", language, "natural")) for row in self.shares), math.nan)

    def name(self, language: str) -> str:
        """A language: "Modern Greek" of "Modern Greek (1453-)"; the code where there is no name."""
        return re.sub(r"\s*\([^()]*\)$", "", text(pick(self.corpus.get(language), "name"))) or text(language)

    def title(self, stage: str) -> str:
        """A stage in tables and legends: "stage 2 (wavlab_ms)"."""
        label = self.labels.get(stage)
        return f"{label} ({stage})" if label and label != stage else stage

    def short(self, stage: str) -> str:
        """A stage where there is little room: "stage 2"."""
        return self.labels.get(stage, stage)

    def called(self, stage: str) -> str:
        """A stage in a sentence: "stage 2", "the control", "wavlab_ms"."""
        label = self.short(stage)
        return f"the {label}" if label.startswith("control") else label

    def look(self, name: str) -> Look:
        """The look of the stage with which `name` ("wavlab_ms layer 3") starts."""
        stages = [stage for stage in self.looks if name == stage or name.startswith(f"{stage} ")]
        return self.looks[max(stages, key=len)] if stages else OTHER

    def no_held_out_data(self) -> str:
        """Which stages could not be judged, and why, in a sentence; empty if all were."""
        reasons: dict[str, list[str]] = {}
        for row in self.not_judged:
            reasons.setdefault(text(row["note"]), []).append(self.called(text(row.get("stage"))))
        return " ".join(f"{sentence(why)}: {joined(names)} could not be judged." for why, names in reasons.items())

    def mark(self, stage: str) -> Markup:
        """A stage's mark and title, for a table cell."""
        return swatch(self.look(stage)) + self.title(stage)

    def probe_name(self, row: dict) -> str:
        """The key by which differences speak of a row of the probe: "wavlab_ms layer 3"."""
        name, layer = text(row.get("name")) or "unnamed", row.get("layer")
        return name if layer is None or name.endswith(f" layer {layer}") else f"{name} layer {layer}"

    def probe_title(self, name: str) -> str:
        """A row of the probe as people say it: "stage 2, layer 3" of "wavlab_ms layer 3"."""
        stage, _, rest = name.partition(" ")
        return f"{self.short(stage)}, {rest}" if rest.startswith("layer ") else self.short(name)
