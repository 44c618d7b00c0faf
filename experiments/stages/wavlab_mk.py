"""WavLabLM-MK, stage 1: joint prediction and denoising on all data with its natural skew, multilingual units.

Command: `python -m experiments train wavlab_mk --workdir W --corpus PREPARED` (after hubert_base_it2 in W)
Paper: WavLabLM (2309.15317); HuBERT Large's shape (the released checkpoints have no relative position bias), from
scratch; 40k hours and 136 languages in all, of which BABEL comes in stage 2; 500 clusters of layer 9 of a Base model
fitted on 10 % of the data, WavLM's mixing, 32 GPUs, 22 epochs, ESPnet's inverse square root schedule, clipping at 5.
Open in the paper and the released files, and chosen here: peak learning rate 5e-4 with 32k steps of warm-up (the
ESPnet Large configuration that WavLabLM's was derived from); 0.8 h a step (32 GPUs x 90 s); 400k updates, which is
320k hours or 8 epochs of 40k h (22 epochs would be 1.1M updates of this size); mixing probability 0.2 as in WavLM.
Expect: no published score was found for MK; of MS, see `wavlab_ms`.
"""

import dataclasses

from experiments.stage import StageConfig
from experiments.stages import hubert_base_it2
from experiments.stages.presets import LARGE, PAPER_PROBES, WAVLABLM, WAVLM_MIXING, paper_data
from experiments.units import UnitsConfig
from wavlab_jax.heads import HeadConfig
from wavlab_jax.objectives import PredictionConfig
from wavlab_jax.optim import OptimizerConfig
from wavlab_jax.step import LearnerConfig
from wavlab_jax.train import LoopConfig


def get_config() -> StageConfig:
    """The paper's size."""
    return StageConfig(
        name="wavlab_mk",
        learner=LearnerConfig(
            encoder=LARGE,
            head=HeadConfig(units=500, dim=768),
            objective=PredictionConfig(),
            optimizer=OptimizerConfig(
                peak_learning_rate=5e-4, warmup_steps=32_000, schedule="inverse_sqrt", clip_norm=5.0
            ),
        ),
        data=paper_data(draw=WAVLABLM, mixing=WAVLM_MIXING),
        units=UnitsConfig(
            name="hubert_base_it2_layer9",
            units=500,
            teacher="hubert_base_it2",
            layer=9,
            fit_corpora=WAVLABLM.corpora,
            fit_hours=4_000.0,
        ),
        loop=LoopConfig(steps=400_000),
        probes=PAPER_PROBES,
    )


def demo() -> StageConfig:
    """Two minutes on two cores: units of layer 2 of 3; continues iteration 2's encoder, as WavLabLM-EK does HuBERT's.

    (From scratch, as MK is, the minutes would go into learning the extractor again.)
    """
    second = hubert_base_it2.demo()
    return dataclasses.replace(
        second,
        name="wavlab_mk",
        data=dataclasses.replace(second.data, mixing=WAVLM_MIXING, seed=2),
        units=UnitsConfig(name="hubert_base_it2_layer2", units=100, teacher="hubert_base_it2", layer=2, fit_hours=0.5),
        init_from=second.name,
    )
