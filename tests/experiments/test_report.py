"""The report against its own numbers: what the page must hold, what it must not claim, that it is one whole file."""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ledger import COUNTED
from experiments.report import page as report_page
from experiments.report import write_report
from experiments.report.findings import findings
from experiments.report.results import Results, duration, percent, signed, verdict
from experiments.results import LOW_RESOURCE
from tests.experiments.made_up_results import LANGUAGES, STAGES, difference, make_results, pierced, with_ratio
from tests.experiments.read_page import Page


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The results of a whole run, and its page."""
    results = make_results()
    return results, Page(write_report(results, tmp_path_factory.mktemp("report") / "report.html"))


def test_page_is_whole_and_asks_for_nothing(full):
    _, page = full
    assert page.tags.count("section") == 9 and page.tags.count("svg") > 10
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    references = [value for _, key, value in page.attributes if key in ("src", "href", "xlink:href", "srcset", "data")]
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert references and all(value.startswith("#") for value in references)
    assert {value[1:] for value in references} <= set(ids)
    assert len(ids) == len(set(ids))
    assert not re.search(r"https?:|@import|//[a-z]", page.source)
    assert set(re.findall(r"url\(([^)]*)\)", page.source)) <= {f"#{name}" for name in ids}
    assert len(page.source) < 1_500_000


def test_every_section_shows_its_figures(full):
    results, page = full
    expected = {
        "summary": ["1.42×", "32.0% on 2,509 held-out clips", "6.02 h", "31 languages", "316 times", "3.1e-06"],
        "data": ["Norwegian Nynorsk", "Modern Greek", "0.885", "14.70%"],
        "training": [
            "stage 2 (wavlab_ms)", "First iteration, then second iteration, stage 1, stage 2 and the control",
            "audio-hours", "6.00", "stage 2 and the control continue stage 1 with the same units",
            "second iteration continues first iteration with other units and a fresh head",
            "mean over low-resource languages", LOW_RESOURCE, "3.2%", "1.25", "310.0", "1.7e-04", "88", "61",
        ],
        "units": ["hubert_base_it1-layer3", "perplexity", "11", f"{results['units'][0]['perplexity']:.1f}"],
        "accuracy": ["1.56×", "32.0%", "22.5%", "no held-out data", "compare only rows with the same units"],
        "balance": ["+2.1", "[−0.8, 1.4]", "27.2%", LOW_RESOURCE,
                    "low-resource (232 clips)", "○ not distinguishable", "▼ worse", "▲ better"],
        "probe": ["log-mel", "stage 2, layer 3", "[21.7%, 31.0%]", "12.1%", "leave one source out", "41.0%"],
        "export": ["model.safetensors", "1.8 MB", "transformers 5.23.0", "3.1e-06"],
        "time": ["33 min 17 s", "8 min 40 s", "26.0%", "AMD EPYC 9B14", "12,634 clips, 6.0 h, 0 refused", COUNTED],
    }  # fmt: skip
    assert set(expected) == {key for key in page.sections if key}
    for section, figures in expected.items():
        text = page.text(section)
        assert [figure for figure in figures if figure not in text] == []
        assert "Not available" not in text
    assert "finished 2026-11-22 21:00:00 UTC" in page.text() and "commit abc1234" in page.text()


def test_tables_hold_what_the_results_hold(full):
    results, page = full
    by_language = next(rows for rows in page.tables if rows[0][:2] == ["language", "code"])
    assert [row[1] for row in by_language[1:]] == [row[0] for row in LANGUAGES]  # most hours first
    natural = np.array([row[5] for row in LANGUAGES]) / sum(row[5] for row in LANGUAGES)
    assert [row[6] for row in by_language[1:]] == [f"{100 * share:.2f}%" for share in natural]
    drawn = results["shares"][1]["languages"]["srp"]
    assert by_language[-1][-2:] == [f"{100 * drawn['drawn']:.2f}%", f"{drawn['epochs']:.1f}"]
    heads = ["language", "clips", *(f"{label} ({stage})" for stage, label, *_ in STAGES[2:]), "majority", "copy"]
    judged = next(rows for rows in page.tables if rows[0] == heads)
    assert len(judged) == 1 + 2 + 31
    for row, (code, name, *_) in zip(judged[3:], LANGUAGES, strict=True):
        assert row[0] == name.removesuffix(" (1453-)")
        scores = [results["accuracy"][place]["languages"][code]["accuracy"] for place in (2, 3, 4)]
        assert row[2:5] == [percent(score) for score in scores]
    assert [row[:3] for row in judged if row[0] == "Swedish"] == [["Swedish", "no held-out data", "–"]]
    probe = next(rows for rows in page.tables if rows[0][0] == "representation" and "folds" in rows[0])
    assert [row[-1][2:] for row in probe[1:3]] == ["better than chance", "not distinguishable from chance"]


def test_tables_have_heads_and_numbers_stand_right(full):
    _, page = full
    assert page.tags.count("thead") == page.tags.count("table") == len(page.tables) >= 12
    for rows in page.tables:
        assert len({len(row) for row in rows}) == 1
    right = re.findall(r'<td class="n">([^<]*)</td>', page.source)
    left = re.findall(r'<td class="t">([^<]*)</td>', page.source)
    assert sum(bool(re.fullmatch(r"[-+−]?[\d,.]+[%×]?", cell)) for cell in right) > 300
    assert [cell for cell in left if re.fullmatch(r"[-+−]?[\d,]+\.\d+[%×]", cell)] == []
    assert "tabular-nums" in page.source and "prefers-color-scheme:dark" in page.source


def test_charts_follow_the_theme(full):
    """No colour of a chart is fixed: each is one of the page's variables, and both themes define it."""
    _, page = full
    charts = re.findall(r'<svg [^>]*class="chart".*?</svg>', page.source, re.S)
    assert len(charts) >= 10
    used = set()
    for chart in charts:
        assert not re.search(r"#[0-9a-fA-F]{6}\b|rgb\(", chart)
        assert "<text" in chart and "aria-label" in chart
        used |= set(re.findall(r"var\(--(\w+)\)", chart))
    assert used <= set(report_page.COLOURS) and {"green", "vermillion", "blue"} <= used
    for theme in (0, 1):
        for name in used:
            assert f"--{name}:{report_page.COLOURS[name][theme]}" in page.source


@pytest.mark.parametrize("log", [False, True])
def test_marks_stand_where_their_values_are(log):
    from experiments.report import charts

    values = [0.5, 0.02, 0.31, math.nan, 0.11]
    drawn = charts.Series(report_page.Look("blue", "o"), values)
    svg = charts.row_chart(
        list("abcde"), [drawn], name="n", alt="", title="", show=str, width=500, log=log, zero=not log
    )
    marks = [(float(x), float(y)) for x, y in re.findall(r'<use href="#n-[^"]*" x="([^"]*)" y="([^"]*)"', svg)]
    kept = [(np.log(value) if log else value, row) for row, value in enumerate(values) if math.isfinite(value)]
    assert len(marks) == 4
    for axis in (0, 1):
        have, want = np.array(marks)[:, axis], np.array(kept)[:, axis]
        slope, offset = np.polyfit(want, have, 1)
        assert slope > 0 and np.abs(have - slope * want - offset).max() < 0.02
    assert svg.count("no data") == 1


def test_long_curves_are_averaged_and_stay_small(tmp_path):
    from experiments.report import charts

    x, y = np.arange(1000.0), np.random.default_rng(0).standard_normal(1000)
    short, mean = charts.averaged(x, y)
    assert len(short) == 250
    np.testing.assert_allclose(mean, y.reshape(250, 4).mean(1))
    np.testing.assert_allclose(charts.averaged(x[:7], y[:7])[1], y[:7])
    assert math.isclose(charts.averaged(x[:301], y[:301])[1][-1], y[300])

    results = make_results(2)
    points = [{"step": k, "hours": k / 10, "loss": 3 + math.sin(k), "accuracy": 0.3} for k in range(20_000)]
    results = {"curves": [{"stage": "wavlab_mk", "points": points}], "units": results["units"][:1]}
    results["units"][0]["counts"] = list(range(2000))
    assert write_report(results, tmp_path / "long.html").stat().st_size < 200_000


def test_continued_stages_start_where_their_parent_ended(tmp_path, monkeypatch):
    from experiments.report import charts, done

    drawn = {}
    monkeypatch.setattr(
        charts, "curves", lambda lines, **options: drawn.setdefault(options["alt"], (lines, options)) and ""
    )
    monkeypatch.setattr(done, "health_blocks", lambda run: [])
    results = make_results(2)
    write_report({key: results[key] for key in ("curves", "accuracy")}, tmp_path / "page.html")
    ((lines, options),) = drawn.values()
    np.testing.assert_allclose(options["branches"], [4.0, 8.0, 14.0])
    for line, entry, start in zip(lines, results["curves"], (0.0, 4.0, 8.0, 14.0, 14.0), strict=True):
        np.testing.assert_allclose(line.x, [start + point["hours"] for point in entry["points"]])
        assert line.panels[0] == [point["loss"] for point in entry["points"]]

    drawn.clear()
    for entry, parent in zip(results["curves"], ("wavlab_ms", None, "wavlab_mk", "nowhere", "wavlab_mk"), strict=True):
        entry["continues"] = parent  # of a stage that is not there, of a later one, of itself: each starts anew
    page = Page(write_report({key: results[key] for key in ("curves", "accuracy")}, tmp_path / "page.html"))
    assert [len(lines) for lines, _ in drawn.values()] == [1, 1, 2, 1]
    assert "the control continues stage 1 with the same units." in page.text("training")


def test_names_are_escaped(tmp_path):
    results = make_results(2)
    results["title"] = "<script>alert(1)</script> & more"
    results["corpus"]["languages"][0]["name"] = '<b>bold</b> $x^2$ "q" -->'
    results["steps"][0]["name"] = "<i>step</i>"
    results["probe"]["rows"][0]["name"] = "<u>&amp;"
    results["low_resource"]["definition"] = "</p><p onclick=x>"
    page = Page(write_report(results, tmp_path / "page.html"))
    assert not {"script", "b", "i", "u"} & set(page.tags) - {"b"}
    assert "<b>bold" not in page.source and "&lt;b&gt;bold&lt;/b&gt; $x^2$" in page.source
    assert "<script>alert(1)</script> & more" in page.texts
    assert "</p><p onclick=x>" in page.text("balance") and "<i>step</i>" in page.text("time")
    assert "<u>&amp;, layer" not in page.text() and "<u>&amp;" in page.text("probe")


def test_without_held_out_data_the_sections_say_so(tmp_path):
    results = make_results(2)
    results["accuracy"] = [
        {"label": label, "stage": stage, "note": "no held-out data"} for stage, label, *_ in STAGES[2:]
    ]
    for key in ("low_resource", "all_languages"):
        del results[key]
    page = Page(write_report(results, tmp_path / "page.html"))
    said = "No held-out data: stage 1, stage 2 and the control could not be judged."
    for section in ("summary", "accuracy", "balance"):
        assert said in page.text(section) and "Not available" not in page.text(section)


def test_every_difference_says_on_how_many_clips(full):
    results, page = full
    tables = [rows for rows in page.tables if rows[0][-3:] == ["difference", "interval", "verdict"]]
    groups = [listing["differences"] for listing in (results["low_resource"], results["all_languages"])]
    expected = [[f"{row['clips']:,}" for row in sum(groups, [])], ["412", "412"]]
    assert [[row[rows[0].index("clips")] for row in rows[1:]] for rows in tables] == expected
    for section, clips in (("balance", "worse, 2,509 clips"), ("probe", "26.2%, 412 clips")):
        assert clips in page.text(section)


def test_low_resource_is_defined_once(full):
    _, page = full
    assert page.text().count(LOW_RESOURCE) >= 3
    design = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    assert LOW_RESOURCE in " ".join(design.split())


SECTIONS = {
    "data": ["corpus", "shares"], "training": ["curves"], "units": ["units"], "accuracy": ["accuracy"],
    "balance": ["low_resource", "all_languages"], "probe": ["probe"], "export": ["export"],
    "time": ["steps", "machine"],
}  # fmt: skip


@pytest.mark.parametrize("absent", [None, {}, [], "missing"])
def test_what_is_missing_is_said(tmp_path, absent):
    whole = make_results(2)
    empty = {} if absent == "missing" else dict.fromkeys(whole, absent)
    page = Page(write_report(empty, tmp_path / "page.html"))
    assert page.text().count("Not available") == 1 + len(SECTIONS)
    assert page.tags.count("table") == 0


@pytest.mark.parametrize("section", SECTIONS)
def test_one_part_alone_is_enough(tmp_path, section):
    """A recipe that was cut short, or another one: only this section has something to show."""
    whole = make_results(2)
    page = Page(write_report({key: whole[key] for key in SECTIONS[section]}, tmp_path / "page.html"))
    silent = [name for name in SECTIONS if "Not available" in page.text(name)]
    assert silent == [name for name in SECTIONS if name != section]


@pytest.mark.parametrize("seed", range(4))
def test_holes_anywhere_do_not_stop_the_page(tmp_path, seed):
    page = Page(write_report(pierced(make_results(3), random.Random(seed)), tmp_path / "page.html"))
    assert " nan" not in page.text() and "None" not in page.text()


def sentences(**parts):
    return [finding.text for finding in findings(Results(parts))]


def test_sentences_name_what_the_intervals_allow():
    results = make_results()
    said = sentences(**results)
    assert said[0] == (
        "Masked accuracy after stage 2 is 32.0% on 2,509 held-out clips: 1.42 times the better trivial predictor "
        f"(copy, 22.5%); {results['accuracy'][3]['macro']['times_trivial']:.2f} times on the mean over 30 languages."
    )
    assert said[1] == (
        "Masked accuracy over that of the better trivial predictor, stage by stage on 2,509 held-out clips: 1.56× "
        "after first iteration, 1.47× after second iteration, 1.33× after stage 1, 1.42× after stage 2 and 1.40× after "
        "the control. Stages that predict other units answer other questions."
    )
    assert said[2] == (
        "On low-resource languages (15 of 16 languages, 232 clips), stage 2 is 2.1 points above stage 1 [1.0, 3.2] and "
        "not distinguishable from the control (+0.3 points [−0.8, 1.4]). Longer training alone may explain the gain."
    )
    assert said[3].endswith(
        "stage 2 is 2.0 points above stage 1 [1.6, 2.4] and 0.7 points below the control [−1.1, −0.3]."
    )
    assert said[4] == (
        "Language across sources, on 412 clips of 12 languages: the highest of 7 representations is stage 2, layer 3 "
        "[21.7%, 31.0%], above chance (12.1%)."
    )
    assert said[6] == (
        "In that probe (412 clips), stage 2, layer 3 is not distinguishable from stage 1, layer 3 (+2.6 points "
        "[−2.1, 7.1])."
    )
    low = [row for row in LANGUAGES if row[5] < 0.05]
    share = 100 * sum(row[5] for row in low) / sum(row[5] for row in LANGUAGES)
    assert f"are {share:.1f}% of the training audio" in said[7] and LOW_RESOURCE in said[7]
    assert "Swedish has no held-out clips and cannot be judged." in said[8]


def test_weak_results_are_not_dressed_up():
    results = make_results()
    for row in results["accuracy"]:
        row["total"] = with_ratio({**row["total"], "accuracy": 0.2})
    for row in results["probe"]["rows"]:
        row["low"] = 0.05
    results["export"].update(largest_difference=None, checked_with="not checked: transformers is not installed")
    said = sentences(**results)
    assert "does not reach the better trivial predictor" in said[0]
    assert findings(Results(results))[1].tone == "worse"
    assert any("none of the 7 representations is distinguishable from chance" in words for words in said)
    assert any("not compared (not checked: transformers is not installed)" in words for words in said)


ends = st.floats(-0.2, 0.2)


@given(
    value=ends, low=ends, high=ends, given=st.sampled_from(["better", "worse", "not distinguishable", None, "great"])
)
def test_no_verdict_against_the_interval(value, low, high, given):
    low, high = min(low, high), max(low, high)
    row = difference("wavlab_ms", "wavlab_mk", value, low, high, given)
    (words,) = sentences(all_languages={"differences": [row]})
    clear = (low > 0 and given in ("better", None)) or (high < 0 and given in ("worse", None))
    assert ("not distinguishable from wavlab_mk" in words) == (not clear)
    assert ("above" in words) == (verdict(row) == "better") == (clear and low > 0)
    assert ("below" in words) == (verdict(row) == "worse") == (clear and high < 0)


def test_no_interval_no_verdict():
    row = {"of": "a", "against": "b", "difference": 0.5, "verdict": "better"}
    assert verdict(row) == "not distinguishable"
    assert sentences(all_languages={"differences": [row]}) == [
        "On all languages together, a is not distinguishable from b (+50.0 points, no interval)."
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (4.21, "4.2 s"), (31.2, "31 s"), (59.6, "1 min"), (131, "2 min 11 s"), (3599.6, "1 h"), 
     (3900, "1 h 05 min"),      (86_399, "1 d"), (273_600, "3 d 04 h")],
)  # fmt: skip
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_signs_are_real_minus_signs():
    assert (signed(0.021), signed(-0.007), signed(None)) == ("+2.1", "−0.7", "–")


def test_same_results_same_bytes_and_a_light_import(tmp_path):
    """In another process with other hash seeds as well; and importing the report does not import matplotlib."""
    results = {key: value for key, value in make_results(2).items() if key not in ("steps", "accuracy")}
    here = write_report(results, tmp_path / "a.html").read_bytes()
    assert write_report(results, tmp_path / "sub" / "b.html").read_bytes() == here
    (tmp_path / "results.json").write_text(json.dumps(results))
    program = (
        "import json, sys; from pathlib import Path; from experiments.report import write_report;"
        "assert not {'matplotlib', 'jax', 'jinja2'} & set(sys.modules);"
        f"write_report(json.loads(Path({str(tmp_path / 'results.json')!r}).read_text()), {str(tmp_path / 'c.html')!r})"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert hashlib.sha256((tmp_path / "c.html").read_bytes()).digest() == hashlib.sha256(here).digest()


def test_a_page_is_whole_or_not_there(tmp_path, monkeypatch):
    path = write_report({"title": "first"}, tmp_path / "report.html")
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_report({"title": "second"}, path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert b"second" in write_report({"title": "second"}, path).read_bytes()
