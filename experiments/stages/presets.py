"""Pieces that several stages share."""

from dataclasses import replace

from data_pipelines.balance import DrawConfig
from data_pipelines.mixing import MixingConfig
from data_pipelines.pipeline import DataConfig
from experiments.probe_clips import ProbesConfig
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.encoder.architectures import architecture
from wavlab_jax.objectives import PredictionConfig
from wavlab_jax.optim import OptimizerConfig

# 1.875, 3.75, 7.5 and 15 s. Halving keeps a step's seconds exactly constant. fairseq trains on 2 to 15.6 s.
PAPER_LENGTHS = (30_000, 60_000, 120_000, 240_000)
PAPER_SECONDS_PER_STEP = (
    2_880.0  # HuBERT Base: 32 GPUs x 87.5 s = 2,800; rounded so that rows divide over 4 .. 64 devices
)

NATURAL = DrawConfig(language_exponent=1.0, corpus_exponent=1.0)
LIBRISPEECH = DrawConfig(corpora=("librispeech",))
# Openli110, WavLabLM's stage 1 (ESPnet egs2/open_li110/asr1/local/data.sh), and FLEURS, which the released model's card
# names. BABEL is heard in stage 2 only: the released checkpoint's folder is called `exp_babel`.
OPENLI110 = ("commonvoice", "voxforge", "mls", "googlei18n", "voxpopuli")
WAVLABLM = DrawConfig(corpora=(*OPENLI110, "fleurs"))
# WavLM's 94k hours (2110.13900; microsoft/UniSpeech WavLM/README.md)
MIX94K = DrawConfig(corpora=("librilight", "gigaspeech", "voxpopuli"))
# Some tens of probes in a run; docs/health.md says what they cost.
PAPER_PROBES = ProbesConfig(every=10_000)
WAVLM_MIXING = MixingConfig()  # probability 0.2, noise share 0.1, as the WavLM paper has it


def paper_data(*, draw: DrawConfig = NATURAL, mixing: MixingConfig | None = None) -> DataConfig:
    """0.8 h of audio a step in rows of up to 15 s."""
    return DataConfig(
        lengths=PAPER_LENGTHS,
        seconds_per_step=PAPER_SECONDS_PER_STEP,
        draw=draw,
        mixing=mixing,
        workers=8,
        threads=2,
        prefetch=8,
    )


def demo_data(*, draw: DrawConfig = NATURAL, mixing: MixingConfig | None = None) -> DataConfig:
    """8 s of audio a step in rows of 2 or 4 s: small batches, because minutes must hold thousands of steps."""
    return DataConfig(lengths=(32_000, 64_000), seconds_per_step=8.0, draw=draw, mixing=mixing, threads=1, prefetch=8)


# WavLabLM has HuBERT Large's shape, without WavLM's relative position bias; here it hears normalised waveforms.
LARGE = replace(architecture("hubert_large"), compute_dtype="bfloat16", rematerialize="layers")
BASE = replace(architecture("hubert_base"), compute_dtype="bfloat16")

# One shape for all demo stages, so that each can continue the one before. The extractor is narrow where time is long,
# and normalised as in Base: LayerNorm at every sample makes it learn several times more slowly.
DEMO = EncoderConfig(
    extractor_channels=(32, 32, 48, 64, 96, 128, 128),
    extractor_norm="group",
    normalize_waveform=True,
    waveform_epsilon=1e-7,  # as Hugging Face's preprocessor, for which it is exported
    width=128,
    layers=3,
    heads=4,
    feed_forward=512,
    pre_norm=True,
    position_kernel=32,
    relative_bias=True,  # WavLM's: attention learns where the nearest visible frames are, which takes long without it
    dropout=0.0,
    attention_dropout=0.0,
    projection_dropout=0.0,
    layerdrop=0.0,
    feature_gradient_scale=1.0,
)
# Visible frames count as well: they teach the extractor what a unit sounds like, which hidden frames alone do slowly.
DEMO_OBJECTIVE = PredictionConfig(unmasked_weight=1.0)
# The same for both iterations and stage 1, which so share their compiled programs: compiling is a good part of minutes.
DEMO_STEPS = 1500
DEMO_OPTIMIZER = OptimizerConfig(peak_learning_rate=1.5e-3, warmup_steps=150, total_steps=DEMO_STEPS)
