"""What several files of tests listen to, and a run that they look at."""

import numpy as np
import pytest

from tests.wavlab_jax.encoded import SAMPLES
from tests.wavlab_jax.small_run import KEEPING, run


@pytest.fixture(scope="session")
def waveform() -> np.ndarray:
    """[3, samples] float32: noise of three levels with an offset."""
    rng = np.random.default_rng(1)
    scale = np.array([0.1, 0.02, 0.3])[:, None]
    return (scale * rng.standard_normal((3, SAMPLES)) + 0.05).astype(np.float32)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run that nothing stopped: its folder, which stays as it is, and its last state."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, loop=KEEPING)
