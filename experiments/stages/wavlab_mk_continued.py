"""The control for stage 2: stage 1 continued for exactly as many steps, on the natural skew.

Command: `python -m experiments train wavlab_mk_continued --workdir W --corpus PREPARED` (after wavlab_mk in W)
Everything but the exponents of the draw is `wavlab_ms`: corpora, steps, schedule, units, mixing, seeds.
Expect: the difference between the two is what balancing did.
"""

import dataclasses

from experiments.stage import StageConfig
from experiments.stages import wavlab_ms
from experiments.stages.presets import NATURAL


def get_config() -> StageConfig:
    """The paper's size."""
    return _on_natural_skew(wavlab_ms.get_config())


def demo() -> StageConfig:
    """A minute on two cores."""
    return _on_natural_skew(wavlab_ms.demo())


def _on_natural_skew(stage2: StageConfig) -> StageConfig:
    natural = dataclasses.replace(NATURAL, corpora=stage2.data.draw.corpora)
    return dataclasses.replace(stage2, name="wavlab_mk_continued", data=dataclasses.replace(stage2.data, draw=natural))
