"""Measures of units against scikit-learn, scipy and counting by hand."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from wavlab_jax.evaluation.unit_quality import (
    NO_PHONE,
    Phones,
    UnitQualityError,
    entropy,
    information,
    joint_counts,
    phone_of_frame,
    phone_quality,
    read_phones,
)


@given(rows=st.integers(1, 6), units=st.integers(1, 9), frames=st.integers(1, 300), seed=st.integers(0, 99))
def test_measures_are_those_of_counting_frame_by_frame(rows, units, frames, seed):
    rng = np.random.default_rng(seed)
    row, unit = rng.integers(0, rows, frames), rng.integers(0, units, frames)
    unit = np.where(rng.random(frames) < 0.5, np.minimum(row, units - 1), unit)  # some dependence
    joint = joint_counts(row, unit, shape=(rows, units))
    assert joint.sum() == frames and all(
        joint[r, u] == np.sum((row == r) & (unit == u)) for r, u in zip(row, unit, strict=True)
    )
    found = phone_quality(joint)
    nats = mutual_info_score(row, unit)
    assert found.information.bits == pytest.approx(nats / np.log(2), abs=1e-9)
    row_entropy = scipy.stats.entropy(np.bincount(row), base=2)
    assert entropy(np.bincount(row)).bits == pytest.approx(row_entropy, abs=1e-12)
    pnmi = nats / np.log(2) / row_entropy if row_entropy > 0 else 0.0
    assert found.information.normalized == pytest.approx(pnmi, abs=1e-9)
    best_phone = {u: np.bincount(row[unit == u]).argmax() for u in set(unit.tolist())}
    best_unit = {r: np.bincount(unit[row == r]).argmax() for r in set(row.tolist())}
    assert found.phone_purity == pytest.approx(np.mean([best_phone[u] == r for r, u in zip(row, unit, strict=True)]))
    assert found.cluster_purity == pytest.approx(np.mean([best_unit[r] == u for r, u in zip(row, unit, strict=True)]))
    assert (found.frames, found.phones) == (frames, len(best_unit))


def test_a_unit_a_phone_and_no_relation_at_all():
    exact = phone_quality(np.diag([5, 7, 9]))
    assert exact[2:4] == (1.0, 1.0) and exact.information.normalized == pytest.approx(1.0)
    none = information(np.outer([1, 2, 3], [4, 5]))
    assert none.bits == pytest.approx(0.0, abs=1e-12)


def test_the_correction_takes_most_of_the_bias_away():
    """Independent rows and units: 600 frames in 5 x 20 cells look informative, by about the bias that is promised."""
    rng = np.random.default_rng(0)
    found = [
        information(joint_counts(rng.integers(0, 5, 600), rng.integers(0, 20, 600), shape=(5, 20))) for _ in range(200)
    ]
    plain, corrected = (np.mean([getattr(one, name) for one in found]) for name in ("bits", "corrected_bits"))
    assert plain == pytest.approx(4 * 19 / (2 * 600 * np.log(2)), rel=0.15)
    assert abs(corrected) < 0.15 * plain
    assert entropy([3, 3]).corrected_bits == pytest.approx(1 + 1 / (2 * 6 * np.log(2)))


def test_frames_take_the_phone_at_their_centre(tmp_path):
    (tmp_path / "a.phn").write_text("0.0000\t0.0125\tsil\n0.0125\t0.0325\ta\n0.0500\t0.0900\tʃ\n", encoding="utf-8")
    phones = read_phones(tmp_path / "a.phn")
    assert phones.name == ("sil", "a", "ʃ") and phones.end.tolist() == [0.0125, 0.0325, 0.09]
    # centres: 12.5, 32.5, 52.5, 72.5, 92.5 ms
    assert phone_of_frame(phones, 5).tolist() == [1, NO_PHONE, 2, 2, NO_PHONE]
    assert phone_of_frame(Phones(np.zeros(0), np.zeros(0), ()), 2).tolist() == [NO_PHONE, NO_PHONE]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0\t1\ta\nx\t2\tb\n", "line 2 is"),
        ("0\t1\n", "line 1 is .*expected start, end and phone"),
        ("0\t1\ta\n0.5\t2\tb\n", "line 2 .*begins where the last one ended"),
        ("1\t0.9\ta\n", "line 1 .*begins where"),
        ("0\t1\ta\tb\n", "line 1"),
        ("0\tinf\ta\n", "line 1"),
    ],
)
def test_lines_that_are_no_alignment_are_named(tmp_path, text, said):
    (tmp_path / "a.phn").write_text(text)
    with pytest.raises(UnitQualityError, match=said):
        read_phones(tmp_path / "a.phn")
    with pytest.raises(UnitQualityError, match="cannot be read"):
        read_phones(tmp_path / "b.phn")


def test_counts_that_say_nothing_are_refused():
    for counts in (np.zeros((2, 2)), np.array([[1.0, -1.0]]), np.array([[np.nan, 1.0]])):
        with pytest.raises(UnitQualityError, match="no frames, no measure"):
            information(counts)
    with pytest.raises(UnitQualityError, match="expected \\[rows, units\\]"):
        information(np.ones(3))
