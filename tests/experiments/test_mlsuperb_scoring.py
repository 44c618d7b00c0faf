"""ML-SUPERB's figures, worked out by hand on a handful of utterances."""

import json
import math
from pathlib import Path

import pytest

from data_pipelines.mlsuperb.layout import LeftOut, Utterance
from data_pipelines.mlsuperb.tracks import Example, Track
from experiments.mlsuperb.scoring import (
    ScoringError,
    challenge_scores,
    edit_distance,
    figures,
    judge,
)

TEXTS = {
    "mls_eng_000001": "AB CD",
    "mls_eng_000002": "ABCDEFGHIJ",
    "cv_fra_000001": "ÉTÉ",
    "cv_tur_000001": "XY",
}
SAID = {
    "mls_eng_000001": "[eng] AB CX",  # one of five characters and the space after the symbol
    "mls_eng_000002": "[fra] ABCDEFGHIJ",
    "cv_fra_000001": "[fra]",  # three deletions, and the space's
    "cv_tur_000001": "XY [tur]",
}


def track(task="joint"):
    def example(id, text):
        source, language, _ = id.split("_")
        utterance = Utterance(id, source, language, language, Path(id), 1.0, text)
        written = {"joint": f"[{language}] {text}", "identification": f"[{language}]"}.get(task, text)
        return Example(utterance, written, [])

    examples = [example(*each) for each in TEXTS.items()]
    symbols = ["[eng]", "[fra]", "[tur]"] if task in ("joint", "identification") else []
    kind = "language" if task == "identification" else "character"
    parts = {"train": examples, "dev": examples, "test": examples}
    return Track(task, task, "10min", parts, {"train": [LeftOut("x:1", "no text")]}, ["<blank>"], symbols, kind)


def test_error_rates_are_pooled_within_groups():
    """Normal: (0 + 1) + 0 + 4 of 6 + 11 + 4 characters, each with the space after the symbol; few-shot: one moved."""
    found = figures(track(), judge(track(), SAID))
    normal = found["groups"]["normal"]
    assert (normal["tokens"], normal["substitutions"], normal["deletions"], normal["insertions"]) == (21, 1, 4, 0)
    assert normal["error_rate"] == pytest.approx(100 * 5 / 21)
    few = found["groups"]["few-shot"]  # " XY" and "XY ": the space is deleted and inserted
    assert (few["tokens"], few["deletions"], few["insertions"]) == (3, 1, 1)
    assert found["all"]["error_rate"] == pytest.approx(100 * 7 / 24)
    assert found["languages"]["eng"]["error_rate"] == pytest.approx(100 * 1 / 17)
    assert found["left_out"] == {"train": {"no text": 1}}


def test_references_that_are_all_empty_have_no_error_rate():
    """Their insertions count in the rates of what they are part of; and results.json is JSON that anyone reads."""
    empty = track("multilingual")
    turkish = empty.parts["test"][-1]
    parts = empty.parts | {"test": [*empty.parts["test"][:-1], turkish._replace(text="")]}
    found = figures(empty._replace(parts=parts), judge(empty._replace(parts=parts), dict.fromkeys(TEXTS, "XY")))
    assert found["groups"]["few-shot"] == found["languages"]["tur"]
    assert found["languages"]["tur"] == dict(utterances=1, tokens=0, substitutions=0, deletions=0, insertions=2)
    assert found["all"]["error_rate"] == pytest.approx(100 * (5 + 10 + 3 + 2) / 18)
    json.dumps(found, allow_nan=False)


def test_language_is_the_first_symbol_said():
    found = figures(track(), judge(track(), SAID | {"cv_tur_000001": "XY"}))
    assert found["groups"]["normal"]["accuracy"] == pytest.approx(200 / 3)
    assert found["groups"]["few-shot"]["accuracy"] == 0
    assert found["confusions"] == {"[eng]": {"[eng]": 1, "[fra]": 1}, "[fra]": {"[fra]": 1}, "[tur]": {"[UNK]": 1}}


def test_identification_counts_no_characters():
    said = {id: text.split("]")[0][-4:] + "]" for id, text in SAID.items()}
    found = figures(track("identification"), judge(track("identification"), said | {"mls_eng_000001": "[eng]"}))
    assert "error_rate" not in found["all"] and found["all"]["utterances"] == 4


def test_recognition_alone_says_no_language():
    found = figures(track("multilingual"), judge(track("multilingual"), TEXTS))
    assert found["all"]["error_rate"] == 0 and "accuracy" not in found["all"] and "confusions" not in found


def test_every_utterance_is_judged():
    with pytest.raises(ScoringError, match=r"no hypothesis: cv_fra_000001, cv_tur_000001 \(2 in all\)"):
        judge(track(), {id: text for id, text in SAID.items() if id.startswith("mls")})
    with pytest.raises(ScoringError, match="of others: nonsense"):
        judge(track(), SAID | {"nonsense": ""})


def test_the_challenge_averages_over_languages():
    """eng: (1/5 + 0)/2, fra: 1, tur: the first five characters are cut, "XY [t", which leaves "ur]" without "]"."""
    scores = challenge_scores(judge(track(), SAID))
    rates = [100 * (0.2 + 0) / 2, 100.0, 100 * edit_distance("XY", "UR") / 2]
    mean = sum(rates) / 3
    assert scores.error_rate == pytest.approx(mean)
    assert scores.deviation == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in rates) / 2))
    assert scores.worst_15 == pytest.approx(sum(rates) / 15)
    assert scores.accuracy == pytest.approx((50 + 100 + 0) / 3)


@pytest.mark.parametrize(("one", "other", "distance"), [("kitten", "sitting", 3), ("", "ab", 2), ("ab", "", 2)])
def test_edit_distance(one, other, distance):
    assert edit_distance(one, other) == distance
