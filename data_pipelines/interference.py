"""What a row hears besides its utterance: other utterances, noise, a room."""

from typing import NamedTuple

import numpy as np

from data_pipelines import mixing
from data_pipelines.batch import NO_UTTERANCE
from data_pipelines.crops import crop_start
from data_pipelines.mixing import Interference, MixingConfig
from data_pipelines.recordings import NoiseFolder, ResponseFolder
from data_pipelines.reverberation import ReverbConfig, reverberate, simulated_response
from data_pipelines.sampling import Draw
from data_pipelines.sources import ShardSource


class Heard(NamedTuple):
    """A row as the encoder hears it: float32 [samples], and the (first) utterance in it besides its own, or none."""

    waveform: np.ndarray
    partner: int


class Interferer:
    """Mixes and reverberates rows; reads what it needs for that from the corpus and from folders.

    Partners are those of the draw; all random numbers come from the generator of the row. Rooms are drawn from a child
    of it, so that neither of the two configurations changes what the other one does, and whoever shares the generator
    sees the same numbers with and without rooms. As in ESPnet, the interference is in the same room as the utterance.

    Raises SourceError if a folder cannot be used.
    """

    def __init__(
        self, draw: Draw, source: ShardSource, *, mixing: MixingConfig | None = None, reverb: ReverbConfig | None = None
    ):
        self.draw, self.source, self.mixing = draw, source, mixing
        self.reverb = reverb if reverb is not None and reverb.probability else None
        self.noise = None if mixing is None or mixing.noise_folder is None else NoiseFolder(mixing.noise_folder)
        folder = None if self.reverb is None else self.reverb.folder
        self.responses = None if folder is None else ResponseFolder(folder)

    def disturb(self, clean: np.ndarray, *, place: int, row: int, rng: np.random.Generator) -> Heard:
        """`clean` [samples], the `row`-th row of static length number `place` (see `Draw.take`), with all that befalls
        it.

        `clean` is left as it is; it is returned itself where nothing befalls it.
        """
        room_rng = None if self.reverb is None else rng.spawn(1)[0]
        heard = Heard(clean, NO_UTTERANCE)
        if self.mixing is not None:
            heard = self._mixed(clean, place, row, rng)
        if room_rng is not None and room_rng.random() < self.reverb.probability:
            if self.responses is None:
                response = simulated_response(room_rng, cfg=self.reverb)
            else:
                response = self.responses.read(room_rng)
            heard = heard._replace(waveform=reverberate(heard.waveform, response))
        return heard

    def _mixed(self, clean: np.ndarray, place: int, row: int, rng: np.random.Generator) -> Heard:
        samples, rule = len(clean), self.mixing.rule
        plan = mixing.plan_mixture(rng, cfg=self.mixing, samples=samples)
        if not any(segment.length for segment in plan.segments):
            return Heard(clean, NO_UTTERANCE)
        if plan.kind is Interference.SHAPED:
            others, secondaries = [], [mixing.shaped_noise(rng, samples=samples)]
        elif plan.kind is Interference.RECORDED:
            others, secondaries = [], [self.noise.read(rng, samples) if rule == "wavlm" else self.noise.clip(rng)]
        else:
            others, secondaries = [], []
            for voice in range(plan.voices):
                other = self.draw.partner(place, row, voice=voice)
                if other is None:  # nothing else has this length
                    return Heard(clean, NO_UTTERANCE)
                start = crop_start(int(self.source.manifest.samples[other]), length=samples, rng=rng)
                others.append(other)
                secondaries.append(
                    self.source.read(other, start=start, samples=samples)
                )  # from the corpus again: clean
            if plan.kind is Interference.BABBLE:
                secondaries = [mixing.babble(secondaries)]
        heard = mixing.mix(clean, secondaries, snr_db=plan.snr_db, segments=plan.segments, rule=rule)
        if plan.kind is not Interference.SPEECH:
            return Heard(heard, NO_UTTERANCE)
        audible = [
            segment.speaker
            for segment in plan.segments
            if mixing.interference_scale(clean, secondaries[segment.speaker], snr_db=plan.snr_db, rule=rule)
        ]
        return Heard(heard, others[audible[0]] if audible else NO_UTTERANCE)
