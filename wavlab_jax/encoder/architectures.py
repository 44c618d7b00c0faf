"""The published encoders by name: the one table of their shapes, and of the heads that they were pre-trained with.

Where a constant comes from is said beside it: fairseq's yamls (`examples/hubert/config/pretrain`,
`examples/wav2vec/config/pretraining`), the config.json of the released Hugging Face models, torchaudio's
`pipelines/_wav2vec2/impl.py`, or a paper's section. Some names share a shape and differ in what they were trained on.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from wavlab_jax.encoder.config import EncoderConfig, EncoderError

ModelType = Literal["hubert", "wavlm", "wav2vec2"]

_BASE = EncoderConfig()  # hubert_base_librispeech.yaml, whose defaults these are
_UNREGULARISED = dict(
    dropout=0.0, attention_dropout=0.0, projection_dropout=0.0, layerdrop=0.0, feature_gradient_scale=1.0
)
# hubert_large_librivox.yaml; `normalize: true` is said in its task section
_LARGE = replace(
    _BASE,
    extractor_norm="layer",
    normalize_waveform=True,
    width=1024,
    layers=24,
    heads=16,
    feed_forward=4096,
    pre_norm=True,
    **_UNREGULARISED,
)
_XLARGE = replace(_LARGE, width=1280, layers=48, feed_forward=5120)  # hubert_xlarge_librivox.yaml
_WAVLM = dict(relative_bias=True, bias_buckets=320, bias_max_distance=800)  # config.json of microsoft/wavlm-*
_LV60K = replace(_LARGE, extractor_bias=True)  # wav2vec2_large_librivox.yaml
# ESPnet `asr/encoder/hubert_encoder.py`: torchaudio's hubert_pretrain_model, without convolution bias by default; the
# waveform reaches it as it is, there and in s3prl `upstream/espnet_hubert/expert.py`
_WAVLABLM = replace(_LARGE, normalize_waveform=False)


@dataclass(frozen=True)
class UnitHead:
    """HuBERT's head: cosine similarity of a projection with one embedding a unit.

    Attributes:
        dim: of the space where both meet (`final_dim`).
        units: number of clusters.
        specials: embeddings of symbols that stand before the units in fairseq's dictionary (`<s>`, `<pad>`, `</s>`,
            `<unk>`) and are never the right answer; torchaudio and ESPnet have none.
    """

    dim: int
    units: int = 500
    specials: int = 4

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Tensors on an encoder of this width, under the names of `convert.checkpoint.HEADS`; PyTorch's shapes."""
        shapes = {
            "final_proj.weight": (self.dim, width),
            "final_proj.bias": (self.dim,),
            "label_embeddings": (self.units, self.dim),
        }
        return shapes | ({"label_specials": (self.specials, self.dim)} if self.specials else {})


@dataclass(frozen=True)
class QuantizerHead:
    """wav2vec 2.0's: a product quantizer of the extractor's output, and projections of it and of the context.

    Attributes:
        dim: of the quantized vector and of the space where both meet (`final_dim`; `codevector_dim` and
            `proj_codevector_dim` in transformers).
        groups, codes: of the quantizer (fairseq `latent_groups`, `latent_vars`).
        channels: of the extractor's output.
    """

    dim: int
    groups: int = 2
    codes: int = 320
    channels: int = 512

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """As `UnitHead.shapes`."""
        entries = self.groups * self.codes
        return {
            "quantizer.codevectors": (1, entries, self.dim // self.groups),
            "quantizer.weight_proj.weight": (entries, self.channels),
            "quantizer.weight_proj.bias": (entries,),
            "project_q.weight": (self.dim, self.dim),
            "project_q.bias": (self.dim,),
            "project_hid.weight": (self.dim, width),
            "project_hid.bias": (self.dim,),
        }


@dataclass(frozen=True)
class Architecture:
    """A published encoder.

    Attributes:
        model_type: of the class that it is in transformers.
        encoder: its configuration, in float32.
        head: what it was pre-trained with.
        about: which model it is.
    """

    model_type: ModelType
    encoder: EncoderConfig
    head: UnitHead | QuantizerHead
    about: str

    def head_parameters(self) -> int:
        """Number of scalars in the head."""
        return sum(math.prod(shape) for shape in self.head.shapes(self.encoder.width).values())


TABLE: Mapping[str, Architecture] = {
    "hubert_base": Architecture("hubert", _BASE, UnitHead(256), "HuBERT Base (2106.07447)"),
    "hubert_large": Architecture("hubert", _LARGE, UnitHead(768), "HuBERT Large (2106.07447)"),
    "hubert_xlarge": Architecture("hubert", _XLARGE, UnitHead(1024), "HuBERT X-Large (2106.07447)"),
    # WavLM's heads are not in the released files; 500 clusters by the paper, dimensions as HuBERT's
    "wavlm_base": Architecture("wavlm", replace(_BASE, **_WAVLM), UnitHead(256), "WavLM Base (2110.13900)"),
    "wavlm_base_plus": Architecture("wavlm", replace(_BASE, **_WAVLM), UnitHead(256), "WavLM Base+ (2110.13900)"),
    "wavlm_large": Architecture(
        "wavlm",
        # regularised as config.json of microsoft/wavlm-large says
        replace(_LARGE, **_WAVLM, dropout=0.1, attention_dropout=0.1, projection_dropout=0.1, layerdrop=0.1),
        UnitHead(768),
        "WavLM Large (2110.13900)",
    ),
    # wav2vec2_base_librispeech.yaml
    "wav2vec2_base": Architecture("wav2vec2", _BASE, QuantizerHead(256), "wav2vec 2.0 Base (2006.11477)"),
    "wav2vec2_large": Architecture(
        "wav2vec2",
        # post-norm and group norm, as torchaudio's WAV2VEC2_LARGE; layerdrop by the paper, section 4.2
        replace(_BASE, width=1024, layers=24, heads=16, feed_forward=4096, layerdrop=0.2),
        QuantizerHead(768),
        "wav2vec 2.0 Large on LibriSpeech (2006.11477)",
    ),
    "wav2vec2_large_lv60k": Architecture(
        "wav2vec2", _LV60K, QuantizerHead(768), "wav2vec 2.0 Large on Libri-Light (2006.11477)"
    ),
    "xlsr_53": Architecture("wav2vec2", _LV60K, QuantizerHead(768), "XLSR-53 (2006.13979)"),
    # torchaudio's WAV2VEC2_XLSR_*; `codevector_dim` of their config.json
    "xls_r_300m": Architecture("wav2vec2", _LV60K, QuantizerHead(768), "XLS-R 0.3B (2111.09296)"),
    "xls_r_1b": Architecture(
        "wav2vec2", replace(_XLARGE, extractor_bias=True), QuantizerHead(1024), "XLS-R 1B (2111.09296)"
    ),
    "xls_r_2b": Architecture(
        "wav2vec2",
        replace(_XLARGE, extractor_bias=True, width=1920, feed_forward=7680),
        QuantizerHead(1024),
        "XLS-R 2B (2111.09296)",
    ),
    "mms_300m": Architecture("wav2vec2", _LV60K, QuantizerHead(768), "MMS 300M (2305.13516), XLS-R's shape"),
    "mms_1b": Architecture(
        "wav2vec2", replace(_XLARGE, extractor_bias=True), QuantizerHead(1024), "MMS 1B (2305.13516), XLS-R's shape"
    ),
    # utter-project's mhubert147_base.yaml: HuBERT Base that hears normalised waveforms in spite of its group norm
    "mhubert_147": Architecture(
        "hubert", replace(_BASE, normalize_waveform=True), UnitHead(256, units=1000), "mHuBERT-147 (2406.06371)"
    ),
    # ESPnet `egs2/librispeech/ssl1/conf/tuning/train_ssl_torchaudiohubert_{base,large}_960h_pretrain_it2.yaml`, from
    # which the configurations of these four were derived; torchaudio's head has no specials
    "cv_hubert_base": Architecture(
        "hubert", _BASE, UnitHead(256, specials=0), "HuBERT Base on Common Voice, of WavLabLM (2309.15317)"
    ),
    "wavlablm_ek": Architecture("hubert", _WAVLABLM, UnitHead(768, specials=0), "WavLabLM-EK (2309.15317)"),
    "wavlablm_mk": Architecture("hubert", _WAVLABLM, UnitHead(768, specials=0), "WavLabLM-MK (2309.15317)"),
    "wavlablm_ms": Architecture("hubert", _WAVLABLM, UnitHead(768, specials=0), "WavLabLM-MS (2309.15317)"),
}

ARCHITECTURES: Mapping[str, EncoderConfig] = {name: row.encoder for name, row in TABLE.items()}


def architecture(name: str) -> EncoderConfig:
    """The encoder of this name. Raises EncoderError with the nearest names if there is none."""
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), ARCHITECTURES, n=3, cutoff=0.4)
        raise EncoderError(f"no architecture is called {name!r}; the nearest: {', '.join(near or ARCHITECTURES)}")
    return ARCHITECTURES[name]


# What changes how an encoder is trained or run, and not which one it is. The two conventions of preprocessing are those
# of the tool at hand: the same published model is heard with either.
_NOT_THE_MODEL = dict(
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    projection_dropout=0.0,
    layerdrop=0.0,
    feature_gradient_scale=1.0,
    compute_dtype="float32",
    rematerialize="nothing",
    waveform_epsilon=1e-5,
    valid_frames="convolution",
)


def _function(cfg: EncoderConfig) -> EncoderConfig:
    """The configuration with only what determines the function that the encoder computes."""
    unused = {} if cfg.relative_bias else {"bias_buckets": 320, "bias_max_distance": 800}
    return replace(cfg, **_NOT_THE_MODEL, **unused)


def name_of(cfg: EncoderConfig, *, model_type: ModelType | None = None) -> str | None:
    """The first architecture that computes the same function, or None; of this `model_type` if one is given.

    Regularisation, precision, the waveform's epsilon and the rule for padded frames do not count.
    """
    function = _function(cfg)
    for name, row in TABLE.items():
        if model_type in (None, row.model_type) and _function(row.encoder) == function:
            return name
    return None
