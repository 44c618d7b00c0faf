"""WavLabLM-MS, stage 2: stage 1 continued on a balanced draw, the same units and the same denoising.

Command: `python -m experiments train wavlab_ms --workdir W --corpus PREPARED` (after wavlab_mk in W)
Paper: WavLabLM (2309.15317): a second stage on a balanced subset; the released checkpoint is of its epoch 5.
Data: stage 1's corpora and BABEL, of which the released run took a part ("babel_light"; which, is not known: all here).
Open, and chosen here: "balanced" is a draw with language exponent 0.3 and corpus exponent 0.5 (0 would be equal shares
and hear the smallest languages hundreds of times; XLS-R uses 0.5); 40k updates, a tenth of stage 1; a tenth of its peak
learning rate, warmed up again over 1k steps.
Expect: ML-SUPERB 10 min / 1 h of the released model: LID 71.7 / 81.1, multilingual CER 37.8 / 31.9 (normal). Look at it
beside `wavlab_mk_continued`, which hears as much more audio with the natural skew: without that control a gain of this
stage could be a gain of training longer.
"""

import dataclasses

from data_pipelines.balance import DrawConfig
from experiments.stage import StageConfig
from experiments.stages import wavlab_mk
from experiments.stages.presets import WAVLABLM

BALANCED = DrawConfig(language_exponent=0.3, corpus_exponent=0.5)


def get_config() -> StageConfig:
    """The paper's size."""
    with_babel = dataclasses.replace(BALANCED, corpora=(*WAVLABLM.corpora, "babel"))
    return _continued(wavlab_mk.get_config(), draw=with_babel, steps=40_000, warmup=1_000, peak=5e-5)


def demo() -> StageConfig:
    """A minute on two cores."""
    return _continued(wavlab_mk.demo(), draw=BALANCED, steps=450, warmup=50, peak=5e-4)


def _continued(stage1: StageConfig, *, draw: DrawConfig, steps: int, warmup: int, peak: float) -> StageConfig:
    optimizer = dataclasses.replace(
        stage1.learner.optimizer,
        peak_learning_rate=peak,
        warmup_steps=warmup,
        schedule="linear",
        total_steps=steps,
    )
    return dataclasses.replace(
        stage1,
        name="wavlab_ms",
        learner=dataclasses.replace(stage1.learner, optimizer=optimizer),
        # another seed: with stage 1's, the first steps would draw its first crops again
        data=dataclasses.replace(stage1.data, draw=draw, seed=stage1.data.seed + 1),
        loop=dataclasses.replace(stage1.loop, steps=steps),
        init_from=stage1.name,
    )
