"""What an encoder is made of, and how its operations are spelled on each platform."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax

from data_pipelines.batch import HOP, RECEPTIVE_FIELD


class EncoderError(ValueError):
    """An encoder configuration or input that cannot work; the message names the field and what to do."""


Rematerialize = Literal["nothing", "dots", "layers"]
PositionSpelling = Literal["grouped", "by_group", "dft"]

_SIZES = (
    *("extractor_channels", "extractor_kernels", "extractor_strides", "width", "layers", "heads", "feed_forward"),
    *("position_kernel", "position_groups", "bias_buckets", "bias_max_distance"),
)


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture and regularisation of an encoder. The defaults are HuBERT Base.

    Constants follow fairseq `examples/hubert/config/pretrain/hubert_base_librispeech.yaml` and, for the relative
    position bias, the released WavLM configurations (`max_distance` 800, not the code's default 1280).

    Attributes:
        extractor_channels, extractor_kernels, extractor_strides: one entry a convolution; together they must make a
            frame of 400 samples every 320, the grid of the labels.
        extractor_bias: wav2vec 2.0 Large / XLS-R have convolution biases, HuBERT and WavLM have none.
        extractor_norm: "group": one group a channel over all time, after the first convolution only (Base);
            "layer": LayerNorm over channels after every convolution (Large).
        normalize_waveform: zero mean and unit variance per utterance before the extractor (Large).
        waveform_epsilon: added to that variance: fairseq and torchaudio 1e-5, Hugging Face's preprocessor 1e-7. They
            differ audibly for quiet audio only.
        valid_frames: which frames of a padded row are real. "convolution": those that hear no padding, as in wav2vec
            2.0, Hugging Face and torchaudio. "fairseq_bins": HuBERT and WavLM in fairseq, UniSpeech and unilm cut the
            padded row into as many bins as there are frames and keep a frame if its bin has a real sample; that is
            mostly one frame more, which hears zeros. Without padding there is no difference.
        width, layers, heads, feed_forward: of the Transformer.
        pre_norm: LayerNorm before (Large) or after (Base) attention and feed-forward.
        position_kernel, position_groups: the weight-normed convolution that encodes positions.
        relative_bias: WavLM's gated relative position bias.
        bias_buckets, bias_max_distance: of that bias; frames.
        dropout .. layerdrop: probabilities, used only where a key is given.
        feature_gradient_scale: gradient multiplier of the extractor, 0.1 for Base and 1.0 for Large.
        compute_dtype: of matrix products; norms' statistics, softmax and losses are float32 always.
        rematerialize: what the backward pass computes again instead of storing it. "nothing": all activations are
            stored; "dots": of a layer, all but the outputs of its six dense products (attention weights, norms, GELU,
            dropout are made again); "layers": all of a layer but its input. Changes memory and time, not results. On
            one CPU device gradients store so little as it is (`lean_gradients`) that "dots" saves nothing there.
    """

    extractor_channels: tuple[int, ...] = (512,) * 7
    extractor_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    extractor_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    extractor_bias: bool = False
    extractor_norm: Literal["group", "layer"] = "group"
    normalize_waveform: bool = False
    waveform_epsilon: float = 1e-5
    valid_frames: Literal["convolution", "fairseq_bins"] = "convolution"
    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    pre_norm: bool = False
    position_kernel: int = 128
    position_groups: int = 16
    relative_bias: bool = False
    bias_buckets: int = 320
    bias_max_distance: int = 800
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    projection_dropout: float = 0.1
    layerdrop: float = 0.05
    feature_gradient_scale: float = 0.1
    norm_epsilon: float = 1e-5
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    rematerialize: Rematerialize = "nothing"

    def __post_init__(self):
        if isinstance(self.rematerialize, bool):  # files of runs begun when this was a yes or no
            object.__setattr__(self, "rematerialize", "layers" if self.rematerialize else "nothing")
        if self.rematerialize not in get_args(Rematerialize):
            raise EncoderError(
                f"rematerialize is {self.rematerialize!r}; it must be one of {', '.join(get_args(Rematerialize))}"
            )
        convolutions = len(self.extractor_channels)
        if len(self.extractor_kernels) != convolutions or len(self.extractor_strides) != convolutions:
            raise EncoderError(
                f"extractor_channels, extractor_kernels and extractor_strides must have one entry a convolution, got "
                f"{convolutions}, {len(self.extractor_kernels)} and {len(self.extractor_strides)} entries"
            )
        for name in _SIZES:
            sizes = getattr(self, name)
            if min(sizes if isinstance(sizes, tuple) else (sizes,), default=0) < 1:
                raise EncoderError(f"{name} is {sizes}; every size is at least 1")
        for name in ("dropout", "attention_dropout", "activation_dropout", "projection_dropout", "layerdrop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise EncoderError(f"{name} is {getattr(self, name):g}; it is a probability, from 0 to below 1")
        if not self.feature_gradient_scale >= 0.0:
            raise EncoderError(
                f"feature_gradient_scale is {self.feature_gradient_scale:g}; it must be 0 (an extractor that does not "
                "learn) or more"
            )
        hop, field = 1, 1
        for kernel, stride in zip(self.extractor_kernels, self.extractor_strides, strict=True):
            field += (kernel - 1) * hop
            hop *= stride
        if (hop, field) != (HOP, RECEPTIVE_FIELD):
            raise EncoderError(
                f"extractor_kernels and extractor_strides make a frame of {field} samples every {hop}; labels and "
                f"masks are made for {RECEPTIVE_FIELD} every {HOP}"
            )
        if self.width % self.heads:
            raise EncoderError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % self.position_groups:
            raise EncoderError(f"width {self.width} is not a multiple of position_groups {self.position_groups}")
        if self.relative_bias and (self.bias_buckets % 4 or self.bias_max_distance <= self.bias_buckets // 4):
            raise EncoderError("bias_buckets must be a multiple of 4 and bias_max_distance above a quarter of it")


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


class Formulation(NamedTuple):
    """How an operation is spelled where spellings differ in speed but not in result.

    Attributes:
        scan_layers: `lax.scan` over the stacked layers (small programs) or an unrolled loop (faster on CPU).
        position: of the positional convolution. "grouped": one grouped convolution, the fastest on TPU; "by_group": one
            convolution a group, because XLA's own partitioner gathers the rows of all devices for the gradient of a
            grouped one (the TPU's compiler does not); "dft": through the Fourier transform of short segments, as
            matrix products; XLA:CPU's grouped convolution is many times slower, its FFT three times.
        attention_by_head: one head of one row after the other where nothing is dropped, so that its logits stay in the
            cache: half the time on CPU.
        extractor_by_row: the convolutions of one row after the other where no gradient is wanted, or a lean one, so
            that what lies between them stays in the cache on CPU: three quarters of the lean gradient's time.
        lean_gradients: gradients written by hand (`wavlab_jax.encoder.gradients`), which store little and compute it
            again in the cache, and updates in place (`wavlab_jax.updates`). Rows are taken one after the other, so it
            is for a program of one device.
        row_shards: over how many devices the rows of a pass are split, in equal parts one after the other. The gradient
            of the relative position bias, by pair of frames, is then folded into its table by each of them before it is
            summed over them: a table of some KB is exchanged, and not [heads, frames, frames] a layer.
        along_rows: tells the partitioner that [rows, ...] is split by rows, and so is its gradient. Applied to what
            meets a matrix whose input axis is split over `fsdp`: that is gathered then, and never the activations.
        convolution_by_tap: the downstream model's large convolution as a matrix product a tap, added up: on CPU half
            its forward time, three quarters of its gradient's.
    """

    scan_layers: bool
    position: PositionSpelling
    attention_by_head: bool
    extractor_by_row: bool
    lean_gradients: bool
    convolution_by_tap: bool = False
    row_shards: int = 1
    along_rows: Callable[[jax.Array], jax.Array] = _as_it_is


def formulation_for(platform: str, *, devices: int = 1) -> Formulation:
    """The spelling for a JAX platform name ("cpu", "gpu", "tpu"): the only place where they are chosen.

    `devices`: that the program's rows are split over.
    """
    on_cpu = platform == "cpu"
    position: dict[str, PositionSpelling] = {"cpu": "dft", "tpu": "grouped"}
    return Formulation(
        scan_layers=not on_cpu,
        position=position.get(platform, "by_group"),
        attention_by_head=on_cpu,
        extractor_by_row=on_cpu,
        lean_gradients=on_cpu and devices == 1,
        convolution_by_tap=on_cpu,
    )
