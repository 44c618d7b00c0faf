"""WavLM Base+: gated relative position bias and denoising on 94k hours of English.

Command: `python -m experiments train wavlm_base_plus --workdir W --corpus PREPARED` (after hubert_base_it2 in W)
Paper: WavLM (2110.13900): Libri-Light 60k h, GigaSpeech 10k h, VoxPopuli 24k h; 500 clusters of layer 9 of HuBERT
Base's second iteration; mixing as in its algorithm 1; recalled and not checked: 1M updates on 32 GPUs, peak learning
rate 5e-4. Published code (microsoft/UniSpeech) has no launch recipe.
Open, and chosen here: HuBERT Base's 0.8 h a step, warm-up of 32k, clipping at 10; clusters fitted on a thousand hours.
Expect: of the released model, SUPERB (English) in its paper's table 1; no multilingual score.
"""

import dataclasses

from experiments.stage import StageConfig
from experiments.stages import hubert_base_it2
from experiments.stages.presets import BASE, MIX94K, WAVLM_MIXING, paper_data
from experiments.units import UnitsConfig
from wavlab_jax.encoder.architectures import architecture

LAYER9 = UnitsConfig(
    name="hubert_base_it2_layer9_english",
    units=500,
    teacher="hubert_base_it2",
    layer=9,
    fit_hours=1_000.0,
    fit_languages=("eng",),
    fit_corpora=MIX94K.corpora,
)


def get_config() -> StageConfig:
    """The paper's size."""
    second = hubert_base_it2.get_config()
    encoder = dataclasses.replace(
        architecture("wavlm_base_plus"), compute_dtype=BASE.compute_dtype, rematerialize=BASE.rematerialize
    )
    return dataclasses.replace(
        second,
        name="wavlm_base_plus",
        learner=dataclasses.replace(
            second.learner,
            encoder=encoder,
            optimizer=dataclasses.replace(second.learner.optimizer, total_steps=1_000_000),
        ),
        data=paper_data(draw=MIX94K, mixing=WAVLM_MIXING),
        units=LAYER9,
        loop=dataclasses.replace(second.loop, steps=1_000_000),
    )


def demo() -> StageConfig:
    """Two minutes on two cores: the demo's second iteration, with mixing (the demo's encoder has the bias anyway)."""
    second = hubert_base_it2.demo()
    return dataclasses.replace(
        second, name="wavlm_base_plus", data=dataclasses.replace(second.data, mixing=WAVLM_MIXING, seed=3)
    )
