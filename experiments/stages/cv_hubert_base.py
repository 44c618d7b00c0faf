"""CV-HuBERT Base, the cheap variant: vanilla HuBERT on Common Voice alone, for 4 GPUs.

Command: `python -m experiments recipe cv_hubert --workdir W --corpus PREPARED`; or `train cv_hubert_base` after
hubert_base_it1 in W, trained with `--data.draw.corpora commonvoice --units.fit-corpora commonvoice`
Paper: WavLabLM (2309.15317): Common Voice 11, 13.6k hours (s3prl's documentation; the abstract's 3 % of XLS-R's 436k),
a second iteration, 4 GPUs, 94 % of XLS-R's score (of which one, is not said).
Open in the paper and the released files, and chosen here: 500 clusters of layer 6 of the first iteration, as HuBERT
Base; 0.8 h a step in as many passes as the devices need (24 on 4 GPUs that hold 30 s each); 400k updates, 320k hours
or 23 epochs; peak learning rate 5e-4 (ESPnet's Base configuration,
egs2/librispeech/ssl1/conf/tuning/train_ssl_torchaudiohubert_base_960h_pretrain_it2.yaml, has 250 epochs at 1.56 h a
step, its inverse square root schedule and clipping at 5, taken over); the natural skew.
Cost: at 256 times real time a GPU (HuBERT's paper, V100), 1,250 GPU-hours, 13 days on 4.
Expect: no row of the paper's table was found; HuBERT Base on LibriSpeech has 831.9 / 884.9 SUPERB points (10 min,
1 h).
"""

import dataclasses

from data_pipelines.balance import DrawConfig
from experiments.stage import StageConfig
from experiments.stages import hubert_base_it2

COMMON_VOICE = ("commonvoice",)


def get_config() -> StageConfig:
    """The paper's size."""
    second = hubert_base_it2.get_config()
    optimizer = dataclasses.replace(second.learner.optimizer, schedule="inverse_sqrt", clip_norm=5.0)
    return dataclasses.replace(
        second,
        name="cv_hubert_base",
        learner=dataclasses.replace(second.learner, optimizer=optimizer),
        data=dataclasses.replace(second.data, draw=DrawConfig(corpora=COMMON_VOICE)),
        units=dataclasses.replace(
            second.units, name="cv_hubert_base_it1_layer6", fit_corpora=COMMON_VOICE, fit_hours=1_360.0
        ),
        seconds_per_device=30.0,
    )


def demo() -> StageConfig:
    """Two minutes on two cores: the demo's second iteration, in as many passes as devices of 4 s need."""
    return dataclasses.replace(hubert_base_it2.demo(), name="cv_hubert_base", seconds_per_device=4.0)
