"""benchmarks/train_step.py measures in the precision that it is asked for, and what can be measured."""

import sys

import pytest

from benchmarks import train_step
from wavlab_jax.encoder import EncoderConfig, architectures

SMALL = EncoderConfig(extractor_channels=(8,) * 7, width=32, layers=2, heads=4, feed_forward=48)


@pytest.mark.torch
def test_the_forward_section_computes_in_the_precision_that_it_says(monkeypatch):
    """Either side's bfloat16 is far from its float32, and both float32 agree."""
    import numpy as np

    from benchmarks.forward_throughput import pair_of, programs

    monkeypatch.setattr(architectures, "architecture", lambda name: SMALL)
    waveform = train_step.Case("small", 2, 0.5, "float32", False).batch().waveform
    pair = pair_of("small")
    found = {}
    for dtype in ("float32", "bfloat16"):
        ours, theirs = programs(*pair, waveform, dtype=dtype)
        found[dtype] = np.asarray(ours()[-1], np.float32), theirs()[-1].float().numpy()
    for exact, rounded in zip(*found.values(), strict=True):
        # By the norm: the largest of 1,536 differences depends on which processor rounded.
        assert 1e-3 < np.linalg.norm(exact - rounded) / np.linalg.norm(exact) < 0.5
    peaks = []
    monkeypatch.setattr(train_step, "peak", lambda dtype: peaks.append(dtype) or {"best": 1e12})
    for dtype in found:
        told = train_step.measure_forward(train_step.Case("small", 2, 0.5, dtype, False), repeats=1)
        assert told["dtype"] == peaks[-1] == dtype and (told["largest_difference"] < 1e-4) == (dtype == "float32")


@pytest.mark.parametrize("side", [1, 2])
def test_by_default_what_needs_torch_is_left_out_without_it(monkeypatch, capsys, side):
    taken = []
    monkeypatch.setattr(train_step, "prepare", lambda threads: None)
    monkeypatch.setattr(train_step, "sides", lambda: train_step.SIDES[:side])
    monkeypatch.setattr(train_step, "peak", lambda dtype: {"best": 1e9})
    monkeypatch.setattr(train_step, "said", lambda section, case, found: taken.append(section))
    for name in ("forward", "step", "memory", "start"):
        monkeypatch.setattr(train_step, f"measure_{name}", lambda case, **_: {})
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--models", "hubert_base"])
    train_step.main()
    assert taken == ["forward", "step", "memory", "start"][2 - side :]
    assert ("ours alone" in capsys.readouterr().out) == (side == 1)
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--only", "forward", "--models", "hubert_base"])
    if side == 1:
        with pytest.raises(SystemExit):
            train_step.main()
        assert "`forward` needs torch" in capsys.readouterr().err
