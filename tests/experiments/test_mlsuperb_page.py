"""The page of ML-SUPERB results against its own numbers: what it must hold, and that it is one whole file."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.mlsuperb.tracks import MONOLINGUAL_SETS
from experiments.mlsuperb.drawn import bars, confusion_matrix, differing
from experiments.mlsuperb.gathered import Standing, write_leaderboard
from experiments.mlsuperb.page import chance_finding, looks_of, write_page
from experiments.mlsuperb.protocol import ProtocolError
from experiments.mlsuperb.scoring import ChallengeScores
from experiments.report.page import Look
from tests.experiments.read_page import Page
from wavlab_jax.evaluation.superb_score import Scores, published_points

SCORES = (40.0, 30.0, 40.0, 70.0, 60.0, 30.0, 42.0)  # mono, multi normal, few-shot, LID, joint LID, normal, few-shot
HOSTILE = '<script>alert("x")</script> & $x$'


PARTS = ("train", "dev", "test")


def row(utterances=60, **figures):
    return {"utterances": utterances} | figures | {
        f"{name}_interval": [value - 2.0, value + 3.0] for name, value in figures.items()
    }  # fmt: skip


def write(
    workdir, model, *, published, scores=SCORES, languages=("swa", "deu", "fra"), layers=3, sets=MONOLINGUAL_SETS,
    duration="10min", challenge=(),
):  # fmt: skip
    """Results of all tracks of a model, as `superb` leaves them."""
    mono, normal, few, lid, joint_lid, joint_normal, joint_few = scores
    tracks = {f"monolingual {name}": ("monolingual", {"normal": row(error_rate=mono)}) for name in sets}
    tracks |= {
        "multilingual": ("multilingual", {"normal": row(error_rate=normal), "few-shot": row(5, error_rate=few)}),
        "identification": ("identification", {"normal": row(accuracy=lid)}),
        "joint": ("joint", {"normal": row(error_rate=joint_normal, accuracy=joint_lid),
                            "few-shot": row(5, error_rate=joint_few, accuracy=10.0)}),
    }  # fmt: skip
    tracks |= {name: ("challenge", {"normal": row(error_rate=30.0, accuracy=70.0)}) for name in challenge}
    for track, (task, groups) in tracks.items():
        figure = {
            key: value for key, value in groups["normal"].items() if "interval" not in key and key != "utterances"
        }
        named = task in ("identification", "joint", "challenge")
        least = {"uniform": 20.0, "language": "deu", "majority": {"all": 35.0, "normal": 35.0}}
        results = {
            "format": 1,
            "track": track, "task": task, "set": duration, "token": "character",
            "model": {"name": model, "kind": "stage", "identity": HOSTILE, "encoder_parameters": 95_000_000,
                      "downstream_parameters": 5_000_000, "layers": layers, "width": 768, "notes": [HOSTILE]},
            "protocol": {"published": published, "deviations": [] if published else ["scale 0.01: 3 of 300"],
                         "differences": ["always this"], "iterations": 300, "learning_rate": 1e-4},
            "data": {"parts": {part: {"utterances": 7, "hours": 1.5, "languages": 3} for part in PARTS},
                     "infeasible": {part: {"count": 0, "first": []} for part in PARTS},
                     "recordings_without_text": {"count": 2, "first": []}},
            "left_out": {"train": {"no text": 3}}, "unseen_tokens": {"Q": 4},
            "all": row(**figure), "groups": groups,
            "languages": {name: row(3 + 20 * place, **figure) for place, name in enumerate(languages)},
            "chance": {"error_rate": 100.0} | (least if named else {}),
            "layer_weights": (np.arange(1, layers + 2) / 10).tolist() if layers else [],
            "examples": [{"id": "a", "language": "swa", "source": HOSTILE, "group": "few-shot",
                          "reference": "[swa] ABC", "hypothesis": f"[swa] AXC {HOSTILE}", "error_rate": 33.3}],
            "training": {"averaged": {}, "losses": [{"step": 4, "ctc_loss": 3.0}, {"step": 4, "valid_loss": 2.0},
                                                    {"step": 8, "valid_loss": 1.0}]},
            "seconds": 90.0, "machine": {"devices": "1 x TPU"}, "commit": "abc1234",
        }  # fmt: skip
        if named:
            results["confusions"] = {f"[{name}]": {f"[{name}]": 5, "[deu]": 3, HOSTILE: 2} for name in languages}
        if task == "challenge":
            four = (81.25, 21.25, 11.25, 61.25) if track == "challenge dev" else (82.25, 22.25, 12.25, 62.25)
            results["challenge"] = dict(zip(ChallengeScores._fields, four, strict=True))
        folder = workdir / "mlsuperb" / model / duration / track.replace(" ", "-")
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "hypotheses.tsv").write_text(
            "tokens\tsubstitutions\tdeletions\tinsertions\n" + f"10\t{round(mono / 10)}\t0\t0\n10\t5\t0\t0\n"
        )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("page")
    write(workdir, "ours", published=True)
    write(workdir, "shortened", published=False, sets=())
    write(workdir, "log-mel", published=False, layers=0, sets=("eng1",))
    return workdir, Page(write_page(workdir, workdir / "page.html"))


def test_the_page_is_whole_and_asks_for_nothing(page):
    workdir, found = page
    sections = [
        "summary",
        "leaderboard",
        "figures-10min",
        "deviations",
        "layers",
        "languages",
        "confusions",
        "texts",
        "training",
    ]
    ids = [value for tag, key, value in found.attributes if key == "id"]
    assert [value for value in ids if value in sections] == sections and len(ids) == len(set(ids))
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(found.tags)
    references = [value for _, key, value in found.attributes if key in ("src", "href", "xlink:href")]
    assert references and all(value.startswith("#") and value[1:] in ids for value in references)
    assert not re.search(r"https?:|@import|//[a-z]", found.source) and "Not available" not in found.text()
    assert HOSTILE in found.text() and "<script" not in found.source  # of a name, a note, an answer, a text
    again = write_page(workdir, workdir / "again.html")
    assert again.read_text() == found.source
    assert not set(re.findall(r"#[0-9a-f]{6}", found.source.split("<main>")[1]))  # colours follow the theme


def test_only_what_follows_the_protocol_stands_among_published_rows(page):
    _, found = page
    tables = [table for table in found.tables if table[0][0] == "model" and "SUPERB points" in table[0]]
    among = {line[0]: line[1:] for line in tables[0][1:]}
    points = published_points(Scores(*SCORES), pool="2024", duration="10min")
    assert among["ours"] == [*(f"{score:.1f}" for score in SCORES), f"{points:.1f}"]
    assert "MMS-1B (published)" in among and "log-mel (published)" in among and "shortened" not in among
    ranked = [float(line[-1]) for line in tables[0][1:]]
    assert ranked == sorted(ranked, reverse=True) and len(tables) == 1
    others = next(table for table in found.tables if table[0][0] == "model" and table[1][0] == "log-mel")
    assert others[2][:3] == ["shortened", "–", "30.0"] and "SUPERB points" not in others[0]
    assert "not by the published protocol" in found.text("leaderboard")
    assert f"{points:.1f} SUPERB points of ours" in found.text("summary")
    assert "[68.0, 73.0], above chance (35.0), on 60 utterances; the highest of 3 models" in found.text("summary")


def test_no_two_models_look_alike():
    assert len(set(looks_of(map(str, range(25))).values())) == 25


def test_none_is_called_the_highest_where_several_are():
    least = {"uniform": 4.0, "majority": {"all": 13.0}}
    standing = [
        Standing(name, "10min", {}, {"identification": {"set": "10min", "chance": least, "all": row(accuracy=value)}})
        for name, value in (("a", 20.0), ("b", 20.0), ("c", 8.0))
    ]
    assert chance_finding(standing, "identification").text.endswith("the highest of 3 models, and that of 1 more.")
    assert chance_finding(standing[1:], "identification").text.endswith("the highest of 2 models.")


def test_every_part_shows_its_figures(page):
    _, found = page
    assert "mono ASR, PER/CER" in found.text("figures-10min") and "20.0" in found.text("figures-10min")
    assert "70.0 [68.0, 73.0]" in found.text("figures-10min") and "35.0 (deu)" in found.text("figures-10min")
    said = found.text("deviations")
    assert "scale 0.01: 3 of 300" in said and "monolingual (eng1), multilingual, identification, joint" in said.replace(
        "identification, joint, multilingual", "multilingual, identification, joint"
    )
    assert "nothing" in said and "always this" in said and "so that there is no mean" in said
    weights = next(table for table in found.tables if "heaviest" in table[0])
    assert {line[0] for line in weights[1:]} == {"ours", "shortened"} and weights[1][4].startswith(
        "3 (40.0%), 2 (30.0%)"
    )
    for name in ("swa Swahili", "deu German", "fra French"):
        assert name in found.text("languages") and name.split()[0] in found.text("confusions")
    confused = next(table for table in found.tables if table[0][:2] == ["spoken", "said"])
    assert confused[1] == ["fra French", "deu German", "3", "30.0%"] and HOSTILE in [line[1] for line in confused]
    assert "Q" not in found.text("training") and "4 (1)" in found.text("training")
    assert "Recordings without text: 2" in found.text("training")


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """A model by the published protocol at ten minutes, of which the hour was shortened; and the challenge's tracks."""
    workdir = tmp_path_factory.mktemp("sets")
    write(workdir, "ours", published=True)
    write(
        workdir, "ours", published=False, duration="1h", sets=(), challenge=("challenge dev", "challenge dev_dialect")
    )
    return write_leaderboard(workdir, workdir / "table.md"), Page(write_page(workdir, workdir / "page.html"))


def test_table_and_page_agree_on_what_follows_the_protocol_set_by_set(two_sets):
    text, found = two_sets
    published, others = text.split("# Not by the published protocol")
    points = f"{published_points(Scores(*SCORES), pool='2024', duration='10min'):.1f}"
    (mine,) = (line for line in published.splitlines() if line.startswith("| **ours**"))
    assert mine.endswith(f"| {points} |") and "1 hour" not in published and "scale" not in published
    (shortened,) = (line for line in others.splitlines() if line.startswith("| **ours**"))
    assert others.index("1 hour a language") < others.index(shortened) and "– | 30.0" in shortened
    among = [table for table in found.tables if "SUPERB points" in table[0] and "ours" in [line[0] for line in table]]
    assert len(among) == 1 and dict((line[0], line[-1]) for line in among[0])["ours"] == points
    assert f"{points} SUPERB points of ours" in found.text("summary")


def test_both_sets_of_the_challenge_have_their_four_figures(two_sets):
    text, found = two_sets
    table = next(table for table in found.tables if "CER of the 15 worst" in table[0])
    for track, figures in (("challenge dev", "81.2 21.2 11.2 61.2"), ("challenge dev_dialect", "82.2 22.2 12.2 62.2")):
        assert f"| ours | {track} | {' | '.join(figures.split())} | 60 |" in text
        assert ["ours", track, *figures.split(), "60"] in table
    assert "divided by 15" in text and "divided by 15" in found.text("figures-1h")


def test_a_set_with_the_challenge_alone_has_no_row_of_dashes(tmp_path):
    write(tmp_path, "ours", published=True)
    write(tmp_path, "ours", published=True, duration="1h", sets=(), challenge=("challenge dev",))
    for track in ("multilingual", "identification", "joint"):
        shutil.rmtree(tmp_path / "mlsuperb" / "ours" / "1h" / track)
    text, found = write_leaderboard(tmp_path, tmp_path / "table.md"), Page(write_page(tmp_path, tmp_path / "page.html"))
    leaderboard = text.split("## Intervals")[0]
    assert "10 minutes a language" in leaderboard and "1 hour a language" not in leaderboard
    assert "1 hour a language" not in found.text("leaderboard") and "no points" not in found.text("summary")
    assert "| ours | challenge dev | 81.2 |" in text and "81.2" in found.text("figures-1h")


def ticks(svg):
    """What is written along the axes of a chart."""
    return {text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)}


def test_axes_are_of_whole_layers_and_of_all_percents(tmp_path):
    write(tmp_path, "ours", published=True, layers=1)
    source = write_page(tmp_path, tmp_path / "page.html").read_text()
    layers = source.split('<section id="layers">')[1].split("</section>")[0]
    assert {"0", "1"} <= ticks(layers) and not {"0.5", "0.2"} & ticks(layers)
    none_right = {"ours": {"deu": row(accuracy=0.0)}}
    (chart,) = bars(none_right, ["deu"], "accuracy", "languages right", "anchor", {"ours": Look("green", "o")})
    assert {"0", "100"} <= ticks(chart.svg) and "0.02" not in ticks(chart.svg)


def test_long_texts_are_broken_and_wide_tables_are_not(page):
    _, found = page
    texts = found.source.split('<section id="texts">')[1].split("</section>")[0]
    assert texts.count('class="table texts"') == texts.count("<table>") > 0
    assert found.source.count('class="table texts"') == texts.count("<table>")


def test_what_differs_is_underlined():
    assert differing("A<C", "AB<") == ("A&lt;<u>C</u>", "A<u>B</u>&lt;")
    assert differing("ab a b", "ab b", words=True) == ("ab <u>a </u>b", "ab b")
    assert differing("A", "") == ("<u>A</u>", "(nothing)")
    assert differing("d e s U", "d e s u", words=True) == ("d e s U", "d e s u")


def test_confusions_of_many_languages_are_of_those_that_are_shown():
    table = {"deu": {"deu": 3, "swa": 1}, "swa": {"fra": 2}}
    drawn = confusion_matrix(table, ["deu", "swa"], "m", "model")
    squares = re.findall(r"fill: var\(--(green|vermillion)\)(?:; opacity: ([\d.]+))?", drawn)
    assert [colour for colour, _ in squares] == ["green", "vermillion", "vermillion"]  # deu deu, deu swa, swa other
    assert float(squares[0][1]) > float(squares[1][1]) > 0.5 and squares[2][1] == ""  # of all: not let through


def test_no_results_are_told(tmp_path):
    with pytest.raises(ProtocolError, match="holds no results"):
        write_page(tmp_path, tmp_path / "page.html")


def test_what_superb_writes_is_drawn(tmp_path):
    """Of results that the command itself left, not those made up above."""
    example = Path(__file__).parent / "mlsuperb_example"
    results = json.loads((example / "results.json").read_text())
    shutil.copytree(example, tmp_path / "mlsuperb" / "model" / results["set"] / results["task"])
    found = Page(write_page(tmp_path, tmp_path / "page.html"))
    assert "Not available" not in found.text() and results["model"]["name"] in found.text("leaderboard")
    assert f"{results['groups']['normal']['error_rate']:.1f}" in found.text("leaderboard")
    for example in results["examples"]:
        assert example["hypothesis"].split("[")[0] in found.text("texts")
    for deviation in results["protocol"]["deviations"]:
        assert deviation in found.text("deviations")
