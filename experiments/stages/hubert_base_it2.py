"""HuBERT Base, second iteration: predict k-means units of the first iteration's layer 6.

Command: `python -m experiments train hubert_base_it2 --workdir W --corpus PREPARED` (after hubert_base_it1 in W)
Paper: HuBERT (2106.07447), section IV-A; 400k updates on 32 GPUs, about 1,220 GPU-hours; 500 clusters.
Expect: with LibriSpeech 960 h and 10 h of labels, word error rates of about 10.4 / 17.4 on dev-clean / dev-other
(ESPnet's reproduction, egs2/librispeech/ssl1/README.md).
Deviates: as hubert_base_it1 does.
"""

import dataclasses

from experiments.stage import StageConfig
from experiments.stages import hubert_base_it1
from experiments.units import UnitsConfig
from wavlab_jax.heads import HeadConfig


def get_config() -> StageConfig:
    """The paper's size."""
    first = hubert_base_it1.get_config()
    optimizer = dataclasses.replace(first.learner.optimizer, total_steps=400_000)
    return dataclasses.replace(
        first,
        name="hubert_base_it2",
        learner=dataclasses.replace(first.learner, head=HeadConfig(units=500, dim=256), optimizer=optimizer),
        units=dataclasses.replace(
            first.units, name="hubert_base_it1_layer6", units=500, teacher="hubert_base_it1", layer=6
        ),
        loop=dataclasses.replace(first.loop, steps=400_000),
    )


def demo() -> StageConfig:
    """Two minutes on two cores: units of layer 2 of 3; continues iteration 1's encoder (the paper starts afresh)."""
    first = hubert_base_it1.demo()
    return dataclasses.replace(
        first,
        name="hubert_base_it2",
        data=dataclasses.replace(first.data, seed=1),  # other crops and masks than the stage it continues has heard
        units=UnitsConfig(name="hubert_base_it1_layer2", units=100, teacher="hubert_base_it1", layer=2, fit_hours=0.5),
        init_from=first.name,
    )
