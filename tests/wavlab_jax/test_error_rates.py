"""Counts beside sclite's own, and beside a plain dynamic programme."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavlab_jax.evaluation.error_rates import NO_ERRORS, ErrorRateError, Errors, count_errors, pooled

# sclite 2.10, `-i rm -o pralign`, one letter a word: substitutions, deletions, insertions
SCLITE = [
    ("abbabbbaab", "bbbaabbabba", (3, 0, 1)),
    ("abbdcebdadbabdacdee", "eccdbcabcecdeeebcdecededc", (7, 2, 8)),
    ("babbabaaabaabbbbabab", "abbbababbbbaababbaa", (0, 5, 4)),
    ("abcxyz", "xyzabc", (0, 3, 3)),
    ("kitten", "sitting", (2, 0, 1)),
    ("abcde", "fghij", (5, 0, 0)),
    ("a", "bcdef", (1, 0, 4)),
    ("abcdef", "a", (0, 5, 0)),
    ("hello", "hello", (0, 0, 0)),
    ("ccaeededbdbebbbc", "dabccbecebbab", (3, 6, 3)),
    ("abcd", "", (0, 4, 0)),
    ("ABéI", "abÉi", (1, 0, 0)),  # cases of ASCII are the same, of others not
]


def test_counts_are_those_of_sclite():
    counted = count_errors([reference for reference, _, _ in SCLITE], [hypothesis for _, hypothesis, _ in SCLITE])
    for (reference, hypothesis, expected), errors in zip(SCLITE, counted, strict=True):
        assert errors == (len(reference), *expected), (reference, hypothesis)


def test_phones_that_differ_in_case_alone_are_the_same_to_sclite():
    """As it says itself of these: (0, 0, 0), (0, 1, 0) and, of wide letters, (1, 0, 0)."""
    pairs = [("d e s U", "d e s u"), ("k o N n i ch i w a", "k o n i ch I w a"), ("ＡＢ", "ａｂ")]
    counted = count_errors(*([each[side].split() for each in pairs] for side in (0, 1)))
    assert [errors[1:] for errors in counted] == [(0, 0, 0), (0, 1, 0), (1, 0, 0)]


def test_pooled_rate_weighs_by_tokens():
    """One of ten wrong and both of two: 3 of 12, where the mean of the rates would be 0.55."""
    assert pooled([Errors(10, 1, 0, 0), Errors(2, 0, 2, 0)]).rate == pytest.approx(3 / 12)
    assert pooled([]) == NO_ERRORS


def test_an_empty_reference_counts_insertions():
    assert count_errors([""], ["abc"]) == [Errors(0, 0, 0, 3)]
    assert count_errors([], []) == []


def test_lengths_must_agree():
    with pytest.raises(ErrorRateError, match="1 references but 2 hypotheses"):
        count_errors(["a"], ["a", "b"])


def least_weight(reference, hypothesis) -> int:
    """Of 4 a substitution and 3 an insertion or a deletion, by the textbook's table."""
    row = [3 * j for j in range(len(hypothesis) + 1)]
    for i, token in enumerate(reference, 1):
        before, row = row, [3 * i]
        for j, other in enumerate(hypothesis, 1):
            row.append(min(before[j - 1] + 4 * (token != other), before[j] + 3, row[-1] + 3))
    return row[-1]


strings = st.lists(st.sampled_from("abc"), max_size=9)


@given(st.lists(st.tuples(strings, strings), min_size=1, max_size=4))
def test_alignments_are_least_and_add_up(pairs):
    """Whatever else is aligned beside a pair: its weight is the least one, and lengths follow from the counts."""
    for (reference, hypothesis), errors in zip(pairs, count_errors(*zip(*pairs, strict=True)), strict=True):
        weight = 4 * errors.substitutions + 3 * (errors.deletions + errors.insertions)
        assert weight == least_weight(reference, hypothesis)
        assert len(reference) - errors.deletions + errors.insertions == len(hypothesis)
        assert errors.substitutions + errors.deletions <= len(reference) == errors.tokens
        assert min(errors) >= 0
