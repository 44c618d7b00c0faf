"""The table: published rows with their points, ours where it belongs, nothing beside what it cannot stand beside."""

import math
import re

import pytest

from experiments.mlsuperb.leaderboard import Entry, leaderboard, points_of, scores_of
from experiments.mlsuperb.protocol import ProtocolError
from experiments.mlsuperb.results import read_results
from wavlab_jax.evaluation.superb_score import PUBLISHED, Scores

XLS_R = next(row for row in PUBLISHED["2024"]["10min"] if row.model == "XLS-R-300M")


def test_a_model_with_a_published_rows_figures_stands_at_its_place():
    table = leaderboard([Entry("ours", "", {"10min": XLS_R.scores})])
    models = re.findall(r"^\| (?!model|---)(.*?) \|", table, re.MULTILINE)
    assert abs(models.index("**ours**") - models.index("XLS-R-300M")) == 1
    assert models[0] == "MMS-1B" and models[-1] == "log-mel" and len(models) == 9
    row = next(line for line in table.splitlines() if line.startswith("| **ours**"))
    assert row == "| **ours** | 39.7 | 29.2 | 40.9 | 66.9 | 55.6 | 28.4 | 42.1 | 730.8 |"
    assert "published pool of 2024" in table and "1 hour" not in table


def test_what_is_not_measured_is_a_dash_and_gives_no_points():
    some = XLS_R.scores._replace(monolingual=math.nan)
    assert math.isnan(points_of(some, pool="2024", duration="10min"))
    row = next(x for x in leaderboard([Entry("ours", "", {"10min": some})]).splitlines() if x.startswith("| **ours**"))
    assert row.startswith("| **ours** | – | 29.2 |") and row.endswith("| – |")


def test_a_miniature_stands_beside_no_published_row():
    table = leaderboard([Entry("ours", "1 % of the iterations", {"10min": XLS_R.scores})], comparable=False)
    assert "MMS-1B" not in table and "points" not in table and "**ours**: 1 % of the iterations." in table


@pytest.mark.parametrize(("written", "said"), [('{"format": 1', "not JSON"), ("[]", "format None")])
def test_results_that_cannot_be_read_are_named(tmp_path, written, said):
    path = tmp_path / "mlsuperb" / "model" / "1h" / "challenge" / "dev" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(written)
    with pytest.raises(ProtocolError, match=f"{path} is .*{said}"):
        list(read_results(tmp_path))


def test_scores_are_read_from_the_tracks_figures():
    groups = {"normal": {"error_rate": 30.0, "accuracy": 80.0}, "few-shot": {"error_rate": 40.0, "accuracy": 1.0}}
    results = {"multilingual": {"groups": groups}, "joint": {"groups": groups}, "monolingual": {"error_rate": 20.0}}
    scores = scores_of(results)
    assert scores[:3] == (20.0, 30.0, 40.0) and scores[4:] == (80.0, 30.0, 40.0) and math.isnan(scores[3])
    assert points_of(Scores(*XLS_R.scores), pool="2024", duration="10min") == pytest.approx(730.8, abs=0.05)
