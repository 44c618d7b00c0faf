import zipfile

import numpy as np
import pytest

from experiments.array_archive import ArrayArchive


def test_numpy_reads_what_came_in_pieces(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"a/b.wav": rng.normal(size=(3, 101, 4)), "c": rng.normal(size=(1, 7, 4)).astype(np.float16)}
    with ArrayArchive(tmp_path / "x.npz") as archive:
        for name, array in arrays.items():
            archive.add_pieces(name, array.shape, array.dtype, (array[:, i : i + 10] for i in range(0, 101, 10)))
        archive.add("whole", arrays["a/b.wav"].transpose())
    with np.load(tmp_path / "x.npz") as found:
        assert found.files == [*arrays, "whole"]
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found["whole"], arrays["a/b.wav"].transpose())
    assert zipfile.ZipFile(tmp_path / "x.npz").testzip() is None
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_the_same_arrays_make_the_same_bytes(tmp_path):
    for name in "xy":
        with ArrayArchive(tmp_path / name) as archive:
            archive.add("a", np.arange(5))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_pieces_that_do_not_make_it_leave_no_trace(tmp_path):
    piece = np.zeros((2, 3, 4), np.float32)

    def failing():
        yield piece
        raise RuntimeError("gone")

    with ArrayArchive(tmp_path / "x.npz") as archive:
        archive.add("a", piece)
        with pytest.raises(RuntimeError, match="gone"):
            archive.add_pieces("b", (2, 6, 4), piece.dtype, failing())
        with pytest.raises(ValueError, match="c has 3 frames, 6 were announced"):
            archive.add_pieces("c", (2, 6, 4), piece.dtype, [piece])
        with pytest.raises(ValueError, match="a piece of d"):
            archive.add_pieces("d", (2, 3, 4), piece.dtype, [piece.astype(np.float64)])
    assert np.load(tmp_path / "x.npz").files == ["a"]
