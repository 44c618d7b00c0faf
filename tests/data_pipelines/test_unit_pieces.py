"""Pieces of units: bounds that cover everything once, shares of hosts, what is refused, and joining."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.batch import num_frames
from data_pipelines.manifest import Manifest, write_manifest
from data_pipelines.unit_pieces import UnitPieces, piece_bounds, share_of
from data_pipelines.units import UnitsError, UnitStore

SAMPLES = [16_000, 400, 719, 720, 48_123, 32_000]


@pytest.fixture
def manifest(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    write_manifest(root, samples=SAMPLES, language=["fra"] * 6, corpus=["x"] * 6)
    return Manifest.load(root, check_shards=False)


def labels_of(pieces, piece):
    return np.concatenate([(np.arange(pieces.frames[i]) * 7 + i) % 50 for i in pieces.rows(piece)]).astype(np.uint16)


def opened(tmp_path, manifest, **changes):
    return UnitPieces(tmp_path / "units", manifest, **{"units": 50, "source": "x", "piece_frames": 51, **changes})


@given(frames=st.lists(st.integers(0, 50), max_size=40), most=st.integers(1, 60))
def test_pieces_cover_every_utterance_once_and_are_as_large_as_they_may_be(frames, most):
    bounds = piece_bounds(np.array(frames, np.int64), piece_frames=most)
    assert bounds[0] == 0 and bounds[-1] == len(frames) and (np.diff(bounds) > 0).all()
    for first, last in zip(bounds, bounds[1:], strict=False):
        assert sum(frames[first:last]) <= most or last - first == 1
        assert last == len(frames) or sum(frames[first : last + 1]) > most  # the next one did not fit


@given(pieces=st.integers(0, 50), hosts=st.integers(1, 9))
def test_every_piece_is_one_hosts(pieces, hosts):
    shares = [share_of(pieces, host=host, hosts=hosts) for host in range(hosts)]
    assert [piece for share in shares for piece in share] == list(range(pieces))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_pieces_in_any_order_become_the_store(tmp_path, manifest):
    pieces = opened(tmp_path, manifest)
    assert len(pieces) == 4 and pieces.missing() == [0, 1, 2, 3] and pieces.missing(host=1, hosts=2) == [2, 3]
    for piece in (3, 1):
        pieces.write(piece, labels_of(pieces, piece))
    with pytest.raises(UnitsError, match=r"lacks 2 of 4 pieces \(0, 2\): run the same command again"):
        pieces.join()
    again = opened(tmp_path, manifest)
    assert again.missing() == [0, 2]
    again.folder.path(1).write_bytes(b"cut")  # not whole: made again
    assert opened(tmp_path, manifest).missing() == [0, 1, 2]
    for piece in (0, 1, 2):
        again.write(piece, labels_of(again, piece).astype(np.int32))
    again.join()
    store = UnitStore.load(tmp_path / "units", manifest)
    for i, samples in enumerate(SAMPLES):
        np.testing.assert_array_equal(store.read(i), (np.arange(num_frames(samples)) * 7 + i) % 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "units"]
    with pytest.raises(UnitsError, match="exists already"):
        opened(tmp_path, manifest)


def test_pieces_of_other_units_are_not_gone_on_with(tmp_path, manifest):
    pieces = opened(tmp_path, manifest)
    pieces.write(0, labels_of(pieces, 0))
    for changes in ({"source": "y"}, {"units": 51}, {"piece_frames": 150}):
        assert 0 in opened(tmp_path, manifest, **changes).missing()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.zeros(50, np.int32), r"int32\[50\], integers \[51\] expected"),
        (np.zeros(51, np.float32), "float32"),
        (np.full(51, 50), r"labels 50\.\.50; with 50 units they must lie in 0\.\.49"),
        (np.full(51, -1), r"labels -1\.\.-1"),
    ],
)
def test_wrong_labels_are_named_by_their_piece(tmp_path, manifest, labels, said):
    pieces = opened(tmp_path, manifest)
    with pytest.raises(UnitsError, match=f"000000.uint16: .*{said}"):
        pieces.write(0, labels)
    assert 0 in pieces.missing()
