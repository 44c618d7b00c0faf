"""Hidden states of recordings of any length: in one piece up to a window, in overlapping windows beyond it.

    blocks of waveform ─ moments of the whole ▶ convolutions, in chunks ▶ Transformer, in windows ▶ pieces of frames

Up to the window the result is `encode`'s. Beyond it, everything before the Transformer still is, to rounding: waveform
normalisation and the group norm use the moments of the whole recording, found by passes of their own, and chunks
overlap by the receptive field. The positional convolution and the Transformer then see a window at a time, of which
`context` seconds on each side are heard but not kept; how far that is from one piece, docs/features.md shows.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.batch import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames
from wavlab_jax.encoder import Encoder, Formulation, encode, formulation_for
from wavlab_jax.encoder.encoder import encode_features
from wavlab_jax.encoder.frontend import WholeMoments
from wavlab_jax.encoder.layers import Moments

MEAN = "mean"  # of all hidden states
Layer = int | Literal["mean"]
Blocks = Callable[[], Iterable[np.ndarray]]  # each call reads the recording anew: float32 [any number of samples]

CHUNK_FRAMES = 500  # 10 s of frames, at most so many are convolved at once
# Rows are padded to the next of these lengths, at most 1.4 times their own, so that few programs are compiled.
_STATIC_LENGTHS = tuple(math.ceil(SAMPLE_RATE * 2 ** (step / 2)) for step in range(2, 10))  # 2 s to 22.6 s
_LONG_STEP = 15 * SAMPLE_RATE  # beyond them, to a multiple of this


class StreamError(ValueError):
    """A recording or a setting that no hidden states can be computed for; the message says what to do."""


@dataclass(frozen=True)
class WindowConfig:
    """Seconds.

    Attributes:
        window: recordings up to this length are encoded in one piece; longer ones in windows of it. 0: always one
            piece, with memory and time growing with the square of the length.
        context: of each window, heard on either side but not kept, except at the recording's own ends.
        at_once: audio in one pass of the encoder, where several short recordings are at hand.
    """

    window: float = 30.0
    context: float = 5.0
    at_once: float = 60.0

    def __post_init__(self):
        if self.window and (self.window < 0.1 or self.step_frames < 1 or self.context < 0):
            raise StreamError(
                f"a window of {self.window:g} s with {self.context:g} s of context on each side keeps nothing: the "
                "window must be longer than twice the context (and 0.1 s), or 0 for recordings in one piece"
            )

    @property
    def samples(self) -> int:
        """Of a window; 0: no limit."""
        return round(self.window * SAMPLE_RATE)

    @property
    def frames(self) -> int:
        """Of a window."""
        return num_frames(self.samples)

    @property
    def context_frames(self) -> int:
        """On each side."""
        return round(self.context * SAMPLE_RATE / HOP)

    @property
    def step_frames(self) -> int:
        """From one window to the next."""
        return self.frames - 2 * self.context_frames


class Streamed(NamedTuple):
    """Hidden states of a long recording, on their way.

    Attributes:
        frames: how many there are.
        pieces: arrays [layers, some frames, width] float32 that follow each other in time, to be read once.
    """

    frames: int
    pieces: Iterator[np.ndarray]


def parse_layers(text: str, *, layers: int) -> tuple[Layer, ...]:
    """`6,9,mean` or `all`, of an encoder of `layers` layers: 0 is the first layer's input, n the output of layer n.

    Hugging Face's indices: layers + 1 hidden states, the last one after the final norm where there is one. `mean` is
    the mean of them all. Raises StreamError with the range.
    """
    chosen: list[Layer] = []
    for part in (part.strip() for part in text.split(",")):
        if part == "all":
            chosen += range(layers + 1)
        elif part == MEAN:
            chosen.append(MEAN)
        elif part.isdecimal() and int(part) <= layers:
            chosen.append(int(part))
        else:
            raise StreamError(f"no layer is called {part!r}: this model has 0 to {layers}, `{MEAN}` and `all`")
    return tuple(chosen)


class Extractor:
    """Chosen hidden states of an encoder, in float32 whatever it was trained in."""

    def __init__(self, encoder: Encoder, *, layers: Sequence[Layer], cfg: WindowConfig | None = None):
        self.encoder = _for_inference(encoder)
        self.layers = tuple(layers)
        self.cfg = cfg or WindowConfig()

    def static_length(self, samples: int) -> int:
        """Samples that a recording of this length is padded to; at most the window's, where there is one."""
        length = next(
            (length for length in _STATIC_LENGTHS if length >= samples), -(-samples // _LONG_STEP) * _LONG_STEP
        )
        return min(length, self.cfg.samples) if 0 < samples <= self.cfg.samples else length

    def rows_at_once(self, length: int) -> int:
        """Recordings of this static length in one pass."""
        return max(int(self.cfg.at_once * SAMPLE_RATE) // length, 1)

    def in_one_piece(self, waveforms: Sequence[np.ndarray], *, rows: int = 1) -> list[np.ndarray]:
        """[layers, frames, width] of each waveform [samples]; they share one pass, padded to one static length.

        The pass has at least `rows` rows, the last ones empty. No padding changes more than rounding does. Raises
        StreamError for a waveform of less than 400 samples.
        """
        shortest, longest = (bound(map(len, waveforms)) for bound in (min, max))
        if shortest < RECEPTIVE_FIELD:
            raise StreamError(too_short(shortest))
        samples = np.zeros(max(len(waveforms), rows), np.int32)
        padded = np.zeros((len(samples), self.static_length(longest)), np.float32)
        for row, waveform in enumerate(waveforms):
            padded[row, : len(waveform)], samples[row] = waveform, len(waveform)
        hidden = np.asarray(_rows(self.encoder, padded, samples, layers=self.layers))
        return [hidden[row, :, : num_frames(len(waveform))] for row, waveform in enumerate(waveforms)]

    def stream(self, blocks: Blocks) -> Streamed:
        """Hidden states of a recording longer than a window, piece by piece; it is read two or three times.

        Raises StreamError, perhaps late: shorter than a window, or shorter when read again.
        """
        samples, whole = self.whole_moments(blocks)
        frames = num_frames(samples)
        if not self.cfg.samples or frames < self.cfg.frames:
            raise StreamError(f"{samples} samples are no longer than a window: encode them in one piece")
        return Streamed(frames, self._pieces(blocks, frames, whole))

    def whole_moments(self, blocks: Blocks) -> tuple[int, WholeMoments]:
        """Samples of the recording, and what the frontend must know of the whole of it to encode its parts."""
        cfg = self.encoder.config
        measured = _RunningMoments()
        for block in blocks():
            block = block.astype(np.float64)
            measured.add(block.size, block.mean(), np.square(block - block.mean()).sum())
        waveform = measured.moments()
        if cfg.extractor_norm != "group":
            return measured.count, WholeMoments(waveform, None)

        field, hop = cfg.extractor_kernels[0], cfg.extractor_strides[0]
        measured_after = _RunningMoments()
        for chunk, outputs in cut(blocks(), field=field, hop=hop, outputs=CHUNK_FRAMES * HOP // hop):
            mean, squares = _first_convolution(self.encoder, chunk, outputs, waveform)
            measured_after.add(outputs, np.asarray(mean, np.float64), np.asarray(squares, np.float64))
        return measured.count, WholeMoments(waveform, measured_after.moments())

    def chunks(self, blocks: Blocks, whole: WholeMoments) -> Iterator[np.ndarray]:
        """Output of the convolutions, [frames, channels], in pieces that follow each other in time."""
        size = min(CHUNK_FRAMES, self.cfg.step_frames)
        for chunk, frames in cut(blocks(), field=RECEPTIVE_FIELD, hop=HOP, outputs=size):
            yield np.asarray(_features(self.encoder, chunk, whole))[:frames]

    def _pieces(self, blocks: Blocks, frames: int, whole: WholeMoments) -> Iterator[np.ndarray]:
        chunks = self.chunks(blocks, whole)
        held, held_from = np.zeros((0, self.encoder.config.extractor_channels[-1]), np.float32), 0
        for window in plan_windows(frames, cfg=self.cfg):
            while held_from + len(held) < window.start + self.cfg.frames:
                chunk = next(chunks, None)
                if chunk is None:
                    raise StreamError("the recording became shorter while it was read: start again when it is complete")
                held = np.concatenate([held, chunk])
            held, held_from = held[window.start - held_from :], window.start
            hidden = np.asarray(_window(self.encoder, held[: self.cfg.frames], layers=self.layers))
            yield hidden[:, window.keep_from - window.start : window.keep_to - window.start]


class Window(NamedTuple):
    """Frames of a recording: a window begins at `start`; `keep_from` up to, not including, `keep_to` are kept."""

    start: int
    keep_from: int
    keep_to: int


def plan_windows(frames: int, *, cfg: WindowConfig) -> Iterator[Window]:
    """Windows of `cfg.frames` frames each that keep every one of `frames` frames exactly once, in order.

    The last window ends with the recording, so that none is padded. Each kept frame has `context` on either side, or
    all that there is.
    """
    start = kept = 0
    while start + cfg.frames < frames:
        keep_to = start + cfg.frames - cfg.context_frames
        yield Window(start, kept, keep_to)
        start, kept = min(start + cfg.step_frames, frames - cfg.frames), keep_to
    yield Window(start, kept, frames)


def cut(blocks: Iterable[np.ndarray], *, field: int, hop: int, outputs: int) -> Iterator[tuple[np.ndarray, int]]:
    """Chunks [samples] of a waveform in blocks, for a convolution over `field` samples every `hop`, field >= hop.

    Every output of the whole waveform is one of exactly one chunk. All chunks have the length that makes `outputs`
    outputs; the last one ends in zeros, and the number beside it says how many outputs are real.
    """
    size, step = field + (outputs - 1) * hop, outputs * hop
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= size:
            yield held[:size], outputs
            held = held[step:]
    if len(held) >= field:
        yield np.pad(held, (0, size - len(held))), (len(held) - field) // hop + 1


def too_short(samples: int) -> str:
    """Why a recording of so few samples has no frame."""
    return f"too short: {samples} samples at 16 kHz, a frame needs {RECEPTIVE_FIELD} ({RECEPTIVE_FIELD / 16:g} ms)"


class _RunningMoments:
    """Count, mean and sum of squared differences from it, joined part by part in float64 (Chan et al. 1979)."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, np.float64(0), np.float64(0)

    def add(self, count: int, mean, squares) -> None:
        """Takes in a part; arrays are counted element by element."""
        total = self.count + count
        difference = mean - self.mean
        self.squares = self.squares + squares + np.square(difference) * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def moments(self) -> Moments:
        """Mean and variance so far, float32."""
        return Moments(jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.squares / max(self.count, 1), jnp.float32))


def _for_inference(encoder: Encoder) -> Encoder:
    """The same parameters, computed in float32, with nothing kept for gradients, and with padding that nobody hears."""
    copy = nnx.merge(*nnx.split(encoder))
    copy.config = dataclasses.replace(
        encoder.config, compute_dtype="float32", rematerialize="nothing", valid_frames="convolution"
    )
    return copy


def _choose(hidden: tuple[jax.Array, ...], layers: tuple[Layer, ...]) -> jax.Array:
    """layers + 1 arrays [rows, frames, width] to [rows, chosen, frames, width], float32."""
    hidden = tuple(h.astype(jnp.float32) for h in hidden)
    return jnp.stack([sum(hidden) / len(hidden) if layer == MEAN else hidden[layer] for layer in layers], axis=1)


def _formulation() -> Formulation:
    """Unrolled on every platform: layers above the last chosen one are then never computed."""
    return formulation_for(jax.default_backend())._replace(scan_layers=False)


@partial(jax.jit, static_argnames="layers")
def _rows(encoder: Encoder, waveform: jax.Array, samples: jax.Array, *, layers: tuple[Layer, ...]) -> jax.Array:
    """[rows, samples], [rows] -> [rows, chosen, frames, width]."""
    valid = jnp.arange(waveform.shape[1])[None] < samples[:, None]
    return _choose(encode(encoder, waveform, valid, formulation=_formulation()).hidden, layers)


@jax.jit
def _first_convolution(encoder: Encoder, chunk: jax.Array, outputs: jax.Array, moments: Moments):
    """[samples] -> mean and sum of squared differences, [channels] each, of the first `outputs` outputs."""
    y = encoder.frontend.first_convolution(chunk[None], moments, cfg=encoder.config)[0].astype(jnp.float32)
    real = (jnp.arange(len(y)) < outputs)[:, None]
    mean = jnp.sum(y, axis=0, where=real) / outputs
    return mean, jnp.sum(jnp.square(y - mean[None]), axis=0, where=real)


@jax.jit
def _features(encoder: Encoder, chunk: jax.Array, whole: WholeMoments) -> jax.Array:
    """[samples] -> [frames, channels]."""
    return encoder.frontend.features(chunk[None], samples=None, cfg=encoder.config, whole=whole)[0]


@partial(jax.jit, static_argnames="layers")
def _window(encoder: Encoder, features: jax.Array, *, layers: tuple[Layer, ...]) -> jax.Array:
    """[frames, channels] -> [chosen, frames, width]."""
    return _choose(encode_features(encoder, features[None], formulation=_formulation()), layers)[0]
