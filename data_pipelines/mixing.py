"""Utterance and noise mixing: what WavLM adds to a row before the encoder hears it (2110.13900, section III-B).

Pure functions of waveforms, of an rng and of a configuration. The targets stay those of the primary; nothing is changed
in place. Which utterance is mixed in, and reading it, is the affair of `interference`.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from data_pipelines.levels import SILENCE, energy, non_silent_energy

ESPNET_FLOOR = 1e-10  # least mean square of an interference that is divided by (ESPnet `_add_noise_wavlm`)


Rule = Literal["wavlm", "unispeech", "espnet"]  # whose algorithm; see MixingConfig


class MixingError(ValueError):
    """A mixing configuration that cannot be meant."""


class Interference(enum.Enum):
    """What is mixed into a row."""

    NONE = "none"
    SPEECH = "speech"  # other utterances, one after the other
    BABBLE = "babble"  # several other utterances at once
    SHAPED = "shaped"  # Gaussian noise with a power-law spectrum
    RECORDED = "recorded"  # a file of the noise folder


@dataclass(frozen=True)
class MixingConfig:
    """How often, what, and how loud; WavLM's values. The peers' are `UNISPEECH_MIXING`, `ESPNET_MIXING`, `NEST_MIXING`.

    What the three rules have in common: a row is mixed with `probability`; it gets noise with `noise_share`, another
    utterance otherwise; the ratio is uniform in dB; the starts are uniform. They differ in:

        rule       wavlm                    unispeech                espnet
        source     paper, algorithm 1       utterance_mixing_        collate_fn.py
                                            dataset.py               _add_noise_wavlm
        length     1 .. fraction * row      0 .. fraction * row      1 .. fraction * row
        primary    mean square, whole row   mean square, whole row   mean square of what is not silent
        secondary  mean square, all of it   mean square, all of it   mean square, all of it, at least 1e-10
        noise      a stretch as long as     the whole clip; a short  the whole clip; a short
                   the row, repeated if     one shortens the mix     one shortens the mix
                   the file is shorter
        silence    nothing is added         nothing is added         a silent secondary is added below the ratio

    Not reproduced, in any rule: peers mix in place in the order of the batch, so that an interferer may carry an
    interferer of its own, or (UniSpeech) be the utterance itself; here it is read clean from the corpus, and never is
    the utterance itself. ESPnet mixes whole utterances and crops afterwards, so that the mixed stretch may be cut off;
    here the crop is mixed, with a crop of the same length, as in WavLM and UniSpeech. UniSpeech normalises a mixed row
    again; here the encoder normalises every row, or none, after mixing (`EncoderConfig.normalize_waveform`).

    Attributes:
        probability: of a row being mixed. noise_share: part of the mixed rows that get noise, not another utterance.
        speech_snr_db, noise_snr_db: (least, most) ratio of the energies of primary and interference, in dB, uniform.
        min_fraction, max_fraction: the mixed samples are between these parts of the row, but at least one.
        babble_voices: (fewest, most) utterances in a babble.
        noise_folder: audio files to take noise from. Without one, half of the noises are babble, half shaped noise.
        rule: see above.
        max_segments, max_speakers: the mixed samples are dealt over 1 .. max_segments stretches that do not overlap,
            and these over 1 .. max_speakers other utterances, both uniform (NeMo `asr/modules/ssl_modules`
            MultiSpeakerNoiseAugmentation). Each stretch has the row's ratio to the whole utterance it comes from; NeMo
            scales all of them by their energy over the row, pauses included.
    """

    probability: float = 0.2
    noise_share: float = 0.1
    speech_snr_db: tuple[float, float] = (-5.0, 5.0)
    noise_snr_db: tuple[float, float] = (-5.0, 20.0)
    min_fraction: float = 0.0
    max_fraction: float = 0.5
    babble_voices: tuple[int, int] = (4, 8)
    noise_folder: str | None = None
    rule: Rule = "wavlm"
    max_segments: int = 1
    max_speakers: int = 1

    def __post_init__(self):
        for name in ("probability", "noise_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise MixingError(f"{name} is {getattr(self, name)}; a probability lies in 0..1")
        if not 0 < self.max_fraction <= 1:
            raise MixingError(f"max_fraction is {self.max_fraction}; it must lie in 0..1 and not be 0")
        if not 0 <= self.min_fraction <= self.max_fraction:
            raise MixingError(f"min_fraction is {self.min_fraction}; it must lie in 0..max_fraction")
        for name in ("speech_snr_db", "noise_snr_db"):
            least, most = getattr(self, name)
            if not (math.isfinite(least) and math.isfinite(most) and least <= most):
                raise MixingError(f"{name} is {getattr(self, name)}; give (least, most) in dB")
        fewest, most = self.babble_voices
        if not 1 <= fewest <= most:
            raise MixingError(f"babble_voices is {self.babble_voices}; give (fewest, most), at least 1")
        if self.rule not in get_args(Rule):
            raise MixingError(f"rule is {self.rule!r}; choose one of {', '.join(get_args(Rule))}")
        for name in ("max_segments", "max_speakers"):
            if getattr(self, name) < 1:
                raise MixingError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_speakers > self.max_segments:
            raise MixingError(f"max_speakers is {self.max_speakers}; each needs one of max_segments stretches")


# microsoft/UniSpeech `src/fairseq/tasks/utterance_mixing_pretraining.py`: defaults of the task. (The data set's own
# are probability 0.2 and no noise.)
UNISPEECH_MIXING = MixingConfig(rule="unispeech", probability=0.5, noise_share=0.5)
# espnet/espnet `espnet2/train/collate_fn.py` HuBERTCollateFn: defaults. WavLabLM's own values are not
# published.
ESPNET_MIXING = MixingConfig(rule="espnet", probability=1.0, noise_share=0.1)
# NVIDIA/NeMo `examples/asr/conf/ssl/nest/nest_fast-conformer.yaml`: exactly half of every second row.
NEST_MIXING = MixingConfig(probability=0.5, noise_share=0.5, min_fraction=0.5, max_fraction=0.5)


class Segment(NamedTuple):
    """A mixed stretch: `length` samples of the interference are added to the row from its sample `start` on.

    `secondary_at` in [0, 1) says where they are taken from: 0 is the interference's beginning, and towards 1 they end
    with its end. `speaker` counts from 0; always 0 for noise.
    """

    length: int
    start: int
    secondary_at: float
    speaker: int = 0


class MixturePlan(NamedTuple):
    """What happens to one row: `segments` are added at `snr_db` dB. `voices`: other utterances that this takes."""

    kind: Interference
    snr_db: float = 0.0
    segments: tuple[Segment, ...] = ()
    voices: int = 0


UNMIXED = MixturePlan(Interference.NONE)


def plan_mixture(rng: np.random.Generator, *, cfg: MixingConfig, samples: int) -> MixturePlan:
    """Draws what happens to a row of `samples` samples: kind, ratio, length, places."""
    if rng.random() >= cfg.probability:
        return UNMIXED
    kind, voices = Interference.SPEECH, 1
    if rng.random() < cfg.noise_share:
        if cfg.noise_folder is not None:
            kind, voices = Interference.RECORDED, 0
        elif rng.random() < 0.5:
            kind, voices = Interference.BABBLE, int(rng.integers(cfg.babble_voices[0], cfg.babble_voices[1] + 1))
        else:
            kind, voices = Interference.SHAPED, 0
    snr_db = float(rng.uniform(*(cfg.speech_snr_db if kind is Interference.SPEECH else cfg.noise_snr_db)))
    fewest = 0 if cfg.rule == "unispeech" else 1
    most = max(fewest, int(samples * cfg.max_fraction))
    length = int(rng.integers(min(max(fewest, int(samples * cfg.min_fraction)), most), most + 1))
    if cfg.max_segments == 1:
        start = int(rng.integers(samples - length + 1))
        return MixturePlan(kind, snr_db, (Segment(length, start, float(rng.random())),), voices)
    segments = _deal(rng, cfg=cfg, samples=samples, length=length, speech=kind is Interference.SPEECH)
    speakers = 1 + max(segment.speaker for segment in segments)
    return MixturePlan(kind, snr_db, segments, speakers if kind is Interference.SPEECH else voices)


def _deal(
    rng: np.random.Generator, *, cfg: MixingConfig, samples: int, length: int, speech: bool
) -> tuple[Segment, ...]:
    """`length` samples in several stretches of a row of `samples`, the gaps between them uniform.

    As in NeMo, lengths are multinomial, and each speaker gets one stretch before any gets a second.
    """
    count = int(rng.integers(1, cfg.max_segments + 1))
    lengths = rng.multinomial(length, np.full(count, 1 / count))
    lengths = lengths[lengths > 0] if length else lengths[:1]
    count = len(lengths)
    starts = np.sort(rng.integers(samples - length + 1, size=count)) + np.cumsum(lengths) - lengths
    speakers = min(int(rng.integers(1, cfg.max_speakers + 1)), count) if speech else 1
    turns = [*range(speakers), *rng.integers(speakers, size=count - speakers).tolist()]
    return tuple(Segment(int(lengths[k]), int(starts[k]), float(rng.random()), turns[k]) for k in range(count))


def interference_scale(primary: np.ndarray, secondary: np.ndarray, *, snr_db: float, rule: Rule = "wavlm") -> float:
    """sqrt(E_primary / (10^(snr/10) E_secondary)) of two waveforms [samples]: the factor that gives the asked ratio of
    their energies, in dB; which energies, `rule` says (see `MixingConfig`).

    0 if either is silent: there is then no such factor, and the row stays as it is. (Rule "espnet" never divides by
    less than 1e-10, and so adds a fainter secondary all the same.)
    """
    loud = non_silent_energy(primary) if rule == "espnet" else energy(primary)
    quiet = max(energy(secondary), ESPNET_FLOOR) if rule == "espnet" else energy(secondary)
    if loud < SILENCE or quiet < SILENCE:
        return 0.0
    return math.sqrt(loud / (10 ** (snr_db / 10) * quiet))


def mix(
    primary: np.ndarray,
    secondaries: Sequence[np.ndarray],
    *,
    snr_db: float,
    segments: Sequence[Segment],
    rule: Rule = "wavlm",
) -> np.ndarray:
    """float32 [samples]: a copy of `primary` [samples] with `segments` of `secondaries` added, one a speaker.

    Energies are those of whole waveforms, not of stretches, so that a pause in either does not blow up the other. A
    secondary that is shorter than a segment shortens it. Equal to `primary` if that is silent. Raises MixingError if a
    segment does not fit into the primary.
    """
    mixed = np.array(primary, np.float32)
    scales = [interference_scale(primary, secondary, snr_db=snr_db, rule=rule) for secondary in secondaries]
    for segment in segments:
        start, secondary = segment.start, secondaries[segment.speaker]
        if not (start >= 0 and segment.length >= 0 and start + segment.length <= len(primary)):
            raise MixingError(
                f"samples {start}..{start + segment.length} do not lie in the primary, which has {len(primary)}"
            )
        length = min(segment.length, len(secondary))
        begin = int(segment.secondary_at * (len(secondary) - length + 1))
        if scales[segment.speaker]:
            stretch = secondary[begin : begin + length]
            mixed[start : start + length] += np.float32(scales[segment.speaker]) * stretch
    return mixed


def babble(voices: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [samples]: the sum of `voices` [samples] each, all equally loud; silent ones are left out."""
    total = np.zeros(len(voices[0]), np.float32)
    for voice in voices:
        power = energy(voice)
        if power >= SILENCE:
            total += voice * np.float32(1 / math.sqrt(power))
    return total


def shaped_noise(rng: np.random.Generator, *, samples: int) -> np.ndarray:
    """float32 [samples]: Gaussian noise whose power falls as 1 / f^g, g ~ U(0, 2), with a mean square of 1.

    g = 0 is white, 1 pink, 2 brown: between them lie the long-term spectra of wind, traffic, fans and rooms.
    """
    exponent = rng.uniform(0.0, 2.0)
    spectrum = np.fft.rfft(rng.standard_normal(samples, dtype=np.float32))
    bins = np.arange(len(spectrum), dtype=np.float32)
    bins[0] = 1.0
    spectrum *= bins ** np.float32(-exponent / 2)
    if len(spectrum) > 1:
        spectrum[0] = 0.0  # no offset
    noise = np.fft.irfft(spectrum, n=samples).astype(np.float32)
    return noise / np.float32(math.sqrt(max(energy(noise), SILENCE)))
