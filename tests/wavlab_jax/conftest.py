"""What several files of tests listen to."""

import numpy as np
import pytest

from tests.wavlab_jax.encoded import SAMPLES


@pytest.fixture(scope="session")
def waveform() -> np.ndarray:
    """[3, samples] float32: noise of three levels with an offset."""
    rng = np.random.default_rng(1)
    scale = np.array([0.1, 0.02, 0.3])[:, None]
    return (scale * rng.standard_normal((3, SAMPLES)) + 0.05).astype(np.float32)
