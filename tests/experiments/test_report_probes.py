"""The report's section on probes: every probe drawn with its interval and chance, and nothing said beyond that."""

import random
import re

import numpy as np
import pytest

from experiments.report import write_report
from experiments.report.page import Look
from experiments.report.results import Results
from tests.experiments.made_up_results import make_results, pierced
from tests.experiments.read_page import Page


def line(step, masked, low, high, **more):
    since = {"difference": masked - 0.1, "low": low - 0.1, "high": high - 0.1, "verdict": "better"}
    against = {"difference": masked - 0.2, "low": low - 0.2, "high": high - 0.2}
    trivial = {"majority": 0.05, "copy": 0.2}
    verdict = "better" if low > 0.2 else "worse" if high < 0.2 else "not distinguishable"
    part = {"accuracy": masked, "low": low, "high": high, "clips": 256, "majority": 0.05, "copy": 0.2, "chance": None,
            "against_trivial": against | {"verdict": verdict},
            "languages": {"spa": {"accuracy": masked, **trivial, "clips": 12, "frames": 300},
                          "gle": {"accuracy": 0.0, **trivial, "clips": 3, "frames": 30}}}  # fmt: skip
    return {"step": step, "masked": part | ({"since_first": since} if step else {}), "probe_share": 0.004, **more}


def probed():
    """Results with three probes of a stage."""
    heard = {"accuracy": 0.3, "low": 0.2, "high": 0.4, "chance": 0.25, "clips": 480, "layer": 1,
             "against_chance": {"difference": 0.05, "low": -0.05, "high": 0.15, "verdict": "not distinguishable"},
             "languages": {"spa": {"accuracy": 0.5, "clips": 40}}}  # fmt: skip
    points = [
        line(0, 0.1, 0.08, 0.12, language=heard),
        line(500, 0.21, 0.18, 0.24, language={"note": "features of clip 7 <b> are not finite"}),
        line(1000, 0.3, 0.28, 0.33, language=heard),
    ]
    return make_results() | {"probes": [{"stage": "wavlab_mk", "label": "stage 1", "points": points}]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(write_report(probed(), tmp_path_factory.mktemp("probes") / "report.html"))


def test_every_probe_stands_with_its_interval_and_what_needs_no_learning(page):
    said = page.text("probes")
    assert "They took 0.4% of a stage's time at most." in said
    first, second = (table for table in page.tables if "without learning" in table[0])
    assert first[1][1:] == ["256", "10.0%", "30.0%", "[28.0%, 33.0%]", "20.0%", "▲ better", "+20.0 [18.0, 23.0]",
                            "▲ better"]  # fmt: skip
    assert second[1][1:] == ["480", "30.0%", "30.0%", "[20.0%, 40.0%]", "25.0%", "○ not distinguishable", "–", "–"]
    assert "language across sources (dashed: guessing)" in said and "phone purity" not in said
    languages = next(table for table in page.tables if "masked accuracy, first" in table[0])
    assert languages[1] == ["Spanish", "12", "10.0%", "30.0%", "20.0%", "40", "50.0%", "50.0%"]
    assert languages[2][:2] == ["Irish", "3 (few)"] and languages[2][5:] == ["–", "–", "–"]
    assert "Language across sources: features of clip 7 <b> are not finite." in said


def test_marks_stand_where_their_values_are():
    from experiments.report import charts, trends

    steps, values, ends = [0, 500, 1000], [0.1, 0.21, 0.3], ([0.05, 0.15, 0.28], [0.2, 0.3, 0.35])
    drawn = trends.Trend(Look("green", "s"), steps, values, *ends, [0.2] * 3, [True, False, True])
    svg = trends.trends([(charts.Panel("share"), [drawn])], name="n", alt="", x_title="step", width=640)
    marks = re.findall(r'<use href="#n-[^"]*" x="([^"]*)" y="([^"]*)" style="fill: var\(--(\w+)\)', svg)
    marks = sorted((float(x), float(y), fill) for x, y, fill in marks)
    assert [fill for _, _, fill in marks] == ["green", "card", "green"]  # hollow: not distinguishable from chance
    for have, want in (([x for x, _, _ in marks], steps), ([-y for _, y, _ in marks], values)):
        slope, offset = np.polyfit(want, have, 1)
        assert slope > 0 and np.abs(np.array(have) - slope * np.array(want) - offset).max() < 0.02
    pairs = re.findall(r"M ([\d.]+) ([\d.]+) L \1 ([\d.]+)", svg)  # the intervals stand upright at the marks
    assert sorted(float(x) for x, _, _ in pairs) == [x for x, _, _ in marks]
    height = -slope
    for (_, low, high), bottom, top in zip(sorted(pairs, key=lambda each: float(each[0])), *ends, strict=True):
        assert float(low) - float(high) == pytest.approx(-height * (top - bottom), abs=0.05)


def test_without_probes_there_is_no_section(tmp_path):
    found = Page(write_report(make_results(), tmp_path / "report.html"))
    assert "probes" not in found.sections and "Probes while training" not in found.text()


@pytest.mark.parametrize("seed", range(8))
def test_holes_anywhere_do_not_stop_the_section(seed):
    from experiments.report import probes

    section = probes.probes_section(Results(pierced(probed(), random.Random(seed))))
    shown = [
        str(cell) for block in (section.blocks if section else ()) for row in getattr(block, "rows", ()) for cell in row
    ]
    assert not any("nan" in cell or "None" in cell for cell in shown)
