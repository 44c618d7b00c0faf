"""Finding a string that comes twice, against counting them one by one."""

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import unique
from data_pipelines.unique import first_repeated


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab\0é", max_size=18), max_size=12), st.integers(0, 3))
def test_as_counted(values, first):
    array = pa.array(values, pa.large_string())[first:]  # also where the array begins within its buffer
    found = first_repeated(array)
    repeated = {value for value, count in Counter(values[first:]).items() if count > 1}
    assert found in repeated if repeated else found is None


@pytest.mark.parametrize("piece", [7, 1 << 14])
def test_across_pieces_and_where_hashes_meet(monkeypatch, piece):
    monkeypatch.setattr(unique, "_PIECE", piece)
    ids = [f"corpus/clip-{number:06d}.wav" for number in range(20_000 if piece > 7 else 50)]
    assert first_repeated(pa.array(ids, pa.large_string())) is None
    assert first_repeated(pa.array([*ids, ids[3]], pa.large_string())) == ids[3]
    monkeypatch.setattr(unique, "mix64", lambda seed, word: seed * 0)  # all hashes alike: only letters tell
    assert first_repeated(pa.array(ids, pa.large_string())) is None
    assert first_repeated(pa.array([*ids, ids[3]], pa.large_string())) == ids[3]
