"""How the drawn seconds are shared out over languages and corpora."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.balance import (
    MHUBERT_147,
    XLS_R,
    DrawConfig,
    SamplingError,
    leaf_shares,
    subset_seconds,
)


def test_leaf_shares_by_hand():
    seconds = {("a", "x"): 90.0, ("a", "y"): 10.0, ("b", "x"): 25.0, ("c", "x"): 0.0}
    shares = leaf_shares(seconds, cfg=DrawConfig(language_exponent=0.5, corpus_exponent=0.5))
    # sqrt(100) : sqrt(25) = 2 : 1, and inside a sqrt(90) : sqrt(10) = 3 : 1
    assert shares == pytest.approx({("a", "x"): 0.5, ("a", "y"): 1 / 6, ("b", "x"): 1 / 3})


def test_exponents_one_are_as_found_and_zero_are_equal():
    seconds = {("a", "x"): 90.0, ("a", "y"): 10.0, ("b", "x"): 25.0}
    assert leaf_shares(seconds, cfg=DrawConfig(1, 1)) == pytest.approx({k: s / 125 for k, s in seconds.items()})
    assert leaf_shares(seconds, cfg=DrawConfig(0, 0)) == pytest.approx(
        {("a", "x"): 0.25, ("a", "y"): 0.25, ("b", "x"): 0.5}
    )


def test_large_exponents_do_not_overflow():
    shares = leaf_shares({("a", "x"): 1e8, ("b", "x"): 1e7}, cfg=DrawConfig(500.0, 500.0))
    assert shares[("a", "x")] == 1.0 and sum(shares.values()) == 1.0


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["language_exponent", "corpus_exponent"])
def test_exponents_that_cannot_be_meant(name, value):
    with pytest.raises(SamplingError, match=name):
        DrawConfig(**{name: value})


@pytest.mark.parametrize("seconds", [{}, {("a", "x"): 0.0}, {("a", "x"): -1.0}, {("a", "x"): math.nan}])
def test_seconds_that_cannot_be_shared(seconds):
    with pytest.raises(SamplingError):
        leaf_shares(seconds, cfg=DrawConfig())


# --- caps and floors, subsets ---

HOUR = 3600.0
amounts = st.dictionaries(
    st.tuples(st.sampled_from("abcde"), st.sampled_from("xyz")), st.floats(1.0, 1e6), min_size=1, max_size=12
)


@given(amounts, st.floats(0, 1), st.floats(0, 1), st.sampled_from(["language", "corpus"]))
def test_caps_and_floors_by_the_definition(seconds, alpha, beta, first):
    """A language counts as clip(hours), its corpora in proportion; then the exponents. By brute force."""
    cfg = DrawConfig(alpha, beta, first=first, cap_hours=20.0, floor_hours=1.5)
    counted = {}
    for language in {pair[0] for pair in seconds}:
        mine = {pair: s for pair, s in seconds.items() if pair[0] == language}
        clipped = min(max(sum(mine.values()), 1.5 * HOUR), 20 * HOUR)
        counted |= {pair: s * clipped / sum(mine.values()) for pair, s in mine.items()}
    expected = leaf_shares(counted, cfg=DrawConfig(alpha, beta, first=first))
    found = leaf_shares(seconds, cfg=cfg)
    assert found == pytest.approx(expected) and sum(found.values()) == pytest.approx(1)


def test_a_cap_by_hand():
    seconds = {("a", "x"): 30 * HOUR, ("a", "y"): 10 * HOUR, ("b", "x"): 10 * HOUR, ("c", "x"): HOUR}
    shares = leaf_shares(seconds, cfg=DrawConfig(cap_hours=20.0, floor_hours=2.0))
    assert shares == pytest.approx({("a", "x"): 15 / 32, ("a", "y"): 5 / 32, ("b", "x"): 10 / 32, ("c", "x"): 2 / 32})


@given(amounts, st.floats(0, 1))
def test_a_subset_has_its_hours_and_no_corpus_more_than_it_has(seconds, beta):
    cfg = DrawConfig(1.0, beta, subset_hours=2.0)
    cut = subset_seconds(seconds, cfg=cfg)
    for language in {pair[0] for pair in seconds}:
        mine = {pair: s for pair, s in seconds.items() if pair[0] == language}
        named = {pair: cut[pair] for pair in mine if pair in cut}
        assert bool(named) == (sum(mine.values()) > 2 * HOUR)
        whole = sum(s for pair, s in mine.items() if pair not in named)
        if named:
            assert sum(named.values()) + whole == pytest.approx(2 * HOUR)
            for one, part in named.items():
                assert part <= mine[one] * (1 + 1e-9)
                for other, against in named.items():
                    assert part / against == pytest.approx((mine[one] / mine[other]) ** beta)


@pytest.mark.parametrize("changes", [{"cap_hours": 0.0}, {"floor_hours": -1.0}, {"subset_hours": math.nan}])
def test_hours_that_cannot_be_meant(changes):
    with pytest.raises(SamplingError, match=next(iter(changes))):
        DrawConfig(**changes)
    with pytest.raises(SamplingError, match="below floor_hours"):
        DrawConfig(cap_hours=1.0, floor_hours=2.0)


# --- published rules ---


@given(st.dictionaries(st.tuples(st.sampled_from("abcde"), st.sampled_from("xyz")), st.integers(1, 10**6), min_size=1))
def test_mhubert_147_as_its_code_has_it(counts):
    """fairseq/data/audio/hubert_dataset.py of utter-project/fairseq, for lists of utterances: (n_l / N) ** 0.7 and
    (n_ld / n_l) ** 0.9, each normalised. Seconds do not matter."""
    total = sum(counts.values())
    of_language = Counter()
    for (language, _), n in counts.items():
        of_language[language] += n
    p = {language: (n / total) ** 0.7 for language, n in of_language.items()}
    p = {language: value / sum(p.values()) for language, value in p.items()}
    inside = {pair: (n / of_language[pair[0]]) ** 0.9 for pair, n in counts.items()}
    expected = {
        pair: p[pair[0]] * value / sum(v for other, v in inside.items() if other[0] == pair[0])
        for pair, value in inside.items()
    }
    seconds = {pair: 1.0 + 7 * k for k, pair in enumerate(counts)}
    assert leaf_shares(seconds, cfg=MHUBERT_147, utterances=counts) == pytest.approx(expected)
    with pytest.raises(SamplingError, match="counts utterances"):
        leaf_shares(seconds, cfg=MHUBERT_147)


def test_xls_r_over_its_corpora():
    """Square roots of hours, over corpora, then over the languages of each; hours of 2111.09296, recalled."""
    hours = {"voxpopuli": 372_000, "mls": 50_000, "commonvoice": 7_000, "voxlingua107": 6_600, "babel": 1_000}
    assert set(XLS_R.corpora) == set(hours)
    seconds = {}
    for name, amount in hours.items():
        seconds |= {("aaa", name): amount * 0.8 * HOUR, ("bbb", name): amount * 0.2 * HOUR}
    shares = leaf_shares(seconds, cfg=XLS_R)
    for name, amount in hours.items():
        of_corpus = math.sqrt(amount) / sum(map(math.sqrt, hours.values()))
        assert shares["aaa", name] == pytest.approx(of_corpus * 2 / 3)  # sqrt(0.8) : sqrt(0.2) = 2 : 1
        assert shares["bbb", name] == pytest.approx(of_corpus / 3)
