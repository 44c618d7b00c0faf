"""Phones of Mandarin and Japanese are those that ESPnet trains ML-SUPERB's two phone tracks on."""

import sys
from types import ModuleType

import numpy as np
import pytest
import soundfile

from data_pipelines.mlsuperb import phones
from data_pipelines.mlsuperb.layout import MlSuperbError
from data_pipelines.mlsuperb.phones import japanese_phones, mandarin_phones, phonemizer_for
from data_pipelines.mlsuperb.tracks import read_track


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # ESPnet test/espnet2/text/test_phoneme_tokenizer.py
        ("卡尔普陪外孙玩滑梯。", "k a3 er3 p u3 p ei2 uai4 s uen1 uan2 h ua2 t i1 。"),
        ("女旅略", "n v3 l v3 l ve4"),
        ("GDP增长", "GDP z eng1 zh ang3"),
        # digits are left out where they stand alone, as in pypinyin_g2p_phone; spaces separate
        ("2023", ""),
        ("你 好 2023 年", "n i3 h ao3 2023 n ian2"),
        ("12 34", "12 34"),
        ("", ""),
    ],
)
def test_phones_of_mandarin(text, expected):
    assert mandarin_phones(text) == expected.split()


def test_phones_of_japanese(monkeypatch):
    """What pyopenjtalk writes, by ESPnet's test; the package itself has no wheels, and is not here."""
    said = {"昔は、俺も若かった": "m u k a sh i w a pau o r e m o w a k a k a cl t a", "": ""}
    stand_in = ModuleType("pyopenjtalk")
    stand_in.g2p = lambda text, kana: said[text]
    monkeypatch.setitem(sys.modules, "pyopenjtalk", stand_in)
    assert japanese_phones("昔は、俺も若かった")[:4] == ["m", "u", "k", "a"] and japanese_phones("") == []


def test_lines_without_a_phone_are_left_out_of_training_and_dev(tmp_path):
    folder = tmp_path / "fleurs" / "cmn"
    (folder / "wav").mkdir(parents=True)
    for part in ("train", "dev", "test"):
        lines = "fleurs_cmn_000001 x 你好\nfleurs_cmn_000002 x 2023\n"
        (folder / f"transcript_10min_{part}.txt").write_text(lines, "utf-8")
    for number in (1, 2):
        soundfile.write(folder / "wav" / f"fleurs_cmn_00000{number}.wav", np.ones(16_000) / 9, 16_000)
    track = read_track(tmp_path, "monolingual", duration="10min", monolingual="cmn")
    for part in ("train", "dev"):
        assert [each.text for each in track.parts[part]] == ["n i3 h ao3"]
        assert track.left_out[part] == [(str(folder / "wav" / "fleurs_cmn_000002.wav"), "no phones")]
    assert [each.text for each in track.parts["test"]] == ["n i3 h ao3", ""]


def test_a_missing_phone_package_is_named_and_one_that_makes_other_phones(monkeypatch):
    assert phonemizer_for("cmn") is mandarin_phones
    monkeypatch.setattr(phones, "version", lambda package: "0.55.0")
    with pytest.raises(MlSuperbError, match="pypinyin 0.55.0 makes other phones .* pip install 'pypinyin<=0.44.0'"):
        phonemizer_for("cmn")
    monkeypatch.setattr(phones, "find_spec", lambda package: None)
    with pytest.raises(MlSuperbError, match="not installed: pip install 'pypinyin<=0.44.0'"):
        phonemizer_for("cmn")
