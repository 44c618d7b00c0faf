"""What befalls a row: partners, noises and rooms, drawn from the row's own generator."""

import dataclasses
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from data_pipelines import mixing
from data_pipelines.batch import NO_UTTERANCE, Batch
from data_pipelines.interference import Interferer
from data_pipelines.mixing import ESPNET_MIXING, MixingConfig
from data_pipelines.pipeline import LoadBatch, train_dataset
from data_pipelines.reverberation import ReverbConfig, reverberate, simulated_response
from data_pipelines.sources import SourceError
from tests.data_pipelines.ramps import CLEAN, MIXED

ROW = 4000
ALWAYS = ReverbConfig(probability=1.0)


def voice(utterance, samples=ROW):
    """Noise of its own level and offset, float32 [samples]; utterance 9 is silent."""
    rng = np.random.default_rng(utterance)
    return (rng.standard_normal(samples) * (0 if utterance == 9 else 0.02 * (utterance + 1))).astype(np.float32)


class Voices:
    """Ten utterances of exactly a row; `asked` tells which partners were drawn."""

    def __init__(self, *, partners=range(1, 9)):
        self.manifest, self.asked = SimpleNamespace(samples=[ROW] * 10), []
        self.partners = list(partners)

    def partner(self, place, row, *, voice):
        if not self.partners:
            return None
        found = self.partners[(row + 3 * voice) % len(self.partners)]
        self.asked.append(found)
        return found

    def read(self, utterance, *, start, samples):
        assert start == 0 and samples == ROW
        return voice(utterance)


def disturb(cfg=None, reverb=None, *, seed=0, partners=range(1, 9)):
    voices = Voices(partners=partners)
    interferer = Interferer(voices, voices, mixing=cfg, reverb=reverb)
    clean = voice(0)
    heard = interferer.disturb(clean, place=0, row=seed, rng=np.random.default_rng(seed))
    np.testing.assert_array_equal(clean, voice(0))  # never in place
    return heard, voices.asked


def test_nothing_befalls_a_row_that_nothing_should_befall():
    for cfg, reverb in ((None, None), (MixingConfig(probability=0.0), ReverbConfig(probability=0.0))):
        heard, asked = disturb(cfg, reverb)
        np.testing.assert_array_equal(heard.waveform, voice(0))
        assert heard.partner == NO_UTTERANCE and not asked


@pytest.mark.parametrize("rule", ["wavlm", "unispeech", "espnet"])
def test_what_is_added_is_the_partner_at_the_planned_place(rule):
    cfg = MixingConfig(probability=1.0, noise_share=0.0, rule=rule, max_segments=3, max_speakers=2)
    several = 0
    for seed in range(30):
        heard, asked = disturb(cfg, seed=seed)
        plan = mixing.plan_mixture(np.random.default_rng(seed), cfg=cfg, samples=ROW)
        if not plan.segments[0].length:
            assert heard.partner == NO_UTTERANCE and not asked
            continue
        several += len(asked) == 2
        assert len(asked) == plan.voices and heard.partner == asked[0]
        expected = voice(0).astype(np.float64)
        for segment in plan.segments:
            other = voice(asked[segment.speaker])
            scale = mixing.interference_scale(voice(0), other, snr_db=plan.snr_db, rule=rule)
            begin = int(segment.secondary_at * (ROW - segment.length + 1))
            expected[segment.start :][: segment.length] += scale * other[begin:][: segment.length]
        np.testing.assert_allclose(heard.waveform, expected, atol=1e-6)
    assert several > 3


def test_a_partner_that_cannot_be_heard_is_not_named():
    cfg = MixingConfig(probability=1.0, noise_share=0.0)
    heard, asked = disturb(cfg, partners=[9])
    assert asked == [9] and heard.partner == NO_UTTERANCE
    np.testing.assert_array_equal(heard.waveform, voice(0))
    assert disturb(cfg, partners=[])[0].partner == NO_UTTERANCE  # nothing else has this length


def test_espnets_noise_is_measured_over_the_whole_file(tmp_path):
    """A second of sound in four of near silence: half as loud as its sound, however little of it is mixed in."""
    clip = np.concatenate([voice(3, 16_000), 1e-3 * voice(4, 48_000)])
    soundfile.write(tmp_path / "n.wav", clip, 16_000, subtype="FLOAT")
    cfg = dataclasses.replace(ESPNET_MIXING, noise_share=1.0, noise_folder=str(tmp_path), noise_snr_db=(7.0, 7.0))
    primary, whole = np.mean(voice(0).astype(np.float64) ** 2), np.mean(clip.astype(np.float64) ** 2)
    checked = 0
    for seed in range(8):
        added = disturb(cfg, seed=seed)[0].waveform.astype(np.float64) - voice(0)
        plan = mixing.plan_mixture(np.random.default_rng(seed), cfg=cfg, samples=ROW)
        (segment,) = plan.segments
        begin = int(segment.secondary_at * (len(clip) - segment.length + 1))
        stretch = clip[begin:][: segment.length].astype(np.float64)
        if begin + segment.length > 16_000:  # too faint to read a number off
            continue
        scale = np.dot(added[segment.start :][: segment.length], stretch) / np.dot(stretch, stretch)
        assert 10 * np.log10(primary / (scale**2 * whole)) == pytest.approx(7.0, abs=1e-3)
        checked += 1
    assert checked


def test_a_short_noise_fills_wavlms_stretch_and_shortens_the_peers(tmp_path):
    soundfile.write(tmp_path / "n.wav", voice(3, 100), 16_000, subtype="FLOAT")
    for rule, longest in (("wavlm", 2000), ("unispeech", 100), ("espnet", 100)):
        cfg = MixingConfig(
            probability=1.0, noise_share=1.0, noise_folder=str(tmp_path), rule=rule, min_fraction=0.5, max_fraction=0.5
        )
        changed = np.flatnonzero(disturb(cfg)[0].waveform != voice(0))
        assert longest - 5 <= changed[-1] - changed[0] + 1 <= longest


def test_rooms_and_mixing_leave_each_other_alone():
    """A wet row is the dry one in its room, and the room is the same whatever is mixed in."""
    rooms = 0
    for seed in range(12):
        room_rng = np.random.default_rng(seed).spawn(1)[0]
        wet = room_rng.random() < 0.5
        response = simulated_response(room_rng, cfg=ReverbConfig())
        rooms += wet
        for cfg in (None, MixingConfig(probability=1.0), MixingConfig(probability=1.0, rule="espnet")):
            dry, partners = disturb(cfg, seed=seed)
            heard, again = disturb(cfg, ReverbConfig(probability=0.5), seed=seed)
            assert again == partners and heard.partner == dry.partner
            np.testing.assert_array_equal(heard.waveform, reverberate(dry.waveform, response) if wet else dry.waveform)
    assert 0 < rooms < 12


# --- in the pipeline ---


def batches(cfg, corpus, units, count):
    dataset = train_dataset(cfg, corpus, units)
    return [dataset[step] for step in range(count)]


def test_rooms_change_the_waveform_and_nothing_else(corpus, units):
    wet = dataclasses.replace(MIXED, reverb=ALWAYS)
    for dry, heard in zip(batches(MIXED, corpus, units, 4), batches(wet, corpus, units, 4), strict=True):
        for name in set(Batch._fields) - {"waveform"}:
            np.testing.assert_array_equal(getattr(dry, name), getattr(heard, name), err_msg=name)
        assert (dry.waveform != heard.waveform).any(1).all()
        levels = np.mean(heard.waveform.astype(float) ** 2, 1) / np.mean(dry.waveform.astype(float) ** 2, 1)
        assert (np.abs(10 * np.log10(levels)) < 1).all()


def test_rooms_of_probability_zero_change_nothing(corpus, units):
    off = dataclasses.replace(MIXED, reverb=ReverbConfig(probability=0.0))
    for dry, heard in zip(batches(MIXED, corpus, units, 4), batches(off, corpus, units, 4), strict=True):
        for one, other in zip(dry, heard, strict=True):
            np.testing.assert_array_equal(one, other)


def test_share_of_rows_in_rooms(corpus, units):
    short = dataclasses.replace(CLEAN, lengths=(16_000,))
    wet = dataclasses.replace(short, reverb=ReverbConfig())
    changed = np.concatenate(
        [
            (dry.waveform != heard.waveform).any(1)
            for dry, heard in zip(batches(short, corpus, units, 20), batches(wet, corpus, units, 20), strict=True)
        ]
    )
    assert changed.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / len(changed)))


def test_rooms_from_a_folder(corpus, units, tmp_path):
    """An echo of half the loudness 100 samples after the direct path, which comes 50 samples into the file."""
    response = np.zeros(200)
    response[50], response[150] = -0.8, -0.4
    soundfile.write(tmp_path / "echo.wav", response, 16_000, subtype="FLOAT")
    wet = dataclasses.replace(CLEAN, reverb=ReverbConfig(probability=1.0, folder=str(tmp_path)))
    dry, heard = batches(CLEAN, corpus, units, 1)[0], batches(wet, corpus, units, 1)[0]
    for one, other in zip(dry.waveform, heard.waveform, strict=True):
        echoed = one.astype(np.float64)
        echoed[100:] += 0.5 * one[:-100]
        ratio = np.dot(echoed, other) / np.dot(echoed, echoed)
        np.testing.assert_allclose(other, ratio * echoed, atol=2e-5)
    load = LoadBatch(wet, corpus, units)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(load)).map(0).waveform, heard.waveform)
    with pytest.raises(SourceError, match="nowhere"):
        LoadBatch(dataclasses.replace(wet, reverb=ReverbConfig(folder=str(tmp_path / "nowhere"))), corpus, units)
