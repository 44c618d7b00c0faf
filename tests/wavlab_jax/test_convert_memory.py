"""How much memory a conversion takes, as a process: at most 1.3 times the file, and far less from layout to layout."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.wavlab_jax import tiny
from wavlab_jax.convert import Checkpoint, StoredTensor
from wavlab_jax.convert.layouts import write_checkpoint
from wavlab_jax.convert.names import wanted
from wavlab_jax.convert.torch_files import write_torch_file

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
# 152 MB in 12 layers, none of whose tensors is more than 3 % of the file.
LARGE = tiny.encoder(width=512, heads=8, feed_forward=2048, layers=12, position_groups=16)

MEASURE = """
import json, sys
import jax.numpy as jnp
from wavlab_jax.convert.checkpoint import to_encoder
from wavlab_jax.convert.layouts import read_checkpoint, write_checkpoint
from wavlab_jax.convert.names import wanted

def peak():  # of this program alone: ru_maxrss begins with that of the process that started it
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024

source, what = sys.argv[1:3]
checkpoint = read_checkpoint(source)
wanted(checkpoint.encoder)
float(jnp.zeros(1000).sum())  # starts the backend
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = peak()
if what == "encoder":
    encoder = to_encoder(checkpoint)
    kept = float(encoder.layers.expand.kernel[-1, 0, 0])
else:
    write_checkpoint(checkpoint, sys.argv[3], layout=what)
print(json.dumps(peak() - before))
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One random model as a Hugging Face folder, with a .bin, as fairseq's and torchaudio's; the first one's size."""

    def tensor(key, shape):
        return StoredTensor(key, shape, lambda: np.random.default_rng(0).standard_normal(shape, np.float32))

    tensors = {key: tensor(key, entry.shape) for key, entry in wanted(LARGE).items()}
    checkpoint = Checkpoint("wavlab_jax", "hubert", LARGE, tensors)
    folder = tmp_path_factory.mktemp("large")
    for layout in ("huggingface", "fairseq", "torchaudio"):
        write_checkpoint(checkpoint, folder / layout, layout=layout)
    (folder / "bin").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / "bin" / name).symlink_to(folder / "huggingface" / name)
    write_torch_file(folder / "bin" / "pytorch_model.bin", tensors)
    return folder, (folder / "huggingface" / "model.safetensors").stat().st_size


def grown(*arguments) -> int:
    """Bytes by which a process's memory grew at most while it converted."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("layout", ["huggingface", "bin", "fairseq", "torchaudio"])
def test_an_encoder_takes_little_more_than_its_file(layout, stored):
    folder, size = stored
    assert size > 150e6
    assert 0.9 * size < grown(folder / layout, "encoder") < 1.3 * size


@pytest.mark.parametrize(
    ("source", "to"), [("huggingface", "fairseq"), ("bin", "torchaudio"), ("fairseq", "huggingface")]
)
def test_a_conversion_holds_a_few_tensors_at_a_time(source, to, stored, tmp_path):
    folder, size = stored
    assert grown(folder / source, to, tmp_path / "out") < 0.1 * size
