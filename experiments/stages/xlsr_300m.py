"""XLS-R 0.3B: wav2vec 2.0's contrastive objective on 436k hours of 128 languages.

Command: `python -m experiments train xlsr_300m --workdir W --corpus PREPARED` (needs no units)
Paper: XLS-R (2111.09296) in the shape and with the values of fairseq's wav2vec2_large_librivox.yaml: Gumbel temperature
from 2 to 0.1, no feature penalty, no dropout, 2 x 320 codes, masks of 0.65; balance over corpora first, then over the
languages of each, both with exponent 0.5. Recalled and not checked: 1M updates, warm-up 32k.
Open, and chosen here: 2.7 h a step (fairseq's 128 GPUs x 75 s); peak learning rate 3e-4, that of wav2vec 2.0 Large's
paper (the yaml says 0.005, which its paper contradicts; XLSR's author says "lower" than English); clipping at 10 as
HuBERT Base, where fairseq's yaml has none, because a run that is lost to one batch is lost.
Watch `code_perplexity` in metrics.jsonl: of 640 it should pass 100 in the first tens of thousands of updates; at 2 the
codebook has collapsed, and a lower rate or a larger step is needed (fairseq issues 4530, transformers issue 14387).
Expect: SUPERB points 730.8 / 850.5 (10 min / 1 h, the 2024 table); LID 66.9 / 87.9.
"""

import dataclasses

from data_pipelines.balance import XLS_R, DrawConfig
from experiments.stage import StageConfig
from experiments.stages import hubert_base_it1
from experiments.stages.presets import PAPER_PROBES, paper_data
from wavlab_jax.encoder.architectures import architecture
from wavlab_jax.heads import ContrastiveHeadConfig
from wavlab_jax.masking import MaskConfig
from wavlab_jax.objectives import ContrastiveConfig
from wavlab_jax.optim import OptimizerConfig
from wavlab_jax.step import LearnerConfig
from wavlab_jax.train import LoopConfig

STEPS = 1_000_000


def get_config() -> StageConfig:
    """The paper's size."""
    return StageConfig(
        name="xlsr_300m",
        learner=LearnerConfig(
            encoder=dataclasses.replace(architecture("xls_r_300m"), compute_dtype="bfloat16", rematerialize="layers"),
            head=ContrastiveHeadConfig(dim=768, codevector_dim=768),
            objective=ContrastiveConfig(feature_penalty_weight=0.0, feature_dropout=0.0, gumbel_floor=0.1),
            optimizer=OptimizerConfig(peak_learning_rate=3e-4, total_steps=STEPS),
        ),
        data=dataclasses.replace(paper_data(draw=XLS_R), seconds_per_step=9_600.0),
        units=None,
        loop=LoopConfig(steps=STEPS),
        probes=PAPER_PROBES,
        seconds_per_device=75.0,
    )


def demo() -> StageConfig:
    """Two minutes on two cores, from scratch, with 2 x 40 codes; the temperature falls as far as the paper's does."""
    first = hubert_base_it1.demo()
    floor, steps = 0.5, first.loop.steps
    return dataclasses.replace(
        first,
        name="xlsr_300m",
        learner=dataclasses.replace(
            first.learner,
            head=ContrastiveHeadConfig(dim=64, codevector_dim=64, codes=40),
            objective=ContrastiveConfig(
                mask=MaskConfig(probability=0.65),
                negatives=50,
                feature_dropout=0.0,
                gumbel_floor=floor,
                gumbel_decay=(floor / 2.0) ** (1 / steps),
            ),
        ),
        data=dataclasses.replace(first.data, draw=DrawConfig(0.5, 0.5, first="corpus"), seed=5),
        units=None,
    )
