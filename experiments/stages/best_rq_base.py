"""BEST-RQ targets on HuBERT Base: units of a random projection and a random codebook, no clustering and no teacher.

Command: `python -m experiments train best_rq_base --workdir W --corpus PREPARED` (needs no units)
Paper: BEST-RQ (2202.01855): 8,192 entries of 16 dimensions, a plain softmax. There on log-mel features and a Conformer,
with masks of 400 ms that start at 1 % of the frames.
Open, and chosen here: the targets on HuBERT Base's encoder and masks (which start at 8 % of the frames of 20 ms and
last 200 ms), so that the comparison with HuBERT is one of targets alone; three frames projected together, 65 ms
(BEST-RQ stacks four of 10 ms); SpeechBrain's 300k updates and warm-up of 25k at 8e-4; HuBERT Base's 0.8 h a step
(SpeechBrain 2 h, the paper about 18 h).
Expect: "Open implementation and study of BEST-RQ" reports scores like wav2vec 2.0's at under half of its training time.
"""

import dataclasses

from experiments.stage import StageConfig
from experiments.stages import hubert_base_it1
from wavlab_jax.heads import HeadConfig
from wavlab_jax.targets.random_projection import RandomProjectionConfig

STEPS = 300_000


def get_config() -> StageConfig:
    """The paper's size."""
    first = hubert_base_it1.get_config()
    optimizer = dataclasses.replace(
        first.learner.optimizer, peak_learning_rate=8e-4, warmup_steps=25_000, total_steps=STEPS
    )
    return dataclasses.replace(
        first,
        name="best_rq_base",
        learner=dataclasses.replace(
            first.learner, head=HeadConfig(units=8192, dim=256, scoring="linear"), optimizer=optimizer
        ),
        units=RandomProjectionConfig(units=8192, stack=3),
        loop=dataclasses.replace(first.loop, steps=STEPS),
    )


def demo() -> StageConfig:
    """Two minutes on two cores, from scratch: a codebook of 256 entries."""
    first = hubert_base_it1.demo()
    return dataclasses.replace(
        first,
        name="best_rq_base",
        learner=dataclasses.replace(first.learner, head=HeadConfig(units=256, dim=128, scoring="linear")),
        units=RandomProjectionConfig(units=256, stack=3),
    )
