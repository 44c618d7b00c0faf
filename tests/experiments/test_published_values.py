"""Constants of the stages in the papers' size, against a second list: what was published, with its source.

The golden texts say what a stage is; this says what it has to be. What papers leave open is in no row.
"""

import inspect

import pytest
from sklearn.cluster import KMeans

from experiments.stage import flatten
from experiments.stages import stage_function
from wavlab_jax.objectives import ContrastiveConfig
from wavlab_jax.targets import kmeans

# fairseq examples/hubert/config/pretrain/*.yaml: common to Base and Large
HUBERT = {
    "learner.objective.temperature": "0.1",  # logit_temp
    "learner.objective.masked_weight": "1.0",  # pred_masked_weight
    "learner.objective.unmasked_weight": "0.0",  # pred_nomask_weight
    "learner.objective.feature_penalty_weight": "10.0",  # loss_weights
    "learner.objective.mask.probability": "0.8",
    "learner.objective.mask.length": "10",
    "learner.objective.mask.minimum_spans": "2",  # hubert.py apply_mask
    "learner.objective.mask.overlap": "True",
    "learner.objective.mask.channel_probability": "0.0",
    "learner.head.scoring": "'cosine'",
}
ADAM = {
    "learner.optimizer.beta1": "0.9",
    "learner.optimizer.beta2": "0.98",
    "learner.optimizer.epsilon": "1e-06",
    "learner.optimizer.weight_decay": "0.01",
    "learner.optimizer.warmup_steps": "32000",
}
BASE = {
    "learner.encoder.dropout": "0.1",
    "learner.encoder.attention_dropout": "0.1",
    "learner.encoder.projection_dropout": "0.1",  # dropout_input
    "learner.encoder.layerdrop": "0.05",
    "learner.encoder.feature_gradient_scale": "0.1",  # feature_grad_mult
    "learner.head.dim": "256",
}
LARGE = {"learner.encoder.feature_gradient_scale": "1.0", "learner.head.dim": "768"}
FAIRSEQ = {"learner.optimizer.clip_norm": "10.0", "learner.optimizer.schedule": "'linear'"}
# egs2/librispeech/ssl1/conf/tuning: grad_clip, warmuplr, lr
ESPNET = {"learner.optimizer.clip_norm": "5.0", "learner.optimizer.schedule": "'inverse_sqrt'"}
# 2110.13900 algorithm 1
WAVLM_MIXING = {
    "data.mixing.rule": "'wavlm'",
    "data.mixing.probability": "0.2",
    "data.mixing.noise_share": "0.1",
    "data.mixing.speech_snr_db": "(-5.0, 5.0)",
    "data.mixing.noise_snr_db": "(-5.0, 20.0)",
    "data.mixing.min_fraction": "0.0",
    "data.mixing.max_fraction": "0.5",
}


def rate(value):
    return {"learner.optimizer.peak_learning_rate": repr(value)}


def units(number, layer):
    return {"units.units": str(number), "learner.head.units": str(number), "units.layer": str(layer)}


PUBLISHED = {
    "hubert_base_it1": HUBERT | ADAM | BASE | FAIRSEQ | rate(5e-4) | units(100, 0) | {"loop.steps": "250000"},
    "hubert_base_it2": HUBERT | ADAM | BASE | FAIRSEQ | rate(5e-4) | units(500, 6) | {"loop.steps": "400000"},
    "cv_hubert_base": HUBERT | ADAM | BASE | ESPNET | rate(5e-4) | {"data.draw.corpora": "('commonvoice',)"},
    "wavlab_mk": HUBERT | ADAM | LARGE | ESPNET | rate(5e-4) | units(500, 9) | WAVLM_MIXING,
    "wavlm_base_plus": HUBERT | BASE | units(500, 9) | WAVLM_MIXING | {"learner.encoder.relative_bias": "True"},
    # microsoft/wavlm-large config.json
    "wavlm_large": HUBERT
    | LARGE
    | units(500, 9)
    | WAVLM_MIXING
    | {
        "learner.encoder.bias_buckets": "320",
        "learner.encoder.bias_max_distance": "800",
        "learner.encoder.layerdrop": "0.1",
        "learner.optimizer.clip_norm": "1.0",  # hubert_large_librivox.yaml
    },
    # wav2vec2_large_librivox.yaml; 2111.09296 for the draw
    "xlsr_300m": ADAM
    | LARGE
    | {
        "learner.objective.temperature": "0.1",
        "learner.objective.negatives": "100",
        "learner.objective.diversity_weight": "0.1",
        "learner.objective.feature_penalty_weight": "0.0",
        "learner.objective.gumbel_start": "2.0",
        "learner.objective.gumbel_floor": "0.1",
        "learner.objective.gumbel_decay": "0.999995",
        "learner.objective.mask.probability": "0.65",
        "learner.head.groups": "2",
        "learner.head.codes": "320",
        "learner.head.codevector_dim": "768",
        "data.draw.first": "'corpus'",
        "data.draw.language_exponent": "0.5",
        "data.draw.corpus_exponent": "0.5",
    },
    # utter-project/fairseq mhubert147_base.yaml, hubert_dataset.py
    "mhubert_147_it3": HUBERT
    | ADAM
    | BASE
    | FAIRSEQ
    | rate(5e-4)
    | units(1000, 9)
    | {
        "data.draw.language_exponent": "0.7",
        "data.draw.corpus_exponent": "0.9",
        "data.draw.counted": "'utterances'",
        "learner.encoder.normalize_waveform": "True",
        "loop.steps": "2000000",
    },
    # 2202.01855 section 3.1; the updates are SpeechBrain's
    "best_rq_base": {
        "units.units": "8192",
        "units.dim": "16",
        "units.mels": "80",
        "learner.head.units": "8192",
        "learner.head.scoring": "'linear'",
        "learner.optimizer.peak_learning_rate": "0.0008",
        "learner.optimizer.warmup_steps": "25000",
        "loop.steps": "300000",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_stage_has_the_published_values(name):
    ours = flatten(stage_function(name)())
    assert {path: ours.get(path) for path in PUBLISHED[name]} == PUBLISHED[name]


def test_the_contrastive_defaults_are_those_of_wav2vec_2_base():
    """fairseq wav2vec2_base_librispeech.yaml."""
    cfg = ContrastiveConfig()
    assert (cfg.mask.probability, cfg.temperature, cfg.negatives, cfg.diversity_weight) == (0.65, 0.1, 100, 0.1)
    assert (cfg.gumbel_start, cfg.gumbel_floor, cfg.gumbel_decay) == (2.0, 0.5, 0.999995)
    assert (cfg.feature_penalty_weight, cfg.feature_dropout) == (10.0, 0.1)


def test_the_fit_stops_where_scikit_learns_does():
    theirs, ours = (inspect.signature(f).parameters for f in (KMeans, kmeans.fit))
    assert ours["tolerance"].default == theirs["tol"].default
