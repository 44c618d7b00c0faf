"""HuBERT Base, first iteration: predict k-means units of MFCC.

Command: `python -m experiments train hubert_base_it1 --workdir W --corpus PREPARED`
Paper: HuBERT (2106.07447), section IV-A; 250k updates on 32 GPUs, 9.5 h per 100k updates, so about 760 GPU-hours. 100
clusters of 39-d MFCC. LibriSpeech 960 h; for other data (mHuBERT-147 and CV-HuBERT begin so too) name its corpora:
`--data.draw.corpora commonvoice --units.fit-corpora commonvoice`, or nothing after them for all that is prepared.
Expect: a LibriSpeech run's published word error rates are those of iteration 2; this stage only makes the next units.
Deviates: 2,880 s of audio a step instead of 2,800, in static lengths of up to 15 s; bfloat16 instead of float16.
"""

from experiments.stage import StageConfig
from experiments.stages.presets import (
    BASE,
    DEMO,
    DEMO_OBJECTIVE,
    DEMO_OPTIMIZER,
    DEMO_STEPS,
    LIBRISPEECH,
    PAPER_PROBES,
    demo_data,
    paper_data,
)
from experiments.units import UnitsConfig
from wavlab_jax.heads import HeadConfig
from wavlab_jax.objectives import PredictionConfig
from wavlab_jax.optim import OptimizerConfig
from wavlab_jax.step import LearnerConfig
from wavlab_jax.train import LoopConfig


def get_config() -> StageConfig:
    """The paper's size."""
    return StageConfig(
        name="hubert_base_it1",
        learner=LearnerConfig(
            encoder=BASE,
            head=HeadConfig(units=100, dim=256),
            objective=PredictionConfig(),
            optimizer=OptimizerConfig(peak_learning_rate=5e-4, warmup_steps=32_000, total_steps=250_000),
        ),
        data=paper_data(draw=LIBRISPEECH),
        units=UnitsConfig(name="mfcc", units=100, teacher=None, fit_corpora=LIBRISPEECH.corpora, fit_hours=96.0),
        loop=LoopConfig(steps=250_000),
        probes=PAPER_PROBES,
    )


def demo() -> StageConfig:
    """Two minutes on two cores, on the demo corpus."""
    return StageConfig(
        name="hubert_base_it1",
        learner=LearnerConfig(
            encoder=DEMO, head=HeadConfig(units=100, dim=128), objective=DEMO_OBJECTIVE, optimizer=DEMO_OPTIMIZER
        ),
        data=demo_data(),
        units=UnitsConfig(name="mfcc", units=100, teacher=None, fit_hours=0.5),
        loop=LoopConfig(steps=DEMO_STEPS, log_every=50, save_every=250),
    )
