"""`--verify`: what an export is held against, and what becomes of one that does not compute the same."""

import logging

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from experiments.export import Exported, check
from experiments.verify import Comparison, VerifyError, table
from tests.wavlab_jax import tiny
from wavlab_jax.convert import from_encoder
from wavlab_jax.convert.layouts import write_checkpoint

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Loading bars and advice of transformers stay out of the test log; torch keeps to one thread."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def exported(folder, *, scale: float = 1.0, **heads) -> Exported:
    """A tiny model whose layers' outputs are `scale` times as large."""
    encoder = tiny.randomised(tiny.encoder())
    encoder.layers.final_norm.scale[...] = encoder.layers.final_norm.scale[...] * scale
    checkpoint = from_encoder(encoder, head=heads)
    return Exported(checkpoint, folder, "huggingface", write_checkpoint(checkpoint, folder, layout="huggingface"), ())


def test_large_states_are_held_to_their_own_scale(tmp_path):
    """float32 keeps seven digits: states of some thousand differ by more than 1e-4 in the best of codes."""
    heads = {"lm_head.weight": np.ones((5, 16), np.float32), "lm_head.bias": np.ones(5, np.float32)}
    peer, logits = check(exported(tmp_path / "out", scale=3000.0, **heads), None)  # loaded by HubertForCTC
    assert logits.differences.keys() == {"logits"} and logits.wrong() == []
    assert peer.largest > 1e-4 and max(peer.magnitudes.values()) > 1000 and peer.wrong() == []
    assert (tmp_path / "out").is_dir()


def test_what_computes_something_else_is_told_layer_by_layer_and_not_kept(tmp_path):
    found = exported(tmp_path / "out")
    model = load_file(tmp_path / "out" / "model.safetensors")
    model["encoder.layers.1.feed_forward.output_dense.bias"][3] += 0.01
    save_file(model, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerifyError) as caught:
        check(found, None)
    lines = str(caught.value).splitlines()
    assert "hidden states 2 differ from transformers" in lines[0] and lines[-1].endswith("is not kept")
    told = {int(line.split()[0]): line.split() for line in lines[3:-1]}
    assert told.keys() == {0, 1, 2} and told[2][-2:] == ["too", "much"] and len(told[1]) == 4
    assert not (tmp_path / "out").exists()


def test_logits_of_another_head_are_told(tmp_path):
    heads = {"lm_head.weight": np.ones((5, 16), np.float32), "lm_head.bias": np.ones(5, np.float32)}
    found = exported(tmp_path / "out", **heads)
    model = load_file(tmp_path / "out" / "model.safetensors")
    model["lm_head.bias"][3] += 0.01
    save_file(model, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerifyError, match="out: logits differ from HubertForCTC, transformers"):
        check(found, None)


def test_nan_is_too_much():
    peer = Comparison({0: 1e-5, 1: float("nan"), 2: 0.02}, {0: 0.5, 1: 1.0, 2: 300.0}, "x")
    assert peer.wrong() == [1] and peer.largest == np.inf and peer.limit(2) == pytest.approx(0.03)
    assert "too much" in table([peer]).splitlines()[3]
