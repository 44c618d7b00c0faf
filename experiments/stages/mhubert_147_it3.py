"""mHuBERT-147, third iteration: HuBERT Base on 90k hours of 147 languages, 1,000 units, two-level balance.

Command: `python -m experiments import MHUBERT_2ND_ITERATION --out mhubert_147_it2`, then
`python -m experiments train mhubert_147_it3 --workdir W --corpus PREPARED` (or `--units.teacher STAGE` of your own)
Paper: mHuBERT-147 (2406.06371), utter-project's mhubert147_base.yaml: 2M updates on 32 GPUs of 2.8M samples (1.56 h a
step), peak learning rate 5e-4, warm-up 32k, clipping at 10, waveforms normalised in spite of the group norm; 1,000
clusters of layer 9 of the second iteration. Draw: p(language) ~ n ** 0.7, p(corpus | language) ~ n ** 0.9.
n is utterances, as their code counts. Deviates: exact k-means instead of faiss' quantised index; 1.6 h a step
(384 rows of 15 s); bfloat16 where fp16 gave NaN (they finished in float32 at 5e-5: `--learner.encoder.compute-dtype
float32`).
Expect: SUPERB points 949.8 / 950.2 (10 min / 1 h, the 2024 table); LID 85.3 / 91.0.
"""

import dataclasses

from data_pipelines.balance import MHUBERT_147
from experiments.stage import StageConfig
from experiments.stages import hubert_base_it2
from experiments.units import UnitsConfig
from wavlab_jax.encoder.architectures import architecture
from wavlab_jax.heads import HeadConfig

STEPS = 2_000_000


def get_config() -> StageConfig:
    """The paper's size."""
    second = hubert_base_it2.get_config()
    return dataclasses.replace(
        second,
        name="mhubert_147_it3",
        learner=dataclasses.replace(
            second.learner,
            encoder=dataclasses.replace(architecture("mhubert_147"), compute_dtype="bfloat16"),
            head=HeadConfig(units=1000, dim=256),
            optimizer=dataclasses.replace(second.learner.optimizer, total_steps=STEPS),
        ),
        data=dataclasses.replace(second.data, draw=MHUBERT_147, seconds_per_step=5_760.0),
        units=UnitsConfig(
            name="mhubert_147_it2_layer9",
            units=1000,
            teacher="mhubert_147_it2",
            layer=9,
            fit_hours=9_000.0,
            language_exponent=0.7,
        ),
        loop=dataclasses.replace(second.loop, steps=STEPS),
    )


def demo() -> StageConfig:
    """Two minutes on two cores: the demo's second iteration on the two-level draw."""
    second = hubert_base_it2.demo()
    data = dataclasses.replace(second.data, draw=MHUBERT_147, seed=4)
    return dataclasses.replace(second, name="mhubert_147_it3", data=data)
