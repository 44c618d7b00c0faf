"""`import` and `export` of published models as they are shipped: processes, their exit status and what they print."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.import_model import description
from tests.wavlab_jax import tiny
from wavlab_jax.convert import Checkpoint, StoredTensor, from_encoder
from wavlab_jax.convert.layouts import read_checkpoint, write_checkpoint
from wavlab_jax.convert.names import wanted
from wavlab_jax.encoder.architectures import architecture

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments):
    command = [sys.executable, "-m", "experiments", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny WavLM in unilm's layout."""
    folder = tmp_path_factory.mktemp("published") / "unilm"
    write_checkpoint(from_encoder(tiny.randomised(tiny.encoder(relative_bias=True))), folder, layout="unilm")
    return folder / "checkpoint.pt"


@pytest.mark.once
def test_import_writes_a_folder_and_says_what_it_found(published, tmp_path):
    chosen = ("--licence", "cc0-1.0", "--normalize-waveform", "True")
    found = launch("import", published, "--out", tmp_path / "hf", *chosen)
    assert found.returncode == 0, found.stderr
    lines = dict(line.split(maxsplit=1) for line in found.stdout.splitlines())
    assert lines["layout"] == "unilm" and lines["model"].startswith("wavlm, an architecture without a name: 2 layers")
    count = sum(np.prod(tensor.shape) for tensor in wanted(tiny.encoder(relative_bias=True)).values())
    assert lines["parameters"] == f"{count:,} in the encoder, 0 in heads"
    assert "model.safetensors" in lines[f"{tmp_path / 'hf'}:"]
    before, after = read_checkpoint(published), read_checkpoint(tmp_path / "hf")
    assert after.model_type == "wavlm"
    assert after.encoder == replace(before.encoder, normalize_waveform=True) != before.encoder
    for name, tensor in before.tensors.items():
        np.testing.assert_array_equal(tensor.values(), after.tensors[name].values())

    found = launch("export", tmp_path / "hf", "--out", tmp_path / "espnet", "--layout", "espnet")
    assert found.returncode == 0, found.stderr
    assert "(espnet): README.md, config.yaml, model.pth" in found.stdout and "note: " in found.stdout
    assert "license: cc0-1.0" in (tmp_path / "espnet" / "README.md").read_text()  # of the imported model's card


def test_a_file_that_asks_for_code_is_refused(tmp_path):
    # protocol 0: GLOBAL posix.system, a mark, a string, TUPLE, REDUCE, STOP
    (tmp_path / "evil.pt").write_bytes(b"\x80\x02cposix\nsystem\n(S'touch " + str(tmp_path / "x").encode() + b"'\ntR.")
    found = launch("import", tmp_path / "evil.pt", "--out", tmp_path / "out")
    assert found.returncode == 1 and "Traceback" not in found.stderr and "evil.pt" in found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]


def test_a_published_architecture_is_called_by_its_name():
    cfg = architecture("xls_r_300m")
    tensors = {
        key: StoredTensor(key, tensor.shape, lambda shape=tensor.shape: np.zeros(shape, np.float32))
        for key, tensor in wanted(cfg).items()
    }
    head = StoredTensor.of("lm_head.bias", np.zeros(32, np.float32))
    odd = StoredTensor.of("odd", np.zeros((2, 3), np.float32))
    checkpoint = Checkpoint(
        "fairseq",
        "wav2vec2",
        cfg,
        tensors,
        {"lm_head.bias": head, "odd": odd},
        notes=("Two heads.",),
        left_over=("a", "b"),
    )
    assert description(checkpoint).splitlines()[1].startswith("model       wav2vec2, ")
    text = description(checkpoint)
    assert "315,438,720 in the encoder, 38 in heads" in text  # facebook/wav2vec2-xls-r-300m without its heads
    assert "lm_head.bias [32]\n" in text and "odd [2, 3] (kept under its own name)" in text
    assert "left over   a, b" in text and "note        Two heads." in text
