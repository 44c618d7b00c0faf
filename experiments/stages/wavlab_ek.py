"""WavLabLM-EK: HuBERT Large continued on 40k multilingual hours, with units fitted on English.

Command: `python -m experiments import hubert_large_ll60k.pt --out hubert_large_ll60k`, then
`python -m experiments train wavlab_ek --workdir W --corpus PREPARED` (after hubert_base_it2 in W; `--init-from PATH`
if the model lies elsewhere)
Paper: WavLabLM (2309.15317): initialised from `hubert_large_ll60k`, k-means of LibriSpeech, Openli110; the released
checkpoint is of its epoch 5. The card says "especially strong for European languages".
Open, and chosen here: 500 clusters of layer 9, as MK; 250k updates, which are 5 epochs of 40k hours at 0.8 h a step, on
the natural skew; a fifth of stage 1's peak rate, because the encoder is trained already; WavLM's mixing (the
released run's configuration is named without "wavlm", so it may have heard clean speech only: `--data.mixing None`).
Expect: no published score was found for EK.
"""

import dataclasses

from experiments.stage import StageConfig
from experiments.stages import wavlab_mk
from experiments.stages.presets import LIBRISPEECH

STEPS = 250_000  # 5 epochs of 40k hours, 0.8 h a step


def get_config() -> StageConfig:
    """The paper's size."""
    stage1 = wavlab_mk.get_config()
    librispeech = dataclasses.replace(stage1, units=dataclasses.replace(stage1.units, fit_corpora=LIBRISPEECH.corpora))
    return _english(librispeech, init_from="hubert_large_ll60k", layer=9, steps=STEPS, peak=1e-4)


def demo() -> StageConfig:
    """Two minutes on two cores: continues iteration 2's encoder in place of HuBERT Large."""
    return _english(wavlab_mk.demo(), init_from="hubert_base_it2", layer=2, steps=1_500, peak=5e-4)


def _english(stage1: StageConfig, *, init_from: str, layer: int, steps: int, peak: float) -> StageConfig:
    optimizer = dataclasses.replace(stage1.learner.optimizer, peak_learning_rate=peak, total_steps=steps)
    english = dataclasses.replace(
        stage1.units,
        name=f"hubert_base_it2_layer{layer}_english",
        teacher="hubert_base_it2",
        layer=layer,
        fit_hours=min(stage1.units.fit_hours, 96.0),
        fit_languages=("eng",),
    )
    return dataclasses.replace(
        stage1,
        name="wavlab_ek",
        learner=dataclasses.replace(stage1.learner, optimizer=optimizer),
        units=english,
        loop=dataclasses.replace(stage1.loop, steps=steps),
        init_from=init_from,
    )
